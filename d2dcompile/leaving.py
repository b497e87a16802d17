"""Blocks that run dense: those that an attached conversion leaves out, and the graphs compiled for any.

torch.compile does not guard on which parameters a graph is called with, only on their shapes and strides: a
graph without experts may later be called with the weights of a converted block. It has to notice.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DenseFallbackWarning, RuleError
from .ir import Plan
from .state import State

Layout = tuple[torch.Size, tuple[int, ...]]

_LEFT: dict[int, tuple[weakref.ref[nn.Parameter], weakref.ref[State]]] = {}
_FORMER: dict[int, tuple[weakref.ref[nn.Parameter], Plan]] = {}  # of detached sites, by down weight
_GRAPHS: weakref.WeakSet[DenseGraph] = weakref.WeakSet()


def leave(model: nn.Module, names: Iterable[str], held: Sequence[State]) -> None:
    """Note the weights below sites of these names as left dense for as long as the first of `held` lives."""
    for key in [k for k, (weight, state) in _LEFT.items() if weight() is None or state() is None]:
        del _LEFT[key]
    paths = tuple(f"{name}." for name in names)
    if held:
        own = model.named_parameters(remove_duplicate=False)
        put_back((weight for name, weight in own if name.startswith(paths)), held)


def noted(held: Sequence[State]) -> list[nn.Parameter]:
    """The weights that `leave` noted for these states, for `put_back`."""
    weights = [weight() for weight, state in _LEFT.values() if any(state() is one for one in held)]
    return [weight for weight in weights if weight is not None]


def put_back(weights: Iterable[nn.Parameter], held: Sequence[State]) -> None:
    """Note weights as left dense for as long as the first of `held` lives."""
    for weight in weights:
        _LEFT[id(weight)] = weakref.ref(weight), weakref.ref(held[0])


def forget(states: Sequence[State]) -> None:
    """States were detached: nothing is left dense beside them, and what plans they had is remembered."""
    for key in [k for k, (_, state) in _LEFT.items() if any(state() is one for one in states)]:
        del _LEFT[key]
    for state in states:
        down = state.weights()["down"]
        if down is not None:
            _FORMER[id(down)] = weakref.ref(down), state.experts.plan


def is_left(parameter: Any) -> bool:
    """Whether a conversion is attached to the model of this very tensor and says that it stays dense."""
    weight, state = _LEFT.get(id(parameter), (None, None))
    return (
        weight is not None and weight() is parameter and state is not None and state() is not None
    )


def former_plan(parameter: nn.Parameter) -> Plan | None:
    """The plan of the site that was detached last from this very down weight, or None."""
    weight, plan = _FORMER.get(id(parameter), (None, None))
    return plan if weight is not None and weight() is parameter else None


def layout(weight: Tensor) -> Layout:
    """What torch.compile guards on of a weight."""
    return weight.shape, weight.stride()


def dense_layouts() -> Set[Layout]:
    """Layouts of the down weights that compiled graphs without experts were made for."""
    return {one for graph in list(_GRAPHS) for one in graph.layouts}


class DenseGraph:
    """A compiled graph with convertible blocks, all of which run dense.

    Called with the weights of a converted block it is an error, or with strict=False a warning.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        places: Sequence[int],
        weights: Sequence[Tensor],
        attributes: Sequence[Tensor],
        lookup: Callable[[Any], State | None],
        strict: bool,
    ) -> None:
        """places: where the blocks' down weights are among the graph's arguments and then attributes."""
        self.layouts = frozenset(map(layout, weights))
        self._compiled = compiled
        self._places = places
        self._attributes = tuple(attributes)
        self._lookup = lookup
        self._strict = strict
        self._warned = False
        _GRAPHS.add(self)

    def __call__(self, *args: Any) -> Any:
        weights = args + self._attributes
        for place in self._places:
            state = self._lookup(weights[place])
            if state is not None:
                self._refuse(state.site.name)
        return self._compiled(*args)

    def _refuse(self, name: str) -> None:
        message = (
            f"A graph compiled for blocks that stay dense was called for the converted site {name!r}, whose "
            "weights have the same shapes and strides. Call torch.compiler.reset() after converting"
        )
        if self._strict:
            raise RuleError(
                f'{message}, or pass options={{"strict": False}} to run such calls dense.'
            )
        if not self._warned:
            self._warned = True
            warnings.warn(f"{message}. Running dense.", DenseFallbackWarning, stacklevel=4)
