"""measure: what a converted model executes at its present tau, per site and in all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .attachment import states
from .capture import unwrap
from .errors import CalibrationError, NoConversionError
from .passes.forms import Choice
from .passes.share_routing import Shares
from .probe import Graph, arguments, countable, flop_counter, insert_observer, probing
from .recognising import state_of
from .rewriting import Rewritten, rewrite_captured, shared
from .state import State


@dataclass
class SiteStats:
    """What one site executed: (token, expert) pairs and multiply-adds, and its dense figures.

    Attributes:
        executed: share of (token, expert) pairs that ran, 0..1.
        macs, dense_macs: multiply-adds with its router, and of the dense block.
        bytes, dense_bytes: weights read: slabs that some token of a call chose, and the router.

    A first router layer that sites share counts for the first of them in the graph, in full, and for the
    others not at all.
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
    """Observer that runs graphs with their experts and counts what they execute.

    Attributes:
        stats: the counts so far.
        flops: whether everything outside of the sites is counted too, which costs time.
        dense: whether graphs run dense instead, and count nothing.
    """

    def __init__(self, flops: bool = True) -> None:
        self.stats = Stats()
        self.flops = flops
        self.dense = False
        self._running: list[State] = []
        self._shares = Shares((), ())

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """Run the graph as the backend would, uncompiled, and count its multiply-adds."""
        if self.dense:
            return graph.gm.forward(*args)
        found = [state_of(match, None) for match in graph.matches]
        converted = tuple(i for i, state in enumerate(found) if state is not None)
        self._running = [state for state in found if state is not None]
        for state in self._running:
            state.check()
        choices = tuple(state.choice for state in self._running)
        self._shares = shared([graph.matches[i] for i in converted], self._running)
        rewritten: Rewritten = graph.variant(
            (converted, choices, self._shares),
            lambda: _counting(graph, converted, choices, self._shares),
        )
        extra = [
            tensor
            for i, state in enumerate(self._running)
            for tensor in state.operands()[int(self._shares.follows(i)) :]
        ]
        if not self.flops:
            return rewritten.gm.forward(*args, *extra)
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
        first_layer = 0 if self._shares.follows(index) else site.d_model
        router = plan.router_width * (first_layer + plan.experts)
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


def _counting(
    graph: Graph, converted: tuple[int, ...], choices: Sequence[Choice], shares: Shares
) -> Rewritten:
    """The graph with its converted matches rewritten, handing x and offsets to the observer."""
    matches = [graph.matches[i] for i in converted]
    chosen = {found.site.name: choice for found, choice in zip(matches, choices, strict=True)}
    rewritten = rewrite_captured(graph.captured, matches, choices=chosen, shares=shares)
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
    with counting(model) as (call, stats):
        for batch in batches:
            args, kwargs = arguments(batch)
            call(*args, **kwargs)
    if not stats.batches:
        raise CalibrationError("There are no batches to measure; expected at least one.")
    return stats


@contextmanager
def counting(model: nn.Module) -> Iterator[tuple[Callable[..., Any], Stats]]:
    """The model at its present tau as a function, and what it executed: outputs and costs of the same pass.

    The function takes a batch's arguments and runs experts chosen by the real routers, uncompiled, in eval
    mode without gradients. The stats count its calls as batches, and are complete when the block ends.
    Errors as `measure`.
    """
    attached = states(model)
    if not attached:
        raise NoConversionError(
            f"This {type(unwrap(model)).__name__} has no attached conversion; expected one. Call "
            "convert(model, batches) or load(folder).attach(model) first."
        )
    observer = Measuring()
    stats = observer.stats
    with probing(model, observer) as run:

        def call(*args: Any, **kwargs: Any) -> Any:
            stats.batches += 1
            return run(*args, **kwargs)

        yield call, stats
    inside = {id(state.weight(role)) for state in attached for role in state.site.params}
    others = sum(
        p.numel() * p.element_size() for p in unwrap(model).parameters() if id(p) not in inside
    )
    sites = stats.sites.values()
    stats.bytes = stats.batches * others + sum(site.bytes for site in sites)
    stats.dense_bytes = stats.batches * others + sum(site.dense_bytes for site in sites)


def dense_macs(model: nn.Module, batch: Any) -> int:
    """Multiply-adds of the plain model on one batch: matrix products and convolutions, nothing else.

    batch: as one of `convert`. Nothing is read from tensors, so with model and batch on torch's meta
    device it takes seconds at any size. Attention scores and values count in full under a causal mask, and
    padding counts, as in the D2DMoE code; that one (fvcore's counter) adds one per element of element-wise
    operations, two of softmax, and the width of each embedding looked up.
    """
    args, kwargs = arguments(batch)
    with torch.no_grad(), flop_counter() as counter:
        unwrap(model)(*args, **kwargs)
    return int(counter.get_total_flops()) // 2
