"""measure and fit_tau: what a converted model executes at its present tau, and which tau fits a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from .attachment import set_tau, states
from .capture import unwrap
from .errors import BudgetError, CalibrationError, NoConversionError
from .probe import Graph, arguments, countable, flop_counter, insert_observer, probing
from .rewriting import Rewritten, rewrite_captured, state_of
from .state import State

TOLERANCE = 0.003  # of the budget's unit, a share of 1; below the noise of any real stream
EVALUATIONS = 24  # enough to bisect 0..1 to 1e-7


@dataclass
class SiteStats:
    """What one site executed: (token, expert) pairs and multiply-adds, and its dense figures.

    Attributes:
        executed: share of (token, expert) pairs that ran, 0..1.
        macs, dense_macs: multiply-adds with its router, and of the dense block.
        bytes, dense_bytes: weights read: slabs that some token of a call chose, and the router.
    """

    pairs: int = 0
    possible: int = 0
    macs: int = 0
    dense_macs: int = 0
    bytes: int = 0
    dense_bytes: int = 0

    @property
    def executed(self) -> float:
        return self.pairs / self.possible if self.possible else 1.0


@dataclass
class Stats:
    """What `measure` found, summed over all batches.

    Attributes:
        sites: {site name: SiteStats}.
        macs, dense_macs: multiply-adds of the whole model, routers included, and of the dense model.
        bytes, dense_bytes: weight bytes read, every other parameter counted once per batch.
        batches: how many batches ran.
    """

    sites: dict[str, SiteStats] = field(default_factory=dict)
    macs: int = 0
    dense_macs: int = 0
    bytes: int = 0
    dense_bytes: int = 0
    batches: int = 0

    @property
    def executed(self) -> float:
        """Share of (token, expert) pairs that ran over all sites, 0..1."""
        possible = sum(site.possible for site in self.sites.values())
        return sum(site.pairs for site in self.sites.values()) / possible if possible else 1.0

    def __str__(self) -> str:
        lines = [f"{name:<40} executed {s.executed:6.1%}" for name, s in self.sites.items()]
        ratio = self.macs / max(self.dense_macs, 1)
        lines.append(f"executed {self.executed:.1%}; {ratio:.1%} of the dense multiply-adds")
        return "\n".join(lines)


class Measuring:
    """Observer that runs graphs with their experts and counts what they execute."""

    def __init__(self) -> None:
        self.stats = Stats()
        self._running: list[State] = []

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """Run the graph as the backend would, uncompiled, and count its multiply-adds."""
        found = [state_of(match, None) for match in graph.matches]
        converted = tuple(i for i, state in enumerate(found) if state is not None)
        self._running = [state for state in found if state is not None]
        for state in self._running:
            state.check()
        rewritten: Rewritten = graph.variant(converted, lambda: _counting(graph, converted))
        extra = [tensor for state in self._running for tensor in state.operands()]
        with flop_counter() as counter:
            result = rewritten.gm.forward(*args, *extra)
        macs = counter.get_total_flops() // 2
        self.stats.macs += macs
        self.stats.dense_macs += macs
        return result

    def seen(self, index: int, x: Tensor, offsets: Tensor) -> None:
        """Count one block: its rows x [..., D] and where its experts' token lists end."""
        state = self._running[index]
        site, plan = state.site, state.experts.plan
        counts = offsets.diff()
        rows, pairs = x.numel() // site.d_model, int(counts.sum())
        first = 2 if site.kind == "glu" else 1  # matrices before the activation
        slab = (first * site.d_model + site.d_out) * plan.expert_size
        router = plan.router_width * (site.d_model + plan.experts)
        width = state.weight("down").element_size()
        stats = self.stats.sites.setdefault(site.name, SiteStats())
        macs, dense = pairs * slab + rows * router, rows * plan.experts * slab
        read = (int((counts > 0).sum()) * slab + router) * width
        stats.pairs += pairs
        stats.possible += rows * plan.experts
        stats.macs += macs
        stats.dense_macs += dense
        stats.bytes += read
        stats.dense_bytes += plan.experts * slab * width
        self.stats.dense_macs += dense - macs


def _counting(graph: Graph, converted: tuple[int, ...]) -> Rewritten:
    """The graph with its converted matches rewritten, handing x and offsets to the observer."""
    rewritten = rewrite_captured(graph.captured, [graph.matches[i] for i in converted])
    for index, inserted in enumerate(rewritten.inserted):
        x, graph_of = inserted.output.args[0], inserted.output.graph
        assert isinstance(x, Node) and inserted.offsets is not None
        insert_observer(graph_of, inserted.output, index, x, inserted.offsets)
        assert graph_of.owning_module is not None
        countable(graph_of.owning_module)
    countable(rewritten.gm)
    return rewritten


def measure(model: nn.Module, batches: Iterable[Any]) -> Stats:
    """Executed share, multiply-adds and weight bytes of a converted model at its present tau.

    batches: as for `convert`. Runs them in eval mode without gradients, experts chosen by the real
    routers; multiply-adds are counted by torch's FlopCounterMode with the executed experts only, the
    routers included, inside of captured graphs. Padding tokens count like any other.

    Raises NoConversionError if no conversion is attached, CalibrationError for no batches, and
    WeightsChangedError if weights are no longer those of the conversion.
    """
    attached = states(model)
    if not attached:
        raise NoConversionError(
            f"This {type(unwrap(model)).__name__} has no attached conversion; expected one. Call "
            "convert(model, batches) or load(folder).attach(model) first."
        )
    observer = Measuring()
    stats = observer.stats
    with probing(model, observer) as call:
        for batch in batches:
            args, kwargs = arguments(batch)
            call(*args, **kwargs)
            stats.batches += 1
    if not stats.batches:
        raise CalibrationError("There are no batches to measure; expected at least one.")
    inside = {id(state.weight(role)) for state in attached for role in state.site.params}
    others = sum(
        p.numel() * p.element_size() for p in unwrap(model).parameters() if id(p) not in inside
    )
    sites = stats.sites.values()
    stats.bytes = stats.batches * others + sum(site.bytes for site in sites)
    stats.dense_bytes = stats.batches * others + sum(site.dense_bytes for site in sites)
    return stats


def fit_tau(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float | None = None,
    macs: float | None = None,
    quality: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
) -> float:
    """The one tau for all sites that meets a target on the batches; sets it and returns it.

    Give one target: budget, the executed share of (token, expert) pairs; macs, the multiply-adds of
    the whole model as a share of the dense ones; or quality, a floor for `metric(model)` (larger is
    better). The smallest tau within the cost, or the largest that keeps the quality, is found by
    bisection to 0.003 of the target.

    Raises BudgetError if not exactly one target is given or none in 0..1 reaches it; tau is then what
    it was before.
    """
    given = {"budget": budget, "macs": macs, "quality": quality}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1 or (quality is not None) != (metric is not None):
        raise BudgetError(
            f"Seen: {', '.join(chosen) or 'no target'}{' and a metric' if metric else ''}. Expected "
            "exactly one of budget=, macs= (both shares of 1), or quality= together with metric=."
        )
    held = list(batches)
    before: Mapping[str, float] = {state.site.name: state.tau for state in states(model)}
    name, target = next(iter(chosen.items()))

    def excess(tau: float) -> float:
        """How far the cost at tau is above the target; for quality, how far it is above the floor."""
        set_tau(model, tau)
        if metric is not None:
            return float(metric(model)) - target
        stats = measure(model, held)
        return (stats.executed if name == "budget" else stats.macs / stats.dense_macs) - target

    try:
        tau = _largest_above(excess) if metric is not None else _smallest_below(excess)
    except BaseException:
        if before:
            set_tau(model, before)
        raise
    set_tau(model, tau)
    return tau


def _smallest_below(excess: Callable[[float], float]) -> float:
    """The smallest tau whose excess is at most 0, and within the tolerance of it if it can be."""
    low, high = 0.0, 1.0
    if excess(low) <= 0:
        return low
    least = excess(high)
    if least > 0:
        raise BudgetError(
            f"Even tau = 1, the arg-max expert alone, is {least:.3f} above the target. Ask for more, "
            "or convert with more experts per block."
        )
    for _ in range(EVALUATIONS):
        middle = (low + high) / 2
        value = excess(middle)
        if value > 0:
            low = middle
        else:
            high = middle
            if value > -TOLERANCE:
                break
    return high


def _largest_above(excess: Callable[[float], float]) -> float:
    """The largest tau whose excess is at least 0, taking it to fall with tau."""
    low, high = 0.0, 1.0
    least = excess(low)
    if least < 0:
        raise BudgetError(
            f"The quality at tau = 0, the dense model, is {-least:.4f} below the floor. Ask for less."
        )
    if excess(high) >= 0:
        return high
    for _ in range(EVALUATIONS // 2):
        middle = (low + high) / 2
        if excess(middle) >= 0:
            low = middle
        else:
            high = middle
    return low
