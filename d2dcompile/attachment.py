"""Attach a conversion to a live model: neurons permuted in place, routers and tau beside them.

What is attached lives in a table keyed by the identity of each site's down weight, not in the model:
no parameter is renamed or added, and compiled graphs find a site's operands by the weights they are
called with, whichever layer or model instance that is. Layout after attaching: every weight of a site
is stored neuron-major ([H, D], so that each expert is one contiguous slab) behind its old shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import unwrap
from .config import check_tau
from .errors import (
    ConversionMismatchError,
    NoConversionError,
    RuleError,
    TauError,
    WeightsChangedError,
)
from .ir import Conversion, Experts, Site
from .layout import digest, permuted
from .rules import check_rule, check_value
from .state import State

_STATES: dict[int, State] = {}  # by the identity of the down weight
_OWNERS: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()  # of any weight
# Other weights of models with a conversion, see `left_dense`.
_LEFT: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()


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


def left_dense(parameter: Any) -> bool:
    """Whether a conversion is attached to the model of this very tensor, and leaves it out."""
    return _LEFT.get(id(parameter)) is parameter and owner(parameter) is None


def has_shape(shape: Sequence[int]) -> bool:
    """Whether any attached site has a down weight of this shape."""
    held = (state.weights()["down"] for state in list(_STATES.values()))
    return any(weight is not None and list(weight.shape) == list(shape) for weight in held)


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
        own = unwrap(model).parameters()
        _LEFT.update((id(weight), weight) for weight in own if owner(weight) is None)
    return model


@contextmanager
def recompiled(model: nn.Module) -> Iterator[None]:
    """Make torch.compile forget its graphs if the block makes them wrong in a way that they do not guard on.

    Those are experts of other sizes than a site had before, and experts of a site that had none and whose
    weights keep their strides, as those of a copied converted model do.
    """
    before = {state.site.name: state.experts.plan for state in states(model)}
    strides = {id(weight): weight.stride() for weight in unwrap(model).parameters()}
    yield
    held = states(model)
    after = {state.site.name: state.experts.plan for state in held}
    other = any(after.get(name, plan) != plan for name, plan in before.items())
    unnoticed = any(
        all(w is None or strides.get(id(w)) == w.stride() for w in state.weights().values())
        for state in held
        if state.site.name not in before
    )
    if other or unnoticed:
        torch.compiler.reset()


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
    for state, found in [(state, _weights_in(model, state)) for state in states(model)]:
        if not _in_dense_order(state, found):
            order = torch.argsort(state.experts.permutation)
            for role in _distinct(state.site):
                _reorder(state.site, role, found[role], order, back=True, fresh=state.rewritten)
        _STATES.pop(id(found["down"]), None)
        state.release()
    for weight in unwrap(model).parameters():
        _LEFT.pop(id(weight), None)
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


def set_tau(model: nn.Module, tau: float | Mapping[str, float]) -> None:
    """Set the threshold of all sites, or of those named, without recompiling anything.

    tau: 0 runs every expert (the dense model), larger is sparser, at most 1; or {site name: tau}.

    Raises TauError for values that are not finite numbers in 0..1, unknown site names, sites that follow
    another rule (see `set_rule`), and a model without an attached conversion. Nothing is changed when an
    error is raised.
    """
    known = {state.site.name: state for state in states(model)}
    if not known:
        raise TauError(
            f"This {type(unwrap(model)).__name__} has no attached conversion; expected one. "
            "Call convert(model, batches) or load(folder).attach(model) first."
        )
    wanted = dict(tau) if isinstance(tau, Mapping) else dict.fromkeys(known, tau)
    for name, value in wanted.items():
        if name not in known:
            raise TauError(f"No site {name!r}; expected one of {', '.join(known)}.")
        check_tau(value)
        known[name].check_has_tau()
    for name, value in wanted.items():
        known[name].set_value(float(value))


def set_numbers(model: nn.Module, setting: Mapping[str, float]) -> None:
    """Set {site name: number} of whatever rule each site follows: tau, k or p. Raises as `set_rule`."""
    known = {state.site.name: state for state in states(model)}
    for name, number in setting.items():
        known[name].set_value(check_value(known[name].rule, number))


def set_rule(model: nn.Module, rule: str, value: float | Mapping[str, float]) -> None:
    """Let all sites, or those named, choose their experts by a rule with this number.

    rule: "max" (value is tau, 0 runs everything), "top_k" (the number of experts, E or more run
    everything) or "top_p" (the share of the scores' sum, 1 runs everything); see `kernels.gate`. value: a
    number, or {site name: number}. Another number under the same rule recompiles nothing. Another rule
    makes torch.compile forget its graphs, so that the next call compiles them anew; kernels that run a
    whole block know "max" only, others run as separate ops.

    Raises RuleError (TauError for a tau) for an unknown rule, a number that it cannot have and unknown
    site names, and NoConversionError for a model without a conversion. Nothing is changed then.
    """
    known = {state.site.name: state for state in attached(model)}
    check_rule(rule)
    wanted = dict(value) if isinstance(value, Mapping) else dict.fromkeys(known, value)
    for name, number in wanted.items():
        if name not in known:
            raise RuleError(f"No site {name!r}; expected one of {', '.join(known)}.")
        check_value(rule, number)
    changed = any(known[name].rule != rule for name in wanted)
    for name, number in wanted.items():
        known[name].rule = rule
        known[name].set_value(float(number))
    if changed:
        torch.compiler.reset()
