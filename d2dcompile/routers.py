"""The routers that Config.router names: what each is fitted to, and how it is made.

    norms     two layers fitted to the norms of the experts' outputs (the paper's; d2dcompile.router)
    classify  two layers fitted to the experts' sums of |hidden values| by cross-entropy (MoEfication's,
              whose ReLU values are their own absolute values)
    centroid  untrained: scores = relu(x c_e / |c_e|), c_e the mean row of the expert's up or gate weights:
              |x| times the cosine, at least 0, which rules compare as they would the cosine. The router's
              width is E, its second layer the identity; a token with no positive cosine runs everything.

Shared experts (Config.shared_experts) are those of the largest mean target. The others' router is made as
if they were not there; theirs is a row of NaN in the second layer, which the gate never drops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import Config
from .router import Router, expert_norms, fit_routers, validated


def targets_of(kind: str, hidden: Tensor, gram: Tensor) -> Tensor:
    """What a router of this kind is fitted to, [T, E] fp32, of hidden [T, E, F] after the activation."""
    if kind == "classify":
        return hidden.detach().abs().sum(-1, dtype=torch.float32)
    return expert_norms(hidden, gram)


def make_routers(
    samples: Sequence[tuple[Tensor, Tensor]],
    centroids: Sequence[Tensor | None],
    width: int,
    config: Config,
    seed: int,
) -> list[Router]:
    """The routers of sites that share their first layer, or of one site; shared experts as NaN.

    samples: per site its tokens x [T, D] and their targets [T, E]; centroids: per site [E, D], mean up- or
    gate-rows, for "centroid". Raises CalibrationError as `fit_routers` does.
    """
    routed, wanted = [], []
    for x, targets in samples:
        ones = torch.ones(targets.shape[1], dtype=torch.bool, device=targets.device)
        most = targets.float().mean(0).topk(config.shared_experts).indices
        routed.append(ones.index_fill(0, most, False))
        wanted.append((x, targets[:, routed[-1]] if config.shared_experts else targets))
    if config.router == "centroid":
        found = [
            _by_centroids(x, goal, c.to(x.device), kept)
            for (x, goal), c, kept in zip(wanted, centroids, routed, strict=True)
            if c is not None
        ]
    else:
        found = fit_routers(
            wanted,
            width=width,
            seed=seed,
            epochs=config.router_epochs,
            patience=config.router_patience,
            classify=config.router == "classify",
        )
    if not config.shared_experts:
        return found
    return [_filled(router, kept) for router, kept in zip(found, routed, strict=True)]


def _filled(router: Router, routed: Tensor) -> Router:
    """A router of the routed experts with rows of NaN for the others."""
    w2 = router.w2.new_full((len(routed), router.w2.shape[1]), torch.nan)
    w2[routed] = router.w2
    return Router(router.w1, w2, router.stats)


def _by_centroids(x: Tensor, goal: Tensor, centroids: Tensor, routed: Tensor) -> Router:
    w1 = torch.nn.functional.normalize(centroids.float(), dim=-1).contiguous()
    w2 = torch.eye(len(w1), device=w1.device)[routed]
    router = Router(w1, w2, {})
    stats = {"exponent": 1.0, "tokens": float(len(x)), **validated(router, x, goal)}
    del stats["r2"]  # the scores have another unit than the norms
    return Router(w1, w2, stats)
