"""convert: dense model and calibration batches to a Conversion, attached to the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from .attachment import attach, detach, kept_on_error, recompiled
from .calibrate import Draft, calibrate
from .capture import unwrap
from .config import Config
from .ir import Conversion, Experts
from .layout import hashes_of
from .router import Router
from .routers import make_routers
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

    Gradients are permuted with their weights; what an optimizer or an average of weights keeps is not, so
    make those afterwards. The same seed, weights and batches give the same conversion. A conversion
    attached before is replaced, and kept if this fails. Raises CalibrationError (no batches, values that
    are not finite, nothing to convert), PlanError (experts do not divide a hidden size) and ConfigError (a
    pattern of `exclude` that no site's name fits), all before the model is touched; warns with
    CalibrationWarning when there is too little data. Source: Szatkowski et al. 2024, arXiv:2310.04361,
    section 3, with the exact targets of `d2dcompile.calibrate`.
    """
    chosen = config if config is not None else Config.from_env()
    with recompiled(model), kept_on_error(model):
        detach(model)
        drafts, dense = calibrate(unwrap(model), batches, chosen, progress)
        routers = _routers(drafts, chosen, progress)
        experts = {
            draft.site.name: _experts(unwrap(model), draft, chosen, router)
            for draft, router in zip(drafts, routers, strict=True)
        }
        conversion = Conversion(experts, dense, chosen)
        attach(model, conversion)
    return conversion


def _routers(drafts: Sequence[Draft], config: Config, progress: bool) -> list[Router]:
    """Fit each site's router, of sites that share their first layer together."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, draft in enumerate(drafts):
        groups.setdefault(draft.group, []).append(index)
    found: dict[int, Router] = {}
    with tqdm(total=len(drafts), desc="routers", disable=not progress, unit="site") as bar:
        for indices in groups.values():
            some = [drafts[i] for i in indices]
            made = make_routers(
                [draft.sample.rows() for draft in some],
                [draft.centroids for draft in some],
                some[0].plan.router_width,
                config,
                config.seed + indices[0],
            )
            found.update(zip(indices, made, strict=True))
            bar.update(len(indices))
    return [found[index] for index in range(len(drafts))]


def _experts(model: nn.Module, draft: Draft, config: Config, router: Router) -> Experts:
    """Record one site's router and what its weights are."""
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
