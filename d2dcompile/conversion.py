"""convert: dense model and calibration batches to a Conversion, attached to the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from .attachment import attach, detach, kept_on_error
from .calibrate import Draft, calibrate
from .capture import unwrap
from .config import Config
from .ir import Conversion, Experts
from .layout import hashes_of
from .routers import make_router
from .rules import dense_value


def convert(
    model: nn.Module,
    batches: Iterable[Any],
    config: Config | None = None,
    progress: bool = True,
) -> Conversion:
    """Split every feed-forward block of a model into experts, fit their routers, and attach them.

    model: any module that torch.compile captures; its hidden neurons are permuted in place, which
    leaves its function unchanged. batches: what the model is called with, each a mapping of keyword
    arguments, a tuple of arguments or a tensor; streamed once, in eval mode without gradients.
    config: see `Config`; by default from D2D_* variables. progress: show progress bars.

    The same seed, weights and batches give the same conversion. A conversion attached before is
    replaced, and kept if this fails. Raises CalibrationError (no batches, values that are not finite,
    nothing to convert) and PlanError (experts do not divide a hidden size), both before the model is
    touched; warns with CalibrationWarning when there is too little data. Source: Szatkowski et al. 2024,
    arXiv:2310.04361, section 3, with the exact targets of `d2dcompile.calibrate`.
    """
    chosen = config if config is not None else Config.from_env()
    with kept_on_error(model):
        detach(model)
        drafts, dense = calibrate(unwrap(model), batches, chosen, progress)
        experts = {}
        for index, draft in enumerate(tqdm(drafts, "routers", disable=not progress, unit="site")):
            experts[draft.site.name] = _experts(unwrap(model), draft, chosen, index)
        conversion = Conversion(experts, dense, chosen)
        attach(model, conversion)
    return conversion


def _experts(model: nn.Module, draft: Draft, config: Config, index: int) -> Experts:
    """Fit one site's router and record what its weights are."""
    x, targets = draft.sample.rows()
    width, seed = draft.plan.router_width, config.seed + index
    router = make_router(x, targets, draft.centroids, width, config, seed)
    value = config.tau if config.rule == "max" else config.rule_value
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {role: parameters[name] for role, name in draft.site.tensors.items()}
    return Experts(
        site=replace(draft.site),
        plan=draft.plan,
        permutation=draft.order,
        router1=router.w1,
        router2=router.w2,
        tau=float(dense_value(config.rule, draft.plan.experts) if value is None else value),
        rule=config.rule,
        hashes=hashes_of(draft.site, weights, draft.order),
        stats=router.stats,
    )
