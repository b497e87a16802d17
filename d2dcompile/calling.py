"""Call a compiled graph with the operands of the sites that it is called with the weights of.

Dynamo does not guard on which parameters a graph is called with: the same graph serves other layers and
other instances of a model. So each call looks every site's weights up. Inductor's freezing makes weights
attributes of the graph, on whose identity Dynamo does guard.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attachment import lookup
from .capture import Captured
from .errors import DenseFallbackWarning, NoConversionError, RuleError
from .ir import Plan
from .leaving import Watch, is_left
from .options import Options
from .passes import Match
from .passes.forms import Choice, Form
from .passes.share_routing import Shares
from .rewriting import parameter_places
from .state import State, meaning


@dataclass(frozen=True)
class Part:
    """A slot's part in sharing a first router layer in its graph.

    Attributes:
        leader: number of the slot whose layer it reads; None for its own.
        led: numbers of the slots that read its layer, its own first; none if no other does.
        width: features of its layer.
    """

    leader: int | None
    led: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, shares: Shares, index: int) -> Part:
        """The part of match number `index`."""
        leader = shares.leaders[index] if shares.follows(index) else None
        return cls(leader, shares.led(index), shares.widths[index])


@dataclass(frozen=True)
class Slot:
    """Where a compiled graph runs a converted site, whichever layer or model the weights come from.

    Attributes:
        places: which argument of the graph each of the site's weights is, by role.
        kind, meaning: what a site has to compute to run here.
        form: whether one kernel runs it or several ops, which take other operands.
        choice: how experts are chosen in the graph; a site's own has to be the same.
        plan: how many experts and router units the operands are of, where the graph knows.
        packs, int8: which copies of its weights a kernel may keep (see `Options`).
        part: its part in sharing a first router layer.
    """

    places: Mapping[str, int]
    kind: str
    meaning: str
    form: Form
    choice: Choice
    plan: Plan | None
    packs: bool
    int8: bool
    part: Part

    @classmethod
    def of(
        cls,
        captured: Captured,
        found: Match,
        form: Form,
        state: State,
        options: Options,
        part: Part,
    ) -> Slot:
        """The slot of a converted match."""
        places = parameter_places(captured, found)
        computed = meaning(found.activation)
        copies = options.pack, options.int8
        plan = None if form == "record" else state.experts.plan
        return cls(places, found.site.kind, computed, form, state.choice, plan, *copies, part)

    def state(self, args: Sequence[Any]) -> State | None:
        """The attached site that these arguments are the weights of, or None."""
        weights = {role: args[place] for role, place in self.places.items()}
        state = lookup(weights["down"])
        if state is None or (state.site.kind, state.meaning) != (self.kind, self.meaning):
            return None
        return state if state.owns(weights) else None

    def operands(self, state: State, states: Sequence[State]) -> tuple[Tensor, ...]:
        """The graph's operands for an attached site, among those of all slots."""
        copies = self.packs, self.int8
        if self.form == "record":
            record = state.prepared(*copies).record
            sharers = [states[i] for i in self.part.led]
            return (record, state.layer(sharers, *copies).record) if sharers else (record,)
        operands = state.operands(self.form)
        return operands if self.part.leader is None else operands[1:]  # all but router1


def operands_of(slots: Sequence[Slot], states: Sequence[State]) -> list[Tensor]:
    """The operands of all slots, in the order that the compiled graph takes them."""
    pairs = zip(slots, states, strict=True)
    return [operand for slot, state in pairs for operand in slot.operands(state, states)]


@dataclass(frozen=True)
class Looked:
    """The result of one look-up, and what it rests on: each weight's identity, memory and version.

    Nothing is kept alive by it: compiled graphs outlive models.
    """

    weights: tuple[tuple[int, weakref.ref[Tensor], int, int | None], ...]
    states: tuple[tuple[int, weakref.ref[State], str, float | None], ...]
    operands: tuple[weakref.ref[Tensor], ...]

    @classmethod
    def of(
        cls,
        slots: Sequence[Slot],
        found: Sequence[State],
        args: Sequence[Any],
        operands: Sequence[Tensor],
    ) -> Looked:
        """The look-up for a call with these arguments."""
        distinct = {place: args[place] for slot in slots for place in slot.places.values()}
        weights = tuple(
            (place, weakref.ref(w), w.data_ptr(), None if w.is_inference() else w._version)
            for place, w in distinct.items()
        )
        states = tuple(
            (slot.places["down"], weakref.ref(state), state.rule, state.exact)
            for slot, state in zip(slots, found, strict=True)
        )
        return cls(weights, states, tuple(map(weakref.ref, operands)))

    def operands_for(self, args: Sequence[Any]) -> list[Tensor] | None:
        """The operands of a call with these arguments, or None where it has to be looked up anew."""
        if not self.holds(args):
            return None
        held = [operand for ref in self.operands if (operand := ref()) is not None]
        return held if len(held) == len(self.operands) else None

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether it is still true of a call with these arguments; about 0.15 us a weight."""
        if torch.is_grad_enabled():
            return False
        for place, ref, address, version in self.weights:
            weight = ref()
            if weight is None or weight is not args[place] or weight.data_ptr() != address:
                return False
            if version is not None and weight._version != version:
                return False
        for place, held, rule, exact in self.states:
            state = held()
            if state is None or lookup(args[place]) is not state:
                return False
            if state.rule != rule or state.exact != exact:
                return False
        return True


class Dispatching:
    """A compiled graph that finds its sites' operands by the weights it is called with.

    Where a site has no conversion, or its experts are chosen in another way than the graph does it, the
    call is an error, or with strict=False runs the captured graph dense.
    """

    def __init__(
        self,
        captured: Captured,
        slots: Sequence[Slot],
        compiled: Callable[..., Any],
        options: Options,
        watch: Watch | None = None,
    ) -> None:
        """watch: of the blocks that the graph runs dense."""
        self._watch = watch
        self._dense = captured.gm.forward
        self._attributes = tuple(captured.tensors[node] for node in captured.attributes())
        self._slots = slots
        self._compiled = compiled
        self._options = options
        self._last: Looked | None = None
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        weights = args + self._attributes
        if self._watch is not None:
            self._watch.check(weights)
        last = self._last  # once: another thread may replace it
        kept = last.operands_for(weights) if last is not None else None
        if kept is not None:
            return self._compiled(*args, *kept)
        states = self._look_up(weights)
        if states is None:
            return self._run_dense(args, weights)
        operands = operands_of(self._slots, states)
        if not torch.is_grad_enabled() and not any(state.learning for state in states):
            self._last = Looked.of(self._slots, states, weights, operands)
        return self._compiled(*args, *operands)

    def _look_up(self, weights: Sequence[Any]) -> list[State] | None:
        """The site that each slot's weights belong to; None if one has no conversion or another rule."""
        found: list[State] = []
        for slot in self._slots:
            state = slot.state(weights)
            if state is None or self._chooses_otherwise(slot, state):
                return None
            if self._stands_alone(slot.part, state, found):
                return None
            if not self._options.trainable:
                state.check()
            if (
                state.applied is None
            ):  # a graph of another layer's or instance's, which applied its own
                state.apply(self._options.tau)
            found.append(state)
        return found

    def _chooses_otherwise(self, slot: Slot, state: State) -> bool:
        """Whether a site has other experts than this graph, or another choice; an error when strict."""
        if slot.plan not in (None, state.experts.plan):
            if self._options.strict:
                raise RuleError(
                    f"A graph compiled for {slot.plan} was called for site {state.site.name!r} with "
                    f"{state.experts.plan}. Expected conversions of one Config for layers and models that "
                    "share one compiled graph, or torch.compiler.reset() between them."
                )
            return True
        if state.choice == slot.choice:
            return False
        if self._options.strict:
            raise RuleError(
                f"A graph compiled for {slot.choice} was called for site {state.site.name!r} with "
                f"{state.choice}. Layers that share one compiled graph need one rule: set it with "
                "set_rule(model, rule, value) for all of them, or compile them apart."
            )
        return True

    def _stands_alone(self, part: Part, state: State, earlier: Sequence[State]) -> bool:
        """Whether a site has another first router layer than the one this graph shares; as above."""
        if part.leader is None:
            return False
        leader = earlier[part.leader]
        if state.shares_with(leader) and state.experts.plan.router_width == part.width:
            return False
        if self._options.strict:
            raise RuleError(
                f"A graph compiled for sites that share a first router layer of {part.width} features "
                f"was called for {leader.site.name!r} and {state.site.name!r}, which do not. Layers and "
                "models that share one compiled graph need conversions with the same "
                "Config.share_routers and router_width, or torch.compiler.reset() between them."
            )
        return True

    def names(self, args: Sequence[Any]) -> list[str]:
        """The names of the sites that a call with these arguments runs."""
        weights = (*args, *self._attributes)
        found = (lookup(weights[slot.places["down"]]) for slot in self._slots)
        return [state.site.name for state in found if state is not None]

    def _run_dense(self, args: Sequence[Any], weights: Sequence[Any]) -> Any:
        """The captured graph as it was, for weights without a conversion; an error when strict.

        Blocks that a conversion leaves out may have the shapes and strides of converted ones.
        """
        blocks = [[weights[place] for place in slot.places.values()] for slot in self._slots]
        free = all(lookup(weights[slot.places["down"]]) is None for slot in self._slots)
        if free and all(map(is_left, blocks)):
            return self._dense(*args)
        message = (
            "A graph compiled for converted weights was called with weights that have no conversion: "
            "another instance of the model, a swapped parameter, or after detach(). Call "
            "d2dcompile.convert(model, batches) or load(folder).attach(model) for them"
        )
        if self._options.strict:
            raise NoConversionError(
                f'{message}, or pass options={{"strict": False}} to run such calls dense.'
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{message}. Running dense, uncompiled.", DenseFallbackWarning, stacklevel=3
            )
        return self._dense(*args)
