"""Blocks that run dense: those that an attached conversion leaves out, and the graphs compiled for any.

torch.compile does not guard on which parameters a graph is called with, only on their shapes and strides: a
graph with blocks that run dense may later be called with the weights of converted ones. It has to notice.
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

# Weights by identity, each with the attached sites of the conversion that leaves it out.
_LEFT: dict[int, tuple[weakref.ref[nn.Parameter], weakref.WeakSet[State]]] = {}
_FORMER: dict[int, tuple[weakref.ref[nn.Parameter], Plan]] = {}  # of detached sites, by down weight
_WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


def leave(model: nn.Module, names: Iterable[str], held: Sequence[State]) -> None:
    """Note what is below sites of these names as left dense for as long as one of `held` is attached.

    A site's name is the path of its module or of its first weight: one of its weights is noted at least.
    """
    paths = tuple(f"{name}." for name in names)
    own = model.named_parameters(remove_duplicate=False)
    put_back((weight for name, weight in own if name.startswith(paths)), held)


def noted(held: Sequence[State]) -> list[nn.Parameter]:
    """The weights that `leave` noted for these states, for `put_back`."""
    weights = [weight() for weight, states in list(_LEFT.values()) if not states.isdisjoint(held)]
    return [weight for weight in weights if weight is not None]


def put_back(weights: Iterable[nn.Parameter], held: Sequence[State]) -> None:
    """Note weights as left dense for as long as one of `held` is attached."""
    _prune()
    for weight in weights:
        _LEFT[id(weight)] = weakref.ref(weight), weakref.WeakSet(held)


def forget(states: Sequence[State]) -> None:
    """States were detached: what only they left dense is so no more, and their plans are remembered."""
    for _, owners in list(_LEFT.values()):
        owners.difference_update(states)
    _prune()
    for state in states:
        down = state.weights()["down"]
        if down is not None:
            _FORMER[id(down)] = weakref.ref(down), state.experts.plan


def _prune() -> None:
    for key, (weight, owners) in list(_LEFT.items()):
        if weight() is None or not owners:
            _LEFT.pop(key, None)
    for key, (weight, _) in list(_FORMER.items()):
        if weight() is None:
            _FORMER.pop(key, None)


def is_left(weights: Iterable[Any]) -> bool:
    """Whether an attached conversion says that the block of these very tensors stays dense.

    Blocks may be nested by name: ask it only of blocks without an attached site.
    """
    for one in weights:
        weight, owners = _LEFT.get(id(one), (None, None))
        if weight is not None and weight() is one and owners:
            return True
    return False


def former_plan(parameter: nn.Parameter) -> Plan | None:
    """The plan of the site that was detached last from this very down weight, or None."""
    weight, plan = _FORMER.get(id(parameter), (None, None))
    return plan if weight is not None and weight() is parameter else None


def layout(weight: Tensor) -> Layout:
    """What torch.compile guards on of a weight."""
    return weight.shape, weight.stride()


def dense_layouts() -> Set[Layout]:
    """Layouts of the down weights of blocks that compiled graphs run dense."""
    return {one for watch in list(_WATCHES) for one in watch.layouts}


class Watch:
    """The blocks that a compiled graph runs dense: a call with the weights of a converted one is an error.

    With strict=False it is a warning.
    """

    def __init__(
        self,
        places: Sequence[int],
        weights: Sequence[Tensor],
        lookup: Callable[[Any], State | None],
        strict: bool,
    ) -> None:
        """places: where the blocks' down weights are among a graph's arguments and then attributes."""
        self.layouts = frozenset(map(layout, weights))
        self._places = tuple(places)
        self._lookup = lookup
        self._strict = strict
        self._warned = False
        _WATCHES.add(self)

    def check(self, weights: Sequence[Any]) -> None:
        """Raise RuleError, or warn, if one of these is the down weight of a converted block."""
        for place in self._places:
            state = self._lookup(weights[place])
            if state is not None:
                self._refuse(state.site.name)

    def _refuse(self, name: str) -> None:
        message = (
            f"A graph compiled for blocks that stay dense was called for the converted site {name!r}, whose "
            "weights have the same shapes and strides. Call torch.compiler.reset() after converting, and "
            "compile the module that holds both blocks instead of each block by itself"
        )
        if self._strict:
            raise RuleError(
                f'{message}; or pass options={{"strict": False}} to run such calls dense.'
            )
        if not self._warned:
            self._warned = True
            warnings.warn(f"{message}. Running dense.", DenseFallbackWarning, stacklevel=5)


class DenseGraph:
    """A compiled graph with convertible blocks, all of which run dense."""

    def __init__(
        self, compiled: Callable[..., Any], attributes: Sequence[Tensor], watch: Watch
    ) -> None:
        self._compiled = compiled
        self._attributes = tuple(attributes)
        self._watch = watch

    def __call__(self, *args: Any) -> Any:
        self._watch.check(args + self._attributes)
        return self._compiled(*args)
