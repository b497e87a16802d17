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

import torch
from torch import Tensor

from .config import Config
from .router import Router, expert_norms, fit_router, validated


def targets_of(kind: str, hidden: Tensor, gram: Tensor) -> Tensor:
    """What a router of this kind is fitted to, [T, E] fp32, of hidden [T, E, F] after the activation."""
    if kind == "classify":
        return hidden.detach().abs().sum(-1, dtype=torch.float32)
    return expert_norms(hidden, gram)


def make_router(
    x: Tensor, targets: Tensor, centroids: Tensor | None, width: int, config: Config, seed: int
) -> Router:
    """The router of one site, from its tokens x [T, D] and their targets [T, E]; shared experts as NaN.

    centroids [E, D]: mean up- or gate-rows, for "centroid". Raises CalibrationError as `fit_router` does.
    """
    experts = targets.shape[1]
    shared = targets.float().mean(0).topk(config.shared_experts).indices
    routed = torch.ones(experts, dtype=torch.bool, device=targets.device).index_fill(
        0, shared, False
    )
    goal = targets if not config.shared_experts else targets[:, routed]
    if centroids is None:
        found = fit_router(
            x,
            goal,
            width=width,
            seed=seed,
            epochs=config.router_epochs,
            patience=config.router_patience,
            classify=config.router == "classify",
        )
    else:
        found = _by_centroids(x, goal, centroids.to(x.device), routed)
    if not config.shared_experts:
        return found
    w2 = found.w2.new_full((experts, found.w2.shape[1]), torch.nan)
    w2[routed] = found.w2
    return Router(found.w1, w2, found.stats)


def _by_centroids(x: Tensor, goal: Tensor, centroids: Tensor, routed: Tensor) -> Router:
    w1 = torch.nn.functional.normalize(centroids.float(), dim=-1).contiguous()
    w2 = torch.eye(len(w1), device=w1.device)[routed]
    router = Router(w1, w2, {})
    stats = {"exponent": 1.0, "tokens": float(len(x)), **validated(router, x, goal)}
    del stats["r2"]  # the scores have another unit than the norms
    return Router(w1, w2, stats)
