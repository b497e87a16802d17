"""Which attached site, or which experts of a conversion, a matched block's weights belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .attachment import lookup, recognise, register
from .errors import ConversionMismatchError
from .ir import Conversion, Experts
from .passes import Match
from .state import State, meaning


def state_of(found: Match, conversion: Conversion | None) -> State | None:
    """The state attached to a match's weights, or attached now from `conversion` by their hashes."""
    if not found.site.convertible:
        return None
    weights = found.tensors()
    state = lookup(weights["down"])
    if state is None or not state.owns(weights):
        state = attach_by_weights(conversion, weights) if conversion is not None else None
    same = state is not None and state.meaning == meaning(found.activation)
    return state if same else None


def states_of(found: Sequence[Match], conversion: Conversion | None) -> list[State | None]:
    """`state_of` each match; a conversion's, if one is given, and a site that it leaves out has none.

    Raises ConversionMismatchError where another conversion is attached than the given one, and where none of
    the matches has the weights it was made for.
    """
    states: list[State | None] = []
    error: ConversionMismatchError | None = None
    for one in found:
        state = None
        try:
            state = state_of(one, conversion)
        except ConversionMismatchError as mismatch:
            error = mismatch
        given = conversion.experts.values() if conversion is not None else ()
        if state is not None and given and not any(_same(state.experts, e) for e in given):
            raise ConversionMismatchError(
                f"Site {state.site.name!r} has another conversion attached than the one given. Expected the "
                "same one: call detach(model) first, or attach(model, conversion) to replace it."
            )
        states.append(state)
    if error is not None and not any(states):
        raise error
    return states


def _same(one: Experts, other: Experts) -> bool:
    """Whether these are the same experts and router, whatever their numbers and figures."""
    tensors = ("permutation", "router1", "router2")
    return one is other or (
        one.plan == other.plan
        and dict(one.hashes) == dict(other.hashes)
        and all(_equal(getattr(one, t), getattr(other, t)) for t in tensors)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are the same; rows of NaN, which stand for shared experts, are."""
    a, b = a.detach().cpu(), b.detach().cpu()
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def attach_by_weights(conversion: Conversion, weights: Mapping[str, Tensor]) -> State | None:
    """Attach the experts whose recorded hashes fit these weights; None if no site has their shapes.

    Raises ConversionMismatchError if sites of these shapes exist but none has these values.
    """
    error: ConversionMismatchError | None = None
    for experts in conversion.experts.values():
        if not _fits(experts, weights):
            continue
        try:
            is_dense = recognise(experts, weights)
        except ConversionMismatchError as mismatch:
            error = mismatch
            continue
        parameters = {
            role: weight for role, weight in weights.items() if isinstance(weight, nn.Parameter)
        }
        return register(experts, parameters, is_dense) if len(parameters) == len(weights) else None
    if error is not None:
        raise error
    return None


def knows(conversion: Conversion, weights: Mapping[str, Tensor]) -> bool:
    """Whether a conversion has experts that were made of these weights."""
    for experts in conversion.experts.values():
        if _fits(experts, weights):
            try:
                recognise(experts, weights)
            except ConversionMismatchError:
                continue
            return True
    return False


def _fits(experts: Experts, weights: Mapping[str, Tensor]) -> bool:
    return {r: h["shape"] for r, h in experts.hashes.items()} == {
        role: list(weight.shape) for role, weight in weights.items()
    }
