"""finetune: train a converted model, its experts and its routers, at the taus that it is to run at.

Only the chosen experts of a token run, as in use, so that what is trained is what will be served. Routers
are parameters of the handle, in no state_dict; their gradients are those of `d2dcompile.kernels.credit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attachment import attached
from .capture import unwrap
from .errors import CalibrationError, FinetuneError
from .explaining import observed
from .ir import Conversion, Experts
from .judging import judge
from .layout import hashes_of, permuted, slabs
from .probe import Graph, arguments, forget_compiled, probing
from .recognising import state_of
from .router import Router, goal_of, gram
from .routers import make_routers, targets_of
from .sample import Sample
from .state import Learning, State
from .stepping import Clock

ROUTERS = {"fit": (0.0, 1.0), "task": (1.0, 0.0), "both": (1.0, 1.0), "fixed": (0.0, 0.0)}
STALE = (  # figures of a fit to older weights, as far as they stand before an "@"
    "r2", "loss", "tokens", "epoch", "epochs", "recall", "iou", "exact_share",
    "pearson", "spearman", "row_pearson", "row_spearman",
)  # fmt: skip


class Finetuning:
    """A converted model in training: `parameters`, and `close`, also as a context. Made by `finetune`.

    Attributes:
        conversion: what to save; that of the new weights after `close`.
        steps: optimizer steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        conversion: Conversion,
        sites: list[State],
        aims: tuple[float, float],
        router_lr: float | None,
    ) -> None:
        self.model = model
        self.conversion = conversion
        self.steps = 0
        self._sites = sites
        firsts: dict[tuple[int, torch.device], nn.Parameter] = {}  # what sites share stays shared
        for state in sites:
            device = state.weight("down").device
            router1, router2 = state.routers
            key = id(router1), device
            if key not in firsts:
                firsts[key] = _parameter(router1, device)
            first, second = firsts[key], _parameter(router2, device)
            exponent = state.experts.stats.get("exponent", 1.0)
            state.release()
            state.learning = Learning(first, second, torch.tensor([*aims, exponent], device=device))
        self._optimizer = None if router_lr is None or not any(aims) else self._adam(router_lr)
        self._clock = Clock(model, self._tick)

    @property
    def routers(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """{site name: (router1 [R, D], router2 [E, R])} fp32; empty after `close`.

        Sites that share their first router layer hold one parameter router1.
        """
        held = {s.site.name: s.learning for s in self._sites}
        return {name: (o.router1, o.router2) for name, o in held.items() if o is not None}

    def parameters(self) -> list[nn.Parameter]:
        """The routers, for an optimizer of one's own, with router_lr=None."""
        held = [parameter for pair in self.routers.values() for parameter in pair]
        return list({id(parameter): parameter for parameter in held}.values())

    def close(self, batches: Iterable[Any] | None = None, refit: bool = False) -> Conversion:
        """End the training: record what weights and routers are now, and return the new conversion.

        batches: as for `convert`; the routers are judged on them, so that the figures and the executed
        shares that kernels expect are of the new weights. Without, shares stay those of before.
        refit: make the routers anew on these batches, as `convert` does.

        Graphs compiled before are compiled again. A second call changes nothing. Raises CalibrationError
        for refit without batches, and for batches that reach no converted site; FinetuneError for refit of
        routers made of centroids, which are fitted to nothing.
        """
        if not self.routers:
            return self.conversion
        if refit and self.conversion.config.router == "centroid":
            raise FinetuneError(
                "close(refit=True) of routers made of centroids; expected refit=False. Run convert() "
                "again for the centroids of the new weights."
            )
        if refit and batches is None:
            raise CalibrationError(
                "close(refit=True) has no batches; expected some, as for convert."
            )
        samples = self._samples(batches) if batches is not None else {}
        renewed = {}
        for index, group in self._groups():
            named = [state.site.name for state in group]
            found = self._routers(
                group, [samples[n].rows() for n in named if n in samples], refit, index
            )
            for state, router in zip(group, found, strict=True):
                renewed[state.site.name] = self._recorded(state, router)
        self._clock.stop()
        for state in self._sites:
            state.renew(renewed[state.site.name])
        self.conversion = replace(self.conversion, experts={**self.conversion.experts, **renewed})
        forget_compiled()
        return self.conversion

    def __enter__(self) -> Finetuning:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adam(self, rate: float) -> torch.optim.Optimizer:
        """Adam whose rate is relative to how large a router's weights are."""
        return torch.optim.Adam(
            [
                {"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())}
                for p in self.parameters()
            ]
        )

    def _tick(self) -> None:
        self.steps += 1
        if self._optimizer is None:
            return
        _share_gradients(self.parameters())
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if grads and all(bool(g.isfinite().all()) for g in grads):
            self._optimizer.step()
        self._optimizer.zero_grad()

    def _samples(self, batches: Iterable[Any]) -> dict[str, Sample]:
        """Router inputs and exact norms of every site on the batches."""
        observer = _Targets(self.conversion)
        with probing(self.model, observer) as call:
            for batch in batches:
                args, kwargs = arguments(batch)
                call(*args, **kwargs)
        missing = [s.site.name for s in self._sites if s.site.name not in observer.samples]
        if missing:
            raise CalibrationError(
                f"The batches reach no token of site {missing[0]!r}; expected some at every site."
            )
        return observer.samples

    def _groups(self) -> list[tuple[int, list[State]]]:
        """The sites by the first router layer that they hold, with the number of the first of each."""
        groups: dict[int, tuple[int, list[State]]] = {}
        for index, state in enumerate(self._sites):
            groups.setdefault(id(state.routers[0]), (index, []))[1].append(state)
        return list(groups.values())

    def _routers(
        self, group: list[State], rows: list[tuple[Tensor, Tensor]], refit: bool, index: int
    ) -> list[Router]:
        """The routers of sites that share a first layer, as they are now or made anew, with their figures.

        rows: x and targets of each site, or nothing.
        """
        if refit:
            config, plan = self.conversion.config, group[0].experts.plan
            nothing = [None] * len(group)
            return make_routers(rows, nothing, plan.router_width, config, config.seed + index)
        first, found = group[0].routers[0].detach().cpu().clone(), []
        for i, state in enumerate(group):
            known = state.experts.stats.items()
            stats = {k: v for k, v in known if k.partition("@")[0] not in STALE}
            router = Router(first, state.routers[1].detach().cpu().clone(), stats)
            if rows:
                (x, targets), routed = rows[i], ~state.experts.shared
                scores = Router(first, router.w2[routed], {})(x)
                kind = self.conversion.config.router
                goal = goal_of(targets[:, routed], stats.get("exponent", 1.0), kind == "classify")
                stats |= judge(scores, goal) | {"tokens": float(len(x))}
                if kind == "centroid":
                    del stats["r2"]  # the scores have another unit than the norms
            found.append(router)
        return found

    def _recorded(self, state: State, router: Router) -> Experts:
        """A site's experts with this router and hashes of the weights as they are now."""
        weights = {role: state.weight(role).detach() for role in state.site.tensors}
        back = torch.argsort(state.experts.permutation)
        dense = {role: permuted(state.site, role, w, back) for role, w in weights.items()}
        hashes = hashes_of(state.site, dense, state.experts.permutation)
        return replace(
            state.experts, router1=router.w1, router2=router.w2, hashes=hashes, stats=router.stats,
            rule=state.rule, tau=state.tau,
        )  # fmt: skip


def _parameter(router: Tensor, device: torch.device) -> nn.Parameter:
    """A copy that learns."""
    return nn.Parameter(router.detach().to(device, torch.float32, copy=True))


def _share_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over all processes of a distributed run; routers are no part of what DDP averages."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    processes = distributed.get_world_size()
    if processes == 1:
        return
    for parameter in parameters:
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        distributed.all_reduce(grad)
        parameter.grad = grad / processes


class _Targets:
    """Observer that samples what routers see and what they are to predict, graphs running dense."""

    def __init__(self, conversion: Conversion) -> None:
        self.samples: dict[str, Sample] = {}
        self._config = conversion.config
        self._running: list[State | None] = []
        self._grams: dict[str, Tensor] = {}

    def run(self, graph: Graph, args: Any) -> Any:
        """Run the graph with its blocks observed."""
        self._running = [state_of(found, None) for found in graph.matches]
        return observed(graph).forward(*args)

    def seen(self, index: int, x: Tensor, hidden: Tensor) -> None:
        """Sample one block's tokens: x [..., D] and hidden [..., H], in expert order."""
        state = self._running[index]
        if state is None:
            return
        name, plan = state.site.name, state.experts.plan
        if name not in self._grams:
            weights = {role: state.weight(role).detach() for role in state.site.tensors}
            down = slabs(state.site, weights)["w_down"]
            self._grams[name] = gram(down.reshape(plan.experts, plan.expert_size, -1))
            generator = torch.Generator().manual_seed(self._config.seed + len(self.samples))
            self.samples[name] = Sample(self._config.calibration_tokens, generator)
        parts = hidden.reshape(-1, plan.experts, plan.expert_size)
        targets = targets_of(self._config.router, parts, self._grams[name])
        self.samples[name].add(x.reshape(-1, x.shape[-1]), targets)


def finetune(
    model: nn.Module,
    conversion: Conversion,
    *,
    routers: str = "fit",
    router_lr: float | None = 1e-3,
) -> Finetuning:
    """Let a converted model be trained at its present taus, until the handle is closed.

        with d2d.finetune(model, conversion) as tuning:
            fast = torch.compile(model, backend="d2dmoe")
            ...                                        # any loop that trains `fast`
        tuning.conversion.save(folder)

    Forward passes run the chosen experts only, in training too; gradients go to their weights and to the
    routers. Weights may change meanwhile without an error; `close` records the new ones. Tau may be
    changed at any time, for example annealed by `set_tau`. Graphs compiled before are compiled again.

    Args:
        conversion: what is attached to the model.
        routers: what their gradient is of. "fit": the loss they were fitted with, against exact norms of
            the experts as they change, of every expert of every token. "task": the loop's own loss, by a
            straight-through gradient of the executed pairs. "both": their sum, so let the loop's loss
            be neither scaled (GradScaler) nor divided (accumulation). "fixed": none.
        router_lr: rate of an Adam of the handle's own, relative to the size of a router's weights, which
            steps whenever the loop's optimizer has, with gradients averaged over the processes of a
            distributed run. None: the loop trains `handle.parameters()` itself.

    Raises NoConversionError if nothing is attached, FinetuneError for other arguments that are impossible
    (only routers of the kind "norms" can "fit"; shared experts need "fixed"), a conversion that is not the
    attached one, and a model that is being fine-tuned already.
    Source: the paper trains experts and routers apart (Szatkowski et al. 2024, section 3); this is not in it.
    """
    if routers not in ROUTERS:
        raise FinetuneError(f"routers is {routers!r}; expected one of {', '.join(ROUTERS)}.")
    if router_lr is not None and not (0 < router_lr < math.inf):
        raise FinetuneError(f"router_lr is {router_lr!r}; expected a finite number > 0, or None.")
    task, fit = ROUTERS[routers]
    if fit and conversion.config.router != "norms":
        raise FinetuneError(
            f"routers is {routers!r}, which follows the experts' norms; these were made as "
            f'{conversion.config.router!r}. Expected "task" or "fixed".'
        )
    sites = attached(model)
    for state in sites:
        if (task or fit) and bool(state.experts.shared.any()):
            raise FinetuneError(
                f"Site {state.site.name!r} has shared experts, whose rows of the router are no numbers to "
                'train; expected routers="fixed", or a conversion without shared_experts.'
            )
        if conversion.experts.get(state.site.name) is not state.experts:
            raise FinetuneError(
                f"Site {state.site.name!r} is attached from another conversion than the one given; "
                "expected what convert() returned or load(folder).attach(model) attached."
            )
        if state.learning is not None:
            raise FinetuneError(
                f"Site {state.site.name!r} is being fine-tuned already; expected one handle at a time. "
                "Call close() of the other one."
            )
        state.check()
    forget_compiled()
    return Finetuning(unwrap(model), conversion, sites, ROUTERS[routers], router_lr)
