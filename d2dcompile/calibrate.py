"""calibrate: stream batches through the model and keep, per site, router inputs and their targets.

Target of token t and expert e is the L2 norm of the expert's output, ||h_e W_e||, by the Gram identity
||h_e W_e||^2 = h_e (W_e W_e^T) h_e^T, which needs no E x T x D tensor. Memory is bounded: of a stream of
any length each site keeps a uniform random sample.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .cluster import balanced_kmeans, permutation, random_split
from .coactivation import coactive_labels, labels_or_weights
from .config import Config
from .errors import CalibrationError, CalibrationWarning, ConfigError
from .explaining import observed
from .ir import Plan, Site
from .layout import overlaps, slabs
from .passes import Match
from .passes.share_routing import same_inputs
from .plan import excluding, key_of, plan, with_own_name
from .probe import Graph, arguments, probing
from .router import gram
from .routers import targets_of
from .sample import Sample

TOKENS_PER_EXPERT = (
    20  # below this a router has fewer examples than it could ever need; warned about
)


@dataclass
class Draft:
    """A site on its way to experts: its plan, neuron order, Gram matrices [E, F, F] and sample.

    centroids: [E, D], the mean up- or gate-row of each expert where the router is made of them.
    group: equal for sites whose routers get one first layer; its own key for a site without others.
    """

    site: Site
    plan: Plan
    order: Tensor
    gram: Tensor
    sample: Sample
    centroids: Tensor | None
    group: tuple[str, ...]


def calibrate(
    model: nn.Module, batches: Iterable[Any], config: Config, progress: bool
) -> tuple[list[Draft], dict[str, str]]:
    """Drafts of all sites that the batches run, and {site name: reason} of those left dense.

    Raises CalibrationError for no batches, no convertible site, and values that are not finite.
    """
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise CalibrationError(
            "There are no calibration batches; expected at least one. Pass an iterable of what the "
            "model is called with (a generator can be used only once)."
        )
    stream = itertools.chain([first], stream)
    labels: Mapping[tuple[str, ...], Tensor] = {}
    if config.clustering == "coactivation":
        labels, stream = coactive_labels(model, stream, config)
    observer = Calibrating(model, config, progress, labels)
    total = len(batches) if isinstance(batches, Sized) else None
    with probing(model, observer) as call:
        for batch in tqdm(stream, "calibrate", total, disable=not progress, unit="batch"):
            args, kwargs = arguments(batch)
            call(*args, **kwargs)
            observer.batch += 1
    observer.close()
    return list(observer.drafts.values()), observer.dense


class Calibrating:
    """Observer that drafts each site when it is first met, and samples its tokens."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        progress: bool,
        labels: Mapping[tuple[str, ...], Tensor],
    ) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.config = config
        self.labels = labels
        self.progress = progress
        self.drafts: dict[tuple[str, ...], Draft] = {}
        self.left: dict[
            tuple[str, ...], tuple[str, str]
        ] = {}  # name and reason of those kept dense
        self.batch = 0
        self._running: list[Draft | None] = []
        self._unused = set(config.exclude)
        self.strangers: set[str] = set()
        self.storages: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            self.storages.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """Draft new sites of the graph, then run it with its blocks observed."""
        self._note_strangers(graph)
        sites = [found.site for found in graph.matches]
        new = self._new(sites)
        self._budget = self._limit(new)
        for draft in self.drafts.values():
            draft.sample.restrict(self._budget)
        groups = self._groups(graph.matches, new.keys())
        bar = tqdm(new.items(), "cluster", disable=not self.progress or not new, unit="site")
        for key, (site, chosen) in bar:
            with torch.autocast(self._device(site), enabled=False):
                self.drafts[key] = self._draft(self._named(site), chosen, groups[key])
        self._running = [self.drafts.get(key_of(site)) for site in sites]
        return observed(graph).forward(*args)

    def _new(self, sites: Sequence[Site]) -> dict[tuple[str, ...], tuple[Site, Plan]]:
        """Sites that were not met before, with their plans; those that stay dense are noted."""
        new: dict[tuple[str, ...], tuple[Site, Plan]] = {}
        for site in sites:
            key = key_of(site)
            if key in self.left or key in self.drafts or key in new:
                continue
            found = self._kept_dense(site) or plan(site, self.config)
            if isinstance(found, str):
                self.left[key] = self._named(site).name, found
            else:
                new[key] = site, found
        return new

    @property
    def dense(self) -> dict[str, str]:
        """{site name: reason} of the sites that stay dense."""
        return dict(self.left.values())

    def _named(self, site: Site) -> Site:
        taken = {draft.site.name for draft in self.drafts.values()} | self.dense.keys()
        return with_own_name(site, taken)

    def _groups(
        self, matches: Sequence[Match], new: Set[tuple[str, ...]]
    ) -> dict[tuple[str, ...], tuple[str, ...]]:
        """The group of each new site: one of projections of a graph with the same x, else each its own.

        A feed-forward block that reads it too keeps a router of its own, which costs it little: 2 % of its
        arithmetic, against 18 % of a projection's.
        """
        share = self.config.share_routers and self.config.router != "centroid"
        wanted = (m for m in matches if key_of(m.site) in new and m.site.role is not None and share)
        fresh = list(wanted)
        firsts = zip(fresh, same_inputs(fresh), strict=True)
        own = {key: key for key in new}
        return own | {key_of(m.site): key_of(fresh[first].site) for m, first in firsts}

    def _note_strangers(self, graph: Graph) -> None:
        """Remember weights that a graph reads outside of matched blocks: another graph may match them."""
        matched = {name for found in graph.matches for name in found.site.tensors.values()}
        captured = graph.captured
        read = (captured.name(node) for node in captured.tensors if node.users)
        self.strangers |= set(read) - matched

    def _device(self, site: Site) -> str:
        return self.parameters[site.params["down"]].device.type

    def _kept_dense(self, site: Site) -> str:
        """Why a site stays dense that could be divided, or ""."""
        return self._excluded(site) or self._unnamed(site) or self._shared_memory(site)

    def _excluded(self, site: Site) -> str:
        """Which pattern of Config.exclude a site's name fits, or ""."""
        fitting = excluding(self._named(site).name, self.config)
        self._unused.difference_update(fitting)
        return f"Config.exclude has {fitting[0]!r}" if fitting else ""

    def _unnamed(self, site: Site) -> str:
        """Why a site stays dense whose weights are no parameters of the model, or ""."""
        for name in site.tensors.values():
            if name not in self.parameters:
                return f"{name} is no parameter of the model, which keeps its module apart"
        return ""

    def _shared_memory(self, site: Site) -> str:
        """Why a site stays dense whose memory belongs to further parameters, or ""."""
        own = {id(self.parameters[name]) for name in site.tensors.values()}
        for name in site.tensors.values():
            storage = self.parameters[name].untyped_storage().data_ptr()
            for other in self.storages.get(storage, ()):
                if id(self.parameters[other]) not in own and overlaps(
                    self.parameters[name], self.parameters[other]
                ):
                    return f"{name} shares memory with {other}"
        return ""

    def seen(self, index: int, x: Tensor, hidden: Tensor) -> None:
        """Sample one block's tokens: x [..., D] and hidden [..., H]."""
        draft = self._running[index]
        if draft is None:
            return
        with torch.autocast(hidden.device.type, enabled=False):
            self._sample(draft, x, hidden)

    def _sample(self, draft: Draft, x: Tensor, hidden: Tensor) -> None:
        rows, values = x.reshape(-1, x.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        parts = values.index_select(1, draft.order.to(values.device))
        parts = parts.view(len(values), draft.plan.experts, draft.plan.expert_size)
        targets = targets_of(self.config.router, parts, draft.gram)
        if not (rows.isfinite().all() and targets.isfinite().all()):
            raise CalibrationError(
                f"Batch {self.batch} of the calibration data gives NaN or infinity at site "
                f"{draft.site.name!r}; expected finite values. Check that batch, and that the dense "
                "model is sound in this dtype."
            )
        draft.sample.add(rows, targets)

    def _limit(self, new: Mapping[tuple[str, ...], tuple[Site, Plan]]) -> int:
        """Tokens to keep per site so that all, of this graph and of earlier ones, stay within the memory."""
        sites = [(draft.site, draft.plan) for draft in self.drafts.values()] + list(new.values())
        per_row = 4 * max((site.d_model for site, _ in sites), default=1)
        per_row += 4 * max((chosen.experts for _, chosen in sites), default=1)
        kept = 1.5 * max(len(sites), 1) * per_row  # Sample keeps 1.5 limits
        return max(
            1, min(self.config.calibration_tokens, int(self.config.calibration_bytes / kept))
        )

    def _draft(self, site: Site, chosen: Plan, group: tuple[str, ...]) -> Draft:
        weights = {role: self.parameters[name].detach() for role, name in site.tensors.items()}
        views = slabs(site, weights)
        features = views["w_gate"] if site.kind == "glu" else views["w_up"]
        if self.config.clustering == "random":
            labels = random_split(site.d_hidden, chosen.experts, seed=self.config.seed)
        elif self.config.clustering == "coactivation":
            labels = labels_or_weights(
                self.labels, site, features, chosen.experts, self.config.seed
            )
        else:
            labels = balanced_kmeans(features, chosen.experts, seed=self.config.seed).labels
        order = permutation(labels).cpu()
        down = views["w_down"][order.to(views["w_down"].device)]
        generator = torch.Generator().manual_seed(self.config.seed + len(self.drafts))
        centroids = None
        if self.config.router == "centroid":
            ordered = features.float()[order.to(features.device)]
            centroids = ordered.view(chosen.experts, chosen.expert_size, -1).mean(1).cpu()
        return Draft(
            site,
            chosen,
            order,
            gram(down.view(chosen.experts, chosen.expert_size, -1)),
            Sample(self._budget, generator),
            centroids,
            group,
        )

    def close(self) -> None:
        """Leave sites dense that no token reached; raise if none is left; warn about too few tokens."""
        for key, draft in list(self.drafts.items()):
            elsewhere = sorted(self.strangers & set(draft.site.tensors.values()))
            reason = ""
            if elsewhere:
                reason = f"{elsewhere[0]} is also read outside of the block"
            elif not draft.sample.seen:
                reason = "no calibration token reached it"
            if reason:
                self.left[key] = draft.site.name, reason
                del self.drafts[key]
        if self._unused:
            names = [*(d.site.name for d in self.drafts.values()), *self.dense]
            raise ConfigError(
                f"Config.exclude has {sorted(self._unused)[0]!r}, which is the name of no site; expected "
                f"patterns of: {', '.join(names) or 'none, as no block matched'}."
            )
        if not self.drafts:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.dense.items())
            raise CalibrationError(
                f"The model ran without a convertible site ({reasons or 'none matched'}); expected at "
                "least one feed-forward block. d2dcompile.explain(model, ...) says why."
            )
        few = [
            d for d in self.drafts.values() if d.sample.seen < TOKENS_PER_EXPERT * d.plan.experts
        ]
        if few:
            worst = min(few, key=lambda draft: draft.sample.seen)
            warnings.warn(
                f"Site {worst.site.name!r} saw {worst.sample.seen} calibration tokens for "
                f"{worst.plan.experts} experts; expected {TOKENS_PER_EXPERT} per expert or more. "
                "Its router will predict poorly for tau > 0; pass more batches.",
                CalibrationWarning,
                stacklevel=5,
            )
