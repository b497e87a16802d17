"""coactivation: split hidden neurons by the calibration tokens that activate them together.

    a_i = (|h_ti| / |h_t|)_t over sampled tokens t      balanced k-means of the a_i of length 1

so that neurons which share their tokens share an expert (MoEfication's co-activation, Zhang et al. 2022,
arXiv:2110.01786, as points instead of a graph). Tokens are divided by their norm, or the few with huge
activations would decide alone. experiments/ablations.py compares it with k-means on the weights.

Neurons have to be split before routers can be sampled, so that the first batches run twice: here, until
every site has met TOKENS tokens, and again with all others. They are kept meanwhile (as they were given,
not copied), beside TOKENS x H numbers a site, each within Config.calibration_bytes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cluster import balanced_kmeans
from .config import Config
from .errors import CalibrationError
from .explaining import observed
from .ir import Plan, Site
from .plan import excluding, key_of, plan, with_own_name
from .probe import Graph, arguments, probing
from .sample import Sample

log = logging.getLogger(__name__)
TOKENS = 4096  # per site

Key = tuple[str, ...]


def coactive_labels(
    model: nn.Module, stream: Iterator[Any], config: Config
) -> tuple[dict[Key, Tensor], Iterator[Any]]:
    """Experts of the neurons, labels [H] by a site's parameter names, and the stream from its start again.

    Runs as many of the first batches as it takes, in eval mode without gradients. A site that none of
    them reaches is missing. Raises CalibrationError for activations that are not finite, PlanError.
    """
    observer, held, kept = _Coactivating(config), [], 0
    with probing(model, observer) as call:
        for batch in stream:
            held.append(batch)
            args, kwargs = arguments(batch)
            call(*args, **kwargs)
            observer.batch += 1
            kept += sum(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            if observer.full or kept > config.calibration_bytes:
                break
    return observer.labels(), itertools.chain(held, stream)


class _Coactivating:
    """Observer that samples every site's hidden values."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.batch = 0
        self.plans: dict[Key, Plan] = {}
        self.samples: dict[Key, Sample] = {}
        self._widths: dict[Key, int] = {}
        self._names: dict[Key, str] = {}
        self._running: Sequence[Site] = ()

    @property
    def full(self) -> bool:
        """Whether every site that was met has its tokens."""
        return all(sample.seen >= sample.limit for sample in self.samples.values())

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """Run a graph with its blocks observed."""
        self._running = [found.site for found in graph.matches]
        for site in self._running:
            key = key_of(site)
            if key in self._names:
                continue
            name = with_own_name(site, set(self._names.values())).name
            self._names[key] = name
            if excluding(name, self.config):
                continue
            found = plan(site, self.config)
            if isinstance(found, Plan):
                draw = torch.Generator().manual_seed(self.config.seed + len(self.plans))
                self.plans[key] = found
                self.samples[key] = Sample(TOKENS, draw)
                self._widths[key] = site.d_hidden
        for key, sample in self.samples.items():
            fits = self.config.calibration_bytes / (1.5 * len(self.samples) * self._widths[key] * 4)
            sample.restrict(max(1, int(fits)))
        return observed(graph).forward(*args)

    def seen(self, index: int, x: Tensor, hidden: Tensor) -> None:
        """Sample one block's hidden values [..., H], each token's of length 1."""
        site = self._running[index]
        sample = self.samples.get(key_of(site))
        if sample is None:
            return
        rows = hidden.detach().reshape(-1, hidden.shape[-1]).float().abs()
        if not rows.isfinite().all():
            raise CalibrationError(
                f"Batch {self.batch} of the calibration data gives NaN or infinity at site {site.name!r}; "
                "expected finite values. Check that batch, and that the dense model is sound in this dtype."
            )
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        sample.add(rows, rows[:, :0])

    def labels(self) -> dict[Key, Tensor]:
        """The split of every site that met a token."""
        found: dict[Key, Tensor] = {}
        for key, sample in self.samples.items():
            if sample.seen:
                features = sample.rows()[0].T.contiguous()
                experts = self.plans[key].experts
                found[key] = balanced_kmeans(features, experts, seed=self.config.seed).labels
        return found


def labels_or_weights(
    labels: Mapping[Key, Tensor], site: Site, features: Tensor, experts: int, seed: int
) -> Tensor:
    """A site's labels [H], or those of k-means on its weights where no early token reached it."""
    found = labels.get(key_of(site))
    if found is None:
        log.warning("site %s: no token of the first batches; split by its weights", site.name)
        return balanced_kmeans(features, experts, seed=seed).labels
    return found
