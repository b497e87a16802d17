"""explain: which linears of a model would be converted, as what, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from .ir import Miss, Site
from .probe import Graph, flop_counter, insert_observer, probing


@dataclass(frozen=True)
class Report:
    """What `explain` found; `str` of it is a table.

    Attributes:
        sites: convertible blocks in execution order, each once however often it runs.
        misses: linear layers outside of them, with node, reason and source line.
        macs: multiply-adds of the explained call, inside of captured graphs.
        graphs: how many graphs Dynamo ran (more than one: graph breaks).
    """

    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    macs: int
    graphs: int

    def __str__(self) -> str:
        lines = [f"{'site':<40} {'kind':<5} {'D':>6} {'H':>6} {'share':>6}  activation"]
        lines += [
            f"{s.name:<40} {s.kind:<5} {s.d_model:>6} {s.d_hidden:>6} {s.share:>6.1%}  {s.activation}"
            for s in self.sites
        ]
        share = sum(site.share for site in self.sites)
        lines.append(
            f"{len(self.sites)} sites hold {share:.1%} of {self.macs / 1e9:.3f} G multiply-adds; "
            f"{len(self.misses)} linears stay dense; {self.graphs} graph(s)."
        )
        lines += [f"  {miss.where or miss.node.name}: {miss.reason}" for miss in self.misses]
        return "\n".join(lines)


def observed(graph: Graph) -> GraphModule:
    """The captured graph, handing each block's input and hidden values to the observer."""

    def make() -> GraphModule:
        gm, where = graph.captured.copy()
        for index, found in enumerate(graph.matches):
            hidden = found.linears[-1].x
            insert_observer(gm.graph, where[found.root], index, where[found.x], where[hidden])
        gm.recompile()
        return gm

    result: GraphModule = graph.variant("observed", make)
    return result


class Explaining:
    """Observer that records sites, misses and multiply-adds."""

    def __init__(self) -> None:
        self.sites: dict[tuple[str, ...], Site] = {}
        self.misses: dict[tuple[str, str], Miss] = {}
        self.site_macs: dict[tuple[str, ...], int] = {}
        self.macs = 0
        self.graphs = 0
        self.keys: list[tuple[str, ...]] = []

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """Record one graph and run it."""
        self.graphs += 1
        self.keys = [tuple(found.site.params.values()) for found in graph.matches]
        for key, found in zip(self.keys, graph.matches, strict=True):
            self.sites.setdefault(key, found.site)
        for miss in graph.misses:
            self.misses.setdefault((miss.where or miss.node.name, miss.reason), miss)
        with flop_counter() as counter:
            result = observed(graph).forward(*args)
        self.macs += counter.get_total_flops() // 2
        return result

    def seen(self, index: int, x: Tensor, hidden: Tensor) -> None:
        """Count the multiply-adds of one block."""
        site = self.sites[self.keys[index]]
        rows = x.numel() // site.d_model
        matrices = 3 if site.kind == "glu" else 2
        done = rows * matrices * site.d_model * site.d_hidden
        self.site_macs[self.keys[index]] = self.site_macs.get(self.keys[index], 0) + done

    def report(self) -> Report:
        """The report of everything seen."""
        sites = tuple(
            replace(site, share=self.site_macs.get(key, 0) / max(self.macs, 1))
            for key, site in self.sites.items()
        )
        return Report(sites, tuple(self.misses.values()), self.macs, self.graphs)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Which subgraphs of `model(*args, **kwargs)` are convertible, and why the others are not.

    Runs the model once, in eval mode without gradients, through its captured graphs; parameters, mode
    and random state are left as they were. Shares are fractions of the multiply-adds of that call,
    counted by torch's FlopCounterMode. Raises whatever the model raises.
    """
    observer = Explaining()
    with probing(model, observer) as call:
        call(*args, **kwargs)
    return observer.report()
