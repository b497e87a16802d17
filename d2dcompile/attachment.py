"""Attach a conversion to a live model: neurons permuted in place, routers and tau beside them.

What is attached lives in a table keyed by the identity of each site's down weight, not in the model:
no parameter is renamed or added, and compiled graphs find a site's operands by the weights they are
called with, whichever layer or model instance that is. Layout after attaching: every weight of a site
is stored neuron-major ([H, D], so that each expert is one contiguous slab) behind its old shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from .capture import unwrap
from .errors import ConversionMismatchError, TauError, WeightsChangedError
from .expr import parse, quiet, without_casts
from .ir import Conversion, Experts, Schedule, Site
from .kernels import native
from .kernels.dynamic_mlp import Prepared, cpu
from .kernels.gate import tau_bits
from .layout import digest, permuted, slabs
from .passes.insert_moe import operand_names


def meaning(activation: str) -> str:
    """An activation apart from its changes of dtype and dropout: equal for what computes the same."""
    return str(quiet(without_casts(parse(activation))))


class State:
    """One attached site: its weights (weakly held), router, tau, and when they were last verified."""

    def __init__(self, experts: Experts, weights: Mapping[str, nn.Parameter]) -> None:
        self.experts = experts
        self.site = experts.site
        self._weights = {role: weakref.ref(weight) for role, weight in weights.items()}
        self._tau: dict[torch.device, Tensor] = {}
        self._cache: dict[str, Any] = {}
        self.tau = experts.tau
        self.meaning = meaning(experts.site.activation)
        self.applied: float | None = None  # the tau option that a backend has set already
        self._prepared: dict[tuple[bool, bool], tuple[Any, Prepared]] = {}
        self.forced: Tensor | None = None  # see force_masks
        self.schedule = Schedule()
        self.seen = self._fingerprint()

    def weight(self, role: str) -> nn.Parameter:
        """The live parameter of a role ("up", "down.bias", ...)."""
        parameter = self._weights[role]()
        if parameter is None:
            raise WeightsChangedError(
                f"Parameter {self.site.tensors[role]} of site {self.site.name!r} was replaced after "
                "the conversion. Run convert() again on the new weights."
            )
        return parameter

    def weights(self) -> dict[str, nn.Parameter | None]:
        """The site's weights and biases by role, None for those that exist no more."""
        return {role: ref() for role, ref in self._weights.items()}

    def owns(self, weights: Mapping[str, Any]) -> bool:
        """Whether these are the very parameters the site was attached to, by role."""
        return all(ref() is weights.get(role) for role, ref in self._weights.items())

    def set_tau(self, tau: float) -> None:
        """Change the threshold in place, on every device it was used on."""
        self.tau = tau
        for device, held in self._tau.items():
            held.copy_(tau_bits(tau, device))
        self.steer()

    def tau_on(self, device: torch.device) -> Tensor:
        """The threshold as int32 bits on a device; the same tensor for the life of the state."""
        if device not in self._tau:
            with torch.inference_mode(False):
                self._tau[device] = tau_bits(self.tau, device)
        return self._tau[device]

    def _fingerprint(self) -> tuple[Any, ...]:
        """Cheap identity of the weights' values: in-place edits and swaps of storage change it."""
        return tuple(
            (p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version)
            for p in (ref() for ref in self._weights.values())
            if p is not None
        )

    def check(self) -> None:
        """Raise WeightsChangedError if the weights' values are not those of the conversion.

        Costs a few attribute reads while nothing changed; otherwise the values are hashed once.
        A cast to another float dtype or a move to another device is recognised by its own hash.
        """
        now = self._fingerprint()
        if now == self.seen:
            return
        for role, name in self.site.tensors.items():
            known = self.experts.hashes[role]["permuted"]
            weight = self.weight(role)
            found = digest(weight)
            dtype = str(weight.dtype).removeprefix("torch.")
            if found != known.get(dtype):
                raise WeightsChangedError(
                    f"Weights of site {self.site.name!r} changed after conversion: {name} now has "
                    f"SHA-256 {found[:12]} as {dtype}, expected {known.get(dtype, 'none')[:12]}. "
                    "Run convert() again on the new weights, or compile with "
                    'options={"trainable": True} if you are fine-tuning the converted model.'
                )
        self.seen = now
        self._cache.clear()

    def operands(self) -> tuple[Tensor, ...]:
        """What the inserted nodes take, in the order of `operand_names`; views of the live weights.

        While gradients are recorded the views are made anew, so that they lead back to the weights.
        """
        live = torch.is_grad_enabled() and any(
            self.weight(role).requires_grad for role in self._weights
        )
        if live:
            return self._operands(detach=False)
        key = tuple(entry[:2] for entry in self._fingerprint())
        if self._cache.get("key") != key:
            self._cache = {"key": key, "operands": self._operands(detach=True)}
        cached: tuple[Tensor, ...] = self._cache["operands"]
        return cached

    def prepared(self, packs: bool, int8: bool = False) -> Prepared:
        """The site's operands as a kernel takes them, made anew whenever the weights changed.

        packs: whether kernels may keep a copy of the weights in an order of their own; int8: whether one
        token runs on an int8 copy.
        """
        key, held = self._fingerprint(), self._prepared.get((packs, int8))
        if held is None or held[0] != key:
            names = operand_names(self.site)
            values: dict[str, Any] = dict.fromkeys(native.SLABS)
            values.update(zip(names, self._operands(detach=True), strict=True))
            block = Prepared(**values, activation=self.site.activation, packs=packs, int8=int8)
            cpu.fill(block)
            self._prepared[packs, int8] = held = key, block
            self.steer()
        return held[1]

    def expected_share(self) -> float:
        """The executed share to expect at the present tau: of the forced masks, or as calibrated."""
        if self.forced is not None:
            return float(self.forced.float().mean())
        known = {float(k.split("@")[1]): v for k, v in self.experts.stats.items() if "share@" in k}
        points = sorted({0.0: 1.0, 1.0: 0.0, **known}.items())
        for (low, above), (high, below) in pairwise(points):
            if self.tau <= high:
                return above + (below - above) * (self.tau - low) / (high - low)
        return 0.0

    @property
    def dense_rows(self) -> int:
        """Tokens of a call from which every expert runs, since few would be skipped; 0 for never."""
        return self.schedule.dense_rows(self.expected_share())

    def steer(self) -> None:
        """Bring the kernels' records up to date with tau, forced masks and measured schedules."""
        if not self._prepared:
            return
        spec = native.spec_of(self.experts, self.weight("down").dtype)
        self.schedule = schedules.lookup(spec)
        for _, block in self._prepared.values():
            cpu.force(block, self.forced)
            cpu.schedule(block, self.schedule, self.expected_share())

    def force_masks(self, masks: Tensor | None) -> None:
        """Use masks [rows, E] instead of the gate's, as `testing.forced_share` does; None ends it."""
        self.forced = masks
        self.steer()

    def release(self) -> None:
        """Drop what was made for kernels: records and packed copies."""
        self._prepared.clear()
        self._cache.clear()

    @property
    def packed_bytes(self) -> int:
        """Bytes of the copies of the weights that kernels keep, 0 where they keep none."""
        blocks = [block for _, block in self._prepared.values()]
        copies = [copy for block in blocks for copy in (block.packed, block.quantised)]
        return sum(copy.nbytes for copy in copies if copy is not None)

    def _operands(self, *, detach: bool) -> tuple[Tensor, ...]:
        weights = {role: self.weight(role) for role in self._weights}
        down = weights["down"]
        values = {
            name: (t.detach() if detach else t) for name, t in slabs(self.site, weights).items()
        }
        values["tau"] = self.tau_on(down.device)
        first = values["w_up"]
        for name, router in (("router1", self.experts.router1), ("router2", self.experts.router2)):
            values[name] = router.to(first.device, first.dtype)
        return tuple(values[name] for name in operand_names(self.site))


_STATES: dict[int, State] = {}  # by the identity of the down weight
_OWNERS: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()  # of any weight


def lookup(parameter: Any) -> State | None:
    """The attached site whose down weight is this very tensor, or None."""
    state = _STATES.get(id(parameter))
    return state if state is not None and state._weights["down"]() is parameter else None


def owner(parameter: Any) -> State | None:
    """The attached site that this very tensor is any weight or bias of, or None."""
    state = _OWNERS.get(id(parameter))
    return (
        state
        if state is not None and any(p is parameter for p in state.weights().values())
        else None
    )


def states(model: nn.Module) -> list[State]:
    """All attached sites whose down weight belongs to the model, in the order of its parameters."""
    found = (lookup(parameter) for parameter in unwrap(model).parameters())
    return [state for state in found if state is not None]


def attach(model: nn.Module, conversion: Conversion) -> nn.Module:
    """Attach a conversion to a model in place and return the model; its function is unchanged.

    Every site's weights are checked before anything is attached: shapes and SHA-256 against those the
    conversion was made for, as dense or already permuted. A conversion attached before is replaced, or
    kept when the new one is refused.

    Raises ConversionMismatchError naming the first parameter that is missing or different.
    """
    with kept_on_error(model):
        detach(model)
        for work in [_recognised(model, experts) for experts in conversion.experts.values()]:
            register(*work)
    return model


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
    """Put back the sites and taus that were attached before, if the block raises."""
    before = [(state.experts, state.tau) for state in states(model)]
    try:
        yield
    except BaseException:
        if not states(model):
            for experts, tau in before:
                register(*_recognised(model, experts)).set_tau(tau)
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
        _store(weights[role], permuted(experts.site, role, weights[role].detach(), order))
    down = weights["down"]
    state = State(experts, weights)
    _STATES[id(down)] = state
    _OWNERS.update((id(weight), state) for weight in weights.values())
    weakref.finalize(down, _forget, id(down), weakref.ref(state))
    return state


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

    A model without a conversion is left as it is. Weights edited since are restored to their places.
    """
    found = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for state in states(model):
        order = torch.argsort(state.experts.permutation)
        for role, name in _distinct(state.site).items():
            # By name: a parameter put in an old one's place is in expert order like the others.
            value = permuted(state.site, role, found[name].detach(), order)
            _store(found[name], value.contiguous())
        _STATES.pop(id(found[state.site.params["down"]]), None)
        state.release()
    return model


def set_tau(model: nn.Module, tau: float | Mapping[str, float]) -> None:
    """Set the threshold of all sites, or of those named, without recompiling anything.

    tau: 0 runs every expert (the dense model), larger is sparser, at most 1; or {site name: tau}.

    Raises TauError for values that are not finite numbers in 0..1, unknown site names, and a model
    without an attached conversion. Nothing is changed when an error is raised.
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
    for name, value in wanted.items():
        known[name].set_tau(float(value))


def check_tau(value: Any) -> float:
    """The threshold as a float; TauError unless it is a finite number in 0..1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:
        raise TauError(f"tau is {value!r}; expected a finite number in 0..1 (0 runs all experts).")
    return float(value)
