"""State: one attached site, what a compiled graph runs it with, and whether that is still true.

Its weights are held weakly, by role. Operands are views of them in expert order, made once; what a kernel
takes is prepared once, and both anew when a cheap fingerprint of the weights has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from .errors import TauError, WeightsChangedError
from .expr import parse, quiet, without_casts
from .ir import Experts, Schedule
from .kernels import native
from .kernels.dynamic_mlp import Prepared, cpu
from .kernels.expert_mlp.gpu import EXPECTED
from .kernels.gate import tau_bits
from .kernels.int8 import Copy, copy_of
from .kernels.router_hidden import Layer
from .kernels.router_hidden.cpu import shareable
from .layout import digest, slabs
from .passes.forms import Choice, Form, operand_names
from .rules import NUMBERS, calibrated_share, sparsity_of, value_at


def meaning(activation: str) -> str:
    """An activation apart from its changes of dtype and dropout: equal for what computes the same."""
    return str(quiet(without_casts(parse(activation))))


_NUMBERS: weakref.WeakKeyDictionary[Experts, tuple[str, float]] = weakref.WeakKeyDictionary()


def present(experts: Experts) -> tuple[str, float]:
    """The rule and its number that were set last where these experts are attached; else their defaults."""
    return _NUMBERS.get(experts, (experts.rule, experts.tau))


@dataclass(frozen=True, eq=False)
class Learning:
    """A router while it learns: router1 [R, D], router2 [E, R] fp32, and aims [3] (see kernels.credit)."""

    router1: nn.Parameter
    router2: nn.Parameter
    aims: Tensor


class State:
    """One attached site: its weights (weakly held), router, tau, and when they were last verified."""

    def __init__(self, experts: Experts, weights: Mapping[str, nn.Parameter]) -> None:
        self.experts = experts
        self.site = experts.site
        self._weights = {role: weakref.ref(weight) for role, weight in weights.items()}
        self._tau: dict[torch.device, Tensor] = {}
        self._cache: dict[str, Any] = {}
        self.rule, self.tau = present(experts)
        self.exact: float | None = None  # see Choice
        self._shared = float(experts.shared.float().mean())
        self.meaning = meaning(experts.site.activation)
        self.applied: float | None = None  # the tau option that a backend has set already
        self._prepared: dict[tuple[bool, bool], tuple[Any, Prepared]] = {}
        self._layers: dict[tuple[int, ...], Layer] = {}
        self._int8: tuple[Any, Copy] | None = None
        self.forced: Tensor | None = None  # see force_masks
        self.schedule = Schedule()
        self.learning: Learning | None = None  # see d2dcompile.finetuning
        self.seen: tuple[Any, ...] = self.fingerprint()
        self.rewritten = False  # whether a graph outside of torch.compile holds its operands

    @property
    def routers(self) -> tuple[Tensor, Tensor]:
        """router1 [R, D] and router2 [E, R] as they are now."""
        source = self.learning or self.experts
        return source.router1, source.router2

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

    def belongs_to(self, down: Any) -> bool:
        """Whether this very tensor is the site's down weight."""
        return self._weights["down"]() is down

    def owns(self, weights: Mapping[str, Any]) -> bool:
        """Whether these are the very parameters the site was attached to, by role."""
        return all(ref() is weights.get(role) for role, ref in self._weights.items())

    def shares_with(self, other: State) -> bool:
        """Whether one first router layer serves both sites: one tensor, used on one device in one dtype."""
        own, others = self.weight("down"), other.weight("down")
        return (
            self.routers[0] is other.routers[0]
            and (own.device, own.dtype) == (others.device, others.dtype)
            and self.exact is None
            and other.exact is None
        )

    @property
    def choice(self) -> Choice:
        """How experts are chosen, as far as compiled graphs hold it; they are not for states of another."""
        return Choice(self.rule, self.exact)

    def check_has_tau(self) -> None:
        """Raise TauError where the rule is another than "max"."""
        if self.rule != "max":
            raise TauError(
                f"Site {self.site.name!r} follows the rule {self.rule!r} with {NUMBERS[self.rule]} = "
                f"{self.tau:g} and has no tau. Use set_rule(model, {self.rule!r}, value), or "
                "set_rule(model, 'max', tau) to go back."
            )

    def apply(self, tau: float | None) -> None:
        """Set the tau that a backend's option asks for: once, so that a recompilation keeps a later one."""
        if tau is not None and self.applied != tau:
            self.applied = tau
            self.set_tau(tau)

    def set_tau(self, tau: float) -> None:
        """Change the threshold in place; TauError where the rule is another than "max"."""
        self.check_has_tau()
        self.set_value(tau)

    def set_value(self, value: float) -> None:
        """Change the rule's number in place, on every device it was used on: tau, k or p."""
        self.tau = value
        _NUMBERS[self.experts] = self.rule, value
        for device, held in self._tau.items():
            held.copy_(tau_bits(value, device))
        self.steer()

    @property
    def span(self) -> tuple[float, float]:
        """The rule's numbers that run the most and the fewest experts; solvers search between them."""
        experts = self.experts.plan.experts
        ends = value_at(self.rule, 0.0, experts), value_at(self.rule, 1.0, experts)
        return (int(ends[0]), int(ends[1])) if self.rule == "top_k" else ends

    @property
    def sparsity(self) -> float:
        """Where the rule's present number lies from 0 (everything runs) to 1 (the fewest)."""
        return sparsity_of(self.rule, self.tau, self.experts.plan.experts)

    def tau_on(self, device: torch.device) -> Tensor:
        """The threshold as int32 bits on a device; the same tensor for the life of the state."""
        if device not in self._tau:
            with torch.inference_mode(False):
                self._tau[device] = tau_bits(self.tau, device)
        return self._tau[device]

    def fingerprint(self) -> tuple[Any, ...]:
        """Cheap identity of the weights' values: in-place edits and swaps of storage change it."""
        tensors = [ref() for ref in self._weights.values()]
        learning = self.routers if self.learning is not None else ()
        return tuple(
            (p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version)
            for p in (*tensors, *learning)
            if p is not None
        )

    def check(self) -> None:
        """Raise WeightsChangedError if the weights' values are not those of the conversion.

        Costs a few attribute reads while nothing changed; otherwise the values are hashed once.
        A cast to another float dtype or a move to another device is recognised by its own hash.
        """
        now = self.fingerprint()
        if now == self.seen or self.learning is not None:
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
        self._expect(None)
        self._cache.clear()

    def operands(self, form: Form = "ops") -> tuple[Tensor, ...]:
        """What the inserted nodes take, in the order of `operand_names`; views of the live weights.

        With the form "int8" their copy besides; no graph that records gradients has that form.
        While gradients are recorded the views are made anew, so that they lead back to the weights, and
        while the router learns, since copies of it in another dtype would not.
        """
        if form == "int8":
            return (*self.operands(), *(part for part in self.int8_copy() if part is not None))
        live = torch.is_grad_enabled() and any(
            self.weight(role).requires_grad for role in self._weights
        )
        if live or self.learning is not None:
            self._expect(None)
            return self._operands(detach=not torch.is_grad_enabled(), form=form)
        key = tuple(entry[:2] for entry in self.fingerprint())
        if self._cache.get("key") != key:
            self._expect(None)
            self._cache = {"key": key, "operands": self._operands(detach=True)}
            self._expect(self.expected_share())
        cached: tuple[Tensor, ...] = self._cache["operands"]
        return cached

    def int8_copy(self) -> Copy:
        """The int8 copy of the slabs that GPU kernels stream for few tokens, made anew as weights change."""
        key = self.fingerprint()
        if self._int8 is None or self._int8[0] != key:
            self._int8 = None  # frees the old one first
            named = slabs(self.site, {role: self.weight(role) for role in self._weights})
            matrices = named["w_up"], named.get("w_gate"), named["w_down"]
            self._int8 = key, copy_of(*matrices, self.experts.plan.experts)
        return self._int8[1]

    def _expect(self, share: float | None) -> None:
        """Tell GPU kernels which executed share to expect, or with None to run what lists say and no more.

        Gradients are those of the listed experts, so that in training no others may run.
        """
        if "operands" in self._cache:
            names = operand_names(self.site)
            address = self._cache["operands"][names.index("w_up")].data_ptr()
            if share is None:
                EXPECTED.pop(address, None)
            else:
                if address not in EXPECTED:
                    weakref.finalize(self, EXPECTED.pop, address, None).atexit = False
                EXPECTED[address] = share

    def prepared(self, packs: bool, int8: bool = False) -> Prepared:
        """The site's operands as a kernel takes them, made anew whenever the weights changed.

        packs: whether kernels may keep a copy of the weights in an order of their own; int8: whether one
        token runs on an int8 copy.
        """
        key, held = self.fingerprint(), self._prepared.get((packs, int8))
        if held is None or held[0] != key:
            names = operand_names(self.site)
            values: dict[str, Any] = dict.fromkeys(native.SLABS)
            values.update(zip(names, self._operands(detach=True), strict=True))
            block = Prepared(**values, activation=self.site.activation, packs=packs, int8=int8)
            cpu.fill(block)
            self._prepared[packs, int8] = held = key, block
            self.steer()
        return held[1]

    @property
    def shareable(self) -> bool:
        """Whether the kernels of this site read a shared first router layer."""
        return shareable(native.spec_of(self.experts, self.weight("down").dtype))

    def layer(self, sharers: Sequence[State], packs: bool, int8: bool) -> Layer:
        """The first router layer that these sites share, this one first, as a kernel takes it."""
        key = (*map(id, sharers), packs, int8)
        blocks = [state.prepared(packs, int8) for state in sharers]
        held = self._layers.get(key)
        if held is None or any(a is not b for a, b in zip(held.blocks, blocks, strict=True)):
            held = self._layers[key] = Layer(blocks)
        return held

    def expected_share(self) -> float:
        """The executed share to expect at the present tau: of the forced masks, or as calibrated."""
        if self.forced is not None:
            return float(self.forced.float().mean())
        routed = self.experts.plan.experts * (1 - self._shared)
        return self._shared + (1 - self._shared) * calibrated_share(
            self.rule, self.tau, self.experts.stats, routed
        )

    @property
    def dense_rows(self) -> int:
        """Tokens of a call from which every expert runs, since few would be skipped; 0 for never."""
        return self.schedule.dense_rows(self.expected_share())

    def steer(self) -> None:
        """Bring the kernels' records up to date with tau, forced masks and measured schedules."""
        self._expect(self.expected_share())
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

    def renew(self, experts: Experts) -> None:
        """Go on with experts of the same site that were recorded anew from its weights as they are."""
        self.experts, self.learning = experts, None
        self.seen = self.fingerprint()
        self.release()

    def release(self) -> None:
        """Drop what was made for kernels: records, packed copies and int8 ones."""
        self._expect(None)
        self._int8 = None
        self._prepared.clear()
        self._layers.clear()
        self._cache.clear()

    @property
    def packed_bytes(self) -> int:
        """Bytes of the copies of the weights that kernels keep, 0 where they keep none."""
        prepared = (block for _, block in self._prepared.values())
        copies = (copy for block in prepared for copy in (block.packed, block.quantised))
        return self.int8_bytes + sum(copy.nbytes for copy in copies if copy is not None)

    @property
    def int8_bytes(self) -> int:
        """Bytes of the int8 copy that GPU kernels stream, 0 without one."""
        return 0 if self._int8 is None else self._int8[1].nbytes

    def _operands(self, *, detach: bool, form: Form = "ops") -> tuple[Tensor, ...]:
        weights = {role: self.weight(role) for role in self._weights}
        down = weights["down"]
        values = {
            name: (t.detach() if detach else t) for name, t in slabs(self.site, weights).items()
        }
        values["tau"] = self.tau_on(down.device)
        first = values["w_up"]
        for name, router in zip(("router1", "router2"), self.routers, strict=True):
            held = router.detach() if detach else router
            values[name] = held.to(first.device, first.dtype)
        if form == "learning":
            values["aims"] = self.learning.aims if self.learning is not None else first.new_zeros(3)
        return tuple(values[name] for name in operand_names(self.site, form))
