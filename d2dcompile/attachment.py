"""Attach a conversion to a live model: neurons permuted in place, routers and tau beside them.

What is attached lives in a table keyed by the identity of each site's down weight, not in the model:
no parameter is renamed or added, and compiled graphs find a site's operands by the weights they are
called with, whichever layer or model instance that is. Layout after attaching: every weight of a site
is stored neuron-major ([H, D], so that each expert is one contiguous slab) behind its old shape.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import unwrap
from .errors import (
    ConversionMismatchError,
    NoConversionError,
    WeightsChangedError,
)
from .ir import Conversion, Experts, Site
from .layout import digest, permuted
from .leaving import dense_layouts, forget, former_plan, layout, leave, noted, put_back
from .state import State

_STATES: dict[int, State] = {}  # by the identity of the down weight
_OWNERS: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()  # of any weight


def lookup(parameter: Any) -> State | None:
    """The attached site whose down weight is this very tensor, or None."""
    state = _STATES.get(id(parameter))
    return state if state is not None and state.belongs_to(parameter) else None


def owner(parameter: Any) -> State | None:
    """The attached site that this very tensor is any weight or bias of, or None."""
    state = _OWNERS.get(id(parameter))
    return (
        state
        if state is not None and any(p is parameter for p in state.weights().values())
        else None
    )


def attached_shapes() -> list[Counter[tuple[int, ...]]]:
    """How many matrices of which shapes each attached site has."""
    held = [state.weights().values() for state in list(_STATES.values())]
    return [Counter(tuple(w.shape) for w in some if w is not None and w.dim() > 1) for some in held]


def states(model: nn.Module) -> list[State]:
    """All attached sites whose down weight belongs to the model, in the order of its parameters."""
    found = (lookup(parameter) for parameter in unwrap(model).parameters())
    return [state for state in found if state is not None]


def attached(model: nn.Module) -> list[State]:
    """All attached sites of a model, as `states`. Raises NoConversionError if there are none."""
    held = states(model)
    if not held:
        raise NoConversionError(
            f"This {type(model).__name__} has no attached conversion; expected one. Call "
            "convert(model, batches) or load(folder).attach(model) first."
        )
    return held


def attach(model: nn.Module, conversion: Conversion) -> nn.Module:
    """Attach a conversion to a model in place and return the model; its function is unchanged.

    Every site's weights are checked before anything is attached: shapes and SHA-256 against those the
    conversion was made for, as dense or already permuted. A conversion attached before is replaced, or
    kept when the new one is refused.

    Raises ConversionMismatchError naming the first parameter that is missing or different.
    """
    with recompiled(model), kept_on_error(model):
        detach(model)
        for work in [_recognised(model, experts) for experts in conversion.experts.values()]:
            register(*work)
        leave(unwrap(model), conversion.dense, states(model))
    return model


@contextmanager
def recompiled(model: nn.Module) -> Iterator[None]:
    """Make torch.compile forget its graphs if the block makes them wrong in a way that they do not guard on.

    Those are experts of other sizes than a site had before, and experts of a site for whose weights, of the
    strides that they keep, a graph without experts was compiled: those of a copied converted model, say.
    """
    layouts = {id(weight): layout(weight) for weight in unwrap(model).parameters()}
    before = {id(state.weight("down")): state.experts.plan for state in states(model)}
    yield
    for state in states(model):
        down = state.weight("down")
        changed = before.get(id(down), former_plan(down)) not in (None, state.experts.plan)
        kept = layouts.get(id(down)) == layout(down)
        if changed or (id(down) not in before and kept and layout(down) in dense_layouts()):
            torch.compiler.reset()
            return


def _recognised(
    model: nn.Module, experts: Experts
) -> tuple[Experts, dict[str, nn.Parameter], bool]:
    """A site's experts, its parameters in the model by role, and whether they are in dense order."""
    plain = unwrap(model)
    found = dict(plain.named_parameters(remove_duplicate=False))
    weights = {}
    for role, name in experts.site.tensors.items():
        if name not in found:
            raise ConversionMismatchError(
                f"Site {experts.site.name!r} needs a parameter {name!r}, which this "
                f"{type(plain).__name__} does not have. Attach the conversion to the model class "
                "it was made for, or run convert() on this model."
            )
        weights[role] = found[name]
    return experts, weights, recognise(experts, weights)


@contextmanager
def kept_on_error(model: nn.Module) -> Iterator[None]:
    """Put back the sites, rules and taus that were attached before, if the block raises."""
    before = [(state, state.rule, state.tau, state.weights()) for state in states(model)]
    left = noted(states(model))
    try:
        yield
    except BaseException:
        if not states(model):
            for old, rule, value, held in before:
                weights = {role: weight for role, weight in held.items() if weight is not None}
                if len(weights) < len(held):
                    continue  # replaced meanwhile: there is nothing to put it on
                state = register(old.experts, weights, is_dense=True)  # as `detach` left it
                state.seen = ()  # what was edited since the conversion is still told of
                state.rule = rule
                state.set_value(value)
            if states(model):
                put_back(left, states(model))
        raise


def recognise(experts: Experts, weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights are the conversion's in dense order (True) or permuted (False).

    Raises ConversionMismatchError when they are neither.
    """
    order: set[str] = {"dense", "permuted"}
    for role, name in experts.site.tensors.items():
        weight, known = weights[role], experts.hashes[role]
        dtype = str(weight.dtype).removeprefix("torch.")
        found = digest(weight)
        if list(weight.shape) != known["shape"]:
            saw = f"shape {list(weight.shape)}, expected {known['shape']}"
            order = set()
        else:
            order = {kind for kind in order if known[kind].get(dtype) == found}
            saw = f"SHA-256 {found[:12]} as {dtype}, expected {known['dense'].get(dtype, 'none')[:12]}"
        if not order:
            raise ConversionMismatchError(
                f"The conversion of site {experts.site.name!r} was made for other weights: {name} has "
                f"{saw}. Load the checkpoint it was made from, or run convert() on this model."
            )
    return "dense" in order


def register(experts: Experts, weights: Mapping[str, nn.Parameter], is_dense: bool) -> State:
    """Put one site's weights into expert order and enter it in the table."""
    for role in _distinct(experts.site):
        order = experts.permutation if is_dense else torch.arange(len(experts.permutation))
        _reorder(experts.site, role, weights[role], order)
    down = weights["down"]
    state = State(experts, weights)
    _STATES[id(down)] = state
    _OWNERS.update((id(weight), state) for weight in weights.values())
    weakref.finalize(down, _forget, id(down), weakref.ref(state))
    return state


def _reorder(
    site: Site,
    role: str,
    parameter: nn.Parameter,
    order: Tensor,
    back: bool = False,
    fresh: bool = False,
) -> None:
    """Put the neurons of a role's parameter, and of its gradient, in an order.

    back: with the strides of an ordinary parameter; fresh: in memory of its own.
    """
    value = permuted(site, role, parameter.detach(), order)
    value = value.contiguous() if back else value
    grad = None if parameter.grad is None else permuted(site, role, parameter.grad, order)
    if grad is not None:
        parameter.grad = None  # set again below: it has to have the strides that the values get
    if fresh:
        parameter.data = value.clone(memory_format=torch.preserve_format)
    else:
        _store(parameter, value)
    if grad is not None:
        parameter.grad = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=grad.dtype, device=grad.device
        ).copy_(grad)


def _distinct(site: Site) -> dict[str, str]:
    """A site's tensors by role, each parameter once: up and down may be tied."""
    last = {name: role for role, name in site.tensors.items()}
    return {role: name for name, role in last.items()}


def _forget(key: int, state: weakref.ref[State]) -> None:
    if _STATES.get(key) is state():
        _STATES.pop(key, None)


def _store(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter new values in its own storage, with the strides of `value`."""
    held = parameter.data
    if value.dim() < 2:
        held.copy_(value)
        return
    old, new = (t.view(t.shape[:2]) for t in (held, value))  # axes of size one may follow
    if new.stride() == old.stride():
        held.copy_(value)
    elif (new.is_contiguous() or new.t().is_contiguous()) and _dense_storage(old):
        flat = old.as_strided((old.numel(),), (1,))
        straight = new.is_contiguous()
        flat.copy_((new if straight else new.t()).clone().reshape(-1))
        stored = flat.view(new.shape) if straight else flat.view(new.t().shape).t()
        parameter.data = stored.view(held.shape)
    else:
        parameter.data = value.clone(memory_format=torch.preserve_format)


def _dense_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.t().is_contiguous()


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` in place and return the model: the original neuron order, and no routers.

    A model without a conversion is left as it is. Weights edited since are restored to their places, and
    those that a checkpoint in the original order was loaded into stay as they are. Graphs that `rewrite`
    made go on with the values of before. Raises WeightsChangedError for a weight that is gone from the model.
    """
    held = [(state, _weights_in(model, state)) for state in states(model)]
    forget([state for state, _ in held])
    for state, found in held:
        if not _in_dense_order(state, found):
            order = torch.argsort(state.experts.permutation)
            for role in _distinct(state.site):
                _reorder(state.site, role, found[role], order, back=True, fresh=state.rewritten)
        _STATES.pop(id(found["down"]), None)
        state.release()
    return model


def _weights_in(model: nn.Module, state: State) -> dict[str, nn.Parameter]:
    """A site's weights and biases that the model has now, by role; WeightsChangedError if one is gone."""
    named = dict(unwrap(model).named_parameters(remove_duplicate=False))
    own = {id(parameter) for parameter in named.values()}
    held, found = state.weights(), {}
    for role, name in state.site.tensors.items():
        weight = held[role]
        if weight is None or id(weight) not in own:
            # By name: a parameter put in an old one's place is in expert order like the others.
            weight = named.get(name)
        if weight is None:
            raise WeightsChangedError(
                f"Parameter {name} of site {state.site.name!r} is gone from this "
                f"{type(unwrap(model)).__name__}. Expected the module that was converted: undo what "
                "replaced its weights (parametrizations, adapters), then detach."
            )
        found[role] = weight
    return found


def _in_dense_order(state: State, weights: Mapping[str, nn.Parameter]) -> bool:
    """Whether weights were loaded anew in the order that the conversion found them in."""
    if state.fingerprint() == state.seen:
        return False
    try:
        return recognise(state.experts, weights)
    except ConversionMismatchError:
        return False
