"""explain: which linears of a model would be converted, as what, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .attachment import states
from .capture import Captured, parameter_names, unwrap
from .ir import Miss, Site
from .lowering import running
from .passes import Match
from .passes.canonicalize import View
from .passes.names import op_name
from .passes.reach import TRANSPARENT
from .plan import with_own_name
from .probe import Graph, countable, flop_counter, insert_observer, probing

UNSEEN = "in no captured graph: this call does not run it, or Dynamo skips the code that does"


@dataclass(frozen=True)
class Report:
    """What `explain` found; `str` of it is a table of every linear layer.

    Attributes:
        sites: blocks and projections in execution order, each once however often it runs.
        misses: linear layers outside of them, with node, reason and source line.
        macs: multiply-adds of the explained call, inside of captured graphs.
        graphs: how many graphs Dynamo ran (more than one: graph breaks).
        breaks: why Dynamo broke the model into graphs, each reason once.
        recompiles: how many of the graphs replaced an earlier graph of the same code.
        running: {site name: how it runs} of the sites with an attached conversion: as one kernel or
            as separate ops, dense from how many tokens on, copies of weights, and why.
    """

    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    macs: int
    graphs: int
    breaks: tuple[str, ...] = ()
    recompiles: int = 0
    running: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'site':<44} {'as':<10} {'D':>6} {'H':>6} {'share':>6}  activation"]
        for site in self.sites:
            kind = f"{site.role} proj." if site.kind == "projection" else site.kind
            kind = f"{site.role} mlp" if site.role and site.convertible else kind
            lines.append(
                f"{site.name:<44} {kind:<10} {site.d_model:>6} {site.d_hidden:>6} {site.share:>6.1%}  "
                f"{site.activation}"
            )
        blocks = [site for site in self.sites if site.convertible]
        others = [site for site in self.sites if not site.convertible]
        share, rest = (sum(site.share for site in group) for group in (blocks, others))
        lines.append(
            f"{len(blocks)} blocks hold {share:.1%} of {self.macs / 1e9:.3f} G multiply-adds; "
            f"{len(others)} projections hold {rest:.1%} and are reported only; "
            f"{len(self.misses)} linears stay dense; {self.graphs} graph(s), "
            f"{len(self.breaks)} graph break(s), {self.recompiles} recompilation(s)."
        )
        lines += [f"  graph break: {reason}" for reason in self.breaks]
        lines += [f"  {name}: {text}" for name, text in self.running.items()]
        lines += [f"  {m.share:>6.1%}  {m.where or m.node}: {m.reason}" for m in self.misses]
        return "\n".join(lines)


def observed(graph: Graph) -> GraphModule:
    """The captured graph, handing each block's input and hidden values to the observer."""

    def make() -> GraphModule:
        copies = graph.captured.copies()
        for index, found in enumerate(graph.matches):
            gm, where = copies[id(found.captured)]
            last = found.linears[-1]
            values = [where[found.x], where[last.x]]
            if last.axis not in (None, -1):
                with gm.graph.inserting_before(where[found.root]):
                    values = [
                        gm.graph.call_function(torch.movedim, (v, last.axis, -1)) for v in values
                    ]
            insert_observer(gm.graph, where[found.root], index, values[0], values[1])
        for gm, _ in copies.values():
            gm.recompile()
        return copies[id(graph.captured)][0]

    result: GraphModule = graph.variant("observed", make)
    return result


@dataclass(frozen=True)
class Counted:
    """A linear call whose multiply-adds are counted: numel(x) d_out, under its weight's name."""

    captured: Captured
    node: Node
    x: Node
    weight: str
    d_out: int


def _linears(captured: Captured, matches: Sequence[Match]) -> Iterator[Counted]:
    """Every linear call of a graph and its bodies, those inside of packed attention included."""
    view = View(captured)
    for linear in view.linears.values():
        name = captured.name(linear.weight)
        yield Counted(captured, linear.node, linear.x, name, linear.d_out)
    for match in matches:
        for linear in match.linears:
            if match.captured is captured and linear.node not in view.linears:
                name = captured.name(linear.weight)
                yield Counted(captured, linear.node, linear.x, name, linear.d_out)
    for body in captured.bodies:
        yield from _linears(body.captured, matches)


def _counting(graph: Graph, linears: Sequence[Counted]) -> GraphModule:
    """The captured graph, handing the input of each linear to the observer."""
    copies = graph.captured.copies()
    for index, linear in enumerate(linears):
        gm, where = copies[id(linear.captured)]
        x = where[linear.x]
        insert_observer(gm.graph, where[linear.node], index, x, x)
    for gm, _ in copies.values():
        countable(gm)
    return copies[id(graph.captured)][0]


class Explaining:
    """Observer that records sites, misses and multiply-adds."""

    def __init__(self) -> None:
        self.sites: dict[tuple[str, ...], Site] = {}
        self.misses: dict[tuple[str, str], Miss] = {}
        self.counts: dict[str, int] = {}
        self.macs = 0
        self.graphs = 0
        self.recompiles = 0
        self.breaks: list[str] = []
        self.linears: list[Counted] = []
        self.weights: set[str] = set()

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """Record one graph and run it."""
        self.graphs += 1
        self.recompiles += graph.recompiled
        before = self.breaks[-1] if self.breaks else ""
        for found in graph.found:
            key = tuple(found.site.params.values())
            if key not in self.sites:
                self.sites[key] = with_own_name(
                    found.site, {site.name for site in self.sites.values()}
                )
        self.linears = list(_linears(graph.captured, graph.found))
        self.weights |= {linear.weight for linear in self.linears}
        self.weights |= {miss.weight for miss in graph.misses}
        after = graph.broken.splitlines()[0].strip() if graph.broken else ""
        leaving = {linear.weight for linear in self.linears if after and _leaves(linear.node)}
        for miss in graph.misses:
            named = _at_break(miss, before, after if miss.weight in leaving else "")
            self.misses.setdefault((miss.where or str(miss.node), named.reason), named)
        counting = graph.variant("counting", lambda: _counting(graph, self.linears))
        with flop_counter() as counter:
            result = counting.forward(*args)
        self.macs += counter.get_total_flops() // 2
        if after:
            self.breaks.append(after)
        return result

    def seen(self, index: int, x: Tensor, _: Tensor) -> None:
        """Count the multiply-adds of one linear call."""
        linear = self.linears[index]
        done = x.numel() * linear.d_out
        self.counts[linear.weight] = self.counts.get(linear.weight, 0) + done

    def report(self, model: nn.Module) -> Report:
        """The report of everything seen, and of the model's linear modules that were not."""
        for name in _linear_modules(model):
            if name not in self.weights:
                self.misses[name, UNSEEN] = Miss(None, UNSEEN, name.removesuffix(".weight"), name)

        def share(*weights: str) -> float:
            return sum(self.counts.get(w, 0) for w in set(weights)) / max(self.macs, 1)

        sites = [replace(site, share=share(*site.params.values())) for site in self.sites.values()]
        known = {name for site in sites for name in site.params.values()}
        misses = [m for m in self.misses.values() if not m.weight or m.weight not in known]
        return Report(
            tuple(sites),
            tuple(replace(miss, share=share(miss.weight)) for miss in misses),
            self.macs,
            self.graphs,
            tuple(dict.fromkeys(self.breaks)),
            self.recompiles,
            running={state.site.name: running(state) for state in states(model)},
        )


def _at_break(miss: Miss, before: str, after: str) -> Miss:
    """A miss at the edge of a graph is the fault of the graph break there."""
    if after:
        return replace(miss, reason=f"the graph breaks between it and what reads it: {after}")
    if before and miss.node is not None and miss.node.op == "placeholder":
        return replace(miss, reason=f"the graph breaks between it and what feeds it: {before}")
    return miss


def _leaves(node: Node) -> bool:
    """Whether a linear's output leaves its graph through elementwise calls, norms and reshapes only."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return True
            name = op_name(user)
            if user not in seen and name in TRANSPARENT and name != "add":
                seen.add(user)
                stack.append(user)
    return False


def _linear_modules(model: nn.Module) -> list[str]:
    """Names of the weights of linear modules; of tied ones the first."""
    names = parameter_names(model)
    modules = (m for m in model.modules() if isinstance(m, nn.Linear))
    weights = (getattr(module, "weight", None) for module in modules)
    return list(dict.fromkeys(names[id(w)] for w in weights if id(w) in names))


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """What each linear of `model(*args, **kwargs)` would be converted as, and why not the others.

    Runs the model once, in eval mode without gradients, through its captured graphs; parameters, mode
    and random state are left as they were. Shares are fractions of the multiply-adds of that call,
    counted by torch's FlopCounterMode. Raises whatever the model raises.
    """
    observer = Explaining()
    with probing(model, observer) as call:
        call(*args, **kwargs)
    return observer.report(unwrap(model))
