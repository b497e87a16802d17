"""Which sites a call of a model runs, and prints of the values around their matrices.

A print says whether two tensors hold the same values in any layout: it is how an eager model's modules
are recognised as what the captured graph computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import GraphModule

from .capture import unwrap
from .errors import SparsifyError
from .expr import Expr, parse
from .ir import Site
from .passes import Match
from .passes.run import where
from .probe import Graph, arguments, insert_observer, probing


class Print(NamedTuple):
    """What tells one tensor from another, whatever their layout."""

    size: int
    mean: float
    rms: float

    def like(self, other: Print) -> bool:
        """Whether they are of the same values up to rounding."""
        near = abs(self.mean - other.mean) + abs(self.rms - other.rms) <= 1e-3 * other.rms
        return self.size == other.size and near


@dataclass
class Seen:
    """A site as the captured graph runs it.

    Attributes:
        match: its first match.
        scalars: the tensors behind p0, p1, ... of its activation, as far as they are found.
        prints: by role, of each call's output of a first matrix, or input of the last.
    """

    match: Match
    scalars: dict[str, Tensor]
    prints: dict[str, list[Print]] = field(default_factory=dict)

    @property
    def site(self) -> Site:
        return self.match.site

    @property
    def line(self) -> str:
        """Its name, and the source line where its activation is computed."""
        linears = {n for linear in self.match.linears for n in (*linear.parts, linear.node)}
        between = [node for node in self.match.inside if node not in linears]
        return where(self.site.name, between[0] if between else self.match.root)


class _Locating:
    """Observer that keeps every site's match, and prints of the values around its matrices."""

    def __init__(self) -> None:
        self.sites: dict[str, Seen] = {}
        self._roles: list[tuple[Seen, str]] = []

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """Note the graph's sites, then run it with the values around their matrices observed."""
        known = [
            self.sites.setdefault(m.site.name, Seen(m, _scalars(graph, m, args)))
            for m in graph.matches
        ]
        self._roles = [
            (s, r) for s, m in zip(known, graph.matches, strict=True) for r in m.site.params
        ]
        return graph.variant("tapped", lambda: _observed(graph)).forward(*args)

    def seen(self, index: int, x: Tensor, values: Tensor) -> None:
        """Note the print of one value."""
        seen, role = self._roles[index]
        seen.prints.setdefault(role, []).append(print_of(values))


def _observed(graph: Graph) -> GraphModule:
    """The captured graph, handing the outputs of first matrices and the inputs of last ones over."""
    copies = graph.captured.copies()
    index = 0
    for found in graph.matches:
        gm, to = copies[id(found.captured)]
        for role, linear in zip(found.site.params, found.linears, strict=True):
            if role == "down":
                insert_observer(gm.graph, to[linear.node], index, to[linear.x], to[linear.x])
            else:
                node = to[linear.node]
                insert_observer(gm.graph, node.next, index, node, node)
            index += 1
    for gm, _ in copies.values():
        gm.recompile()
    return copies[id(graph.captured)][0]


def _scalars(graph: Graph, match: Match, args: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors behind p0, p1, ... of a match's activation, as far as they are found."""
    given = dict(zip(graph.captured.placeholders(), args, strict=True))
    values = {
        f"p{i}": match.captured.tensors.get(node, given.get(node))
        for i, node in enumerate(match.scalars)
    }
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def print_of(values: Tensor) -> Print:
    """Size, mean and root mean square: equal for equal values in any layout."""
    wide = values.detach().double()
    return Print(wide.numel(), float(wide.mean()), float(wide.square().mean().sqrt()))


def gate_part(site: Site) -> Expr:
    """The nonlinear function of the gate alone in a gated activation; a plain one is that itself.

    Raises SparsifyError if there is none, or several.
    """
    whole = parse(site.activation)
    if site.kind != "glu":
        return whole
    parts = {part for part in _only(whole, "gate") if part.is_nonlinear()}
    if len(parts) != 1:
        raise SparsifyError(
            f"Site {site.name!r} computes {site.activation}: {len(parts)} functions of the gate alone; "
            "expected one. Penalise at='hidden', or leave the site out with sites={{{site.name!r}: 0}}."
        )
    return parts.pop()


def _only(expression: Expr, name: str) -> Iterator[Expr]:
    """The largest subexpressions whose only neurons are those of a variable."""
    if expression.neurons() == {name}:
        yield expression
    elif expression.op not in ("var", "const"):
        for arg in expression.args:
            yield from _only(arg, name)


def locate(model: nn.Module, example: Any) -> list[Seen]:
    """The convertible sites of a call, run in eval mode without gradients, in execution order.

    Raises SparsifyError if there is none.
    """
    observer = _Locating()
    args, kwargs = arguments(example)
    with probing(model, observer) as call:
        call(*args, **kwargs)
    if not observer.sites:
        raise SparsifyError(
            f"The matcher finds no feed-forward block in this call of {type(unwrap(model)).__name__}; "
            "expected at least one. d2dcompile.explain(model, ...) says why."
        )
    return list(observer.sites.values())
