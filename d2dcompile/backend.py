"""The torch.compile backend: capture -> match -> rewrite -> lower, top to bottom in `backend`.

    torch.compile(model, backend="d2dmoe", options={"conversion": ..., "tau": ..., "strict": ...})

Registered by the entry point `torch_dynamo_backends: d2dmoe` alone; registering the same function by
decorator too makes torch refuse the name.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis
from torch._guards import TracingContext
from torch.fx import GraphModule

from .attachment import State, check_tau, lookup, meaning, owner
from .capture import Captured, from_dynamo
from .errors import D2DError, DenseFallbackWarning, NoConversionError, OptionError
from .ir import Conversion, Miss
from .lowering import lower
from .passes import Match
from .rewriting import dump, match, parameter_places, rewrite_captured, state_of

log = logging.getLogger(__name__)

INNER = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """What `options=` of torch.compile may hold.

    Attributes:
        conversion: a Conversion or the folder of a saved one, attached to the weights that carry its
            hashes; without it the conversion already attached to the model is used.
        tau: threshold to set on every site when a graph is compiled; None keeps the sites' own.
        strict: whether convertible sites without a conversion are an error (True) or run dense with
            one warning (False).
        inner: who compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        pack: whether CPU kernels may keep a copy of each converted block's weights in an order of their
            own, made when a block first gets more than one token (as Inductor's freezing does);
            without, they reorder what they read at every call. One token never needs the copy.
        int8: whether calls of one token run on int8 copies of the converted blocks' weights, made at the
            first such call, with the token and the hidden values rounded to int8 too. Lossy: a block's
            output is a relative .01 to .02 off with random weights, .01 to .03 in MiniLM, at tau = 0 as
            well. Routing, calls of more tokens, and blocks that no CPU kernel runs are as without.
        trainable: whether the weights may change, as in fine-tuning; turns off the check that they
            are still those of the conversion.
    """

    conversion: Conversion | str | PathLike[str] | None = None
    tau: float | None = None
    strict: bool = True
    inner: str = "inductor"
    pack: bool = True
    int8: bool = False
    trainable: bool = False

    def __post_init__(self) -> None:
        if self.tau is not None:
            check_tau(self.tau)
        for name in ("strict", "pack", "int8", "trainable"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"Option {name!r} is {getattr(self, name)!r}; expected a bool.")
        if self.inner not in INNER:
            raise OptionError(
                f"Option 'inner' is {self.inner!r}; expected one of {', '.join(INNER)}."
            )
        if not isinstance(self.conversion, (Conversion, str, PathLike, type(None))):
            raise OptionError(
                f"Option 'conversion' is a {type(self.conversion).__name__}; expected a Conversion or "
                "the folder that Conversion.save wrote."
            )

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """The options, each known and of its type; OptionError says which are not."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(
                f"Unknown option {', '.join(map(repr, unknown))} for backend 'd2dmoe'; "
                f"expected some of: {', '.join(known)}."
            )
        return cls(**given)


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph with its converted sites as mixtures of experts.

    gm, example_inputs: what torch.compile gives a backend; parameters are inputs. options: see
    `Options`; mode: as for Inductor. Returns a callable with the graph's inputs and outputs.

    Raises OptionError, NoConversionError, ConversionMismatchError, ArtifactError and TauError.
    """
    try:
        chosen = _options(options, mode, unknown)
        captured = from_dynamo(gm, example_inputs, {})
        dump("capture", gm)
        matches, misses = match(captured)
        states = _states(captured, matches, chosen)
        converted = [m for m in matches if m.site.name in states]
        _warn_of_unmatched(captured, states.values(), misses)
        if not converted:
            return _inner(gm, example_inputs, chosen, mode)
        at_once = lower(converted, states, chosen.pack, chosen.int8, chosen.inner == "inductor")
        rewritten = rewrite_captured(captured, converted, at_once)
        dump("rewritten", rewritten.gm)
        running = [
            Running(states[m.site.name], m.site.name in at_once, chosen.pack, chosen.int8)
            for m in converted
        ]
        extra = [t for site in running for t in site.operands()]
        compiled = _inner(
            rewritten.gm, [*example_inputs, *map(_of_fixed_shape, extra)], chosen, mode
        )
        log.info("%d of %d sites run as experts", len(converted), len(matches))
        return Dispatching(captured, converted, compiled, chosen, at_once)
    except D2DError as error:
        raise _plain(error) from error.__cause__


def _warn_of_unmatched(
    captured: Captured, running: Iterable[State], misses: Sequence[Miss]
) -> None:
    """Warn of converted sites whose weights are in the graph, but not as a block that matches."""
    names = {state.site.name for state in running}
    reasons: dict[str, str] = {}
    for miss in misses:
        reasons.setdefault(miss.weight, miss.reason)
    by_weight = {id(tensor): captured.name(node) for node, tensor in captured.tensors.items()}
    for tensor in captured.tensors.values():
        state = owner(tensor)
        if state is not None and state.site.name not in names:
            names.add(state.site.name)
            down = by_weight.get(id(state.weights()["down"]), "")
            why = reasons.get(down, "no linear of this graph reads its down weight")
            warnings.warn(
                f"Site {state.site.name!r} is converted but runs dense in this graph: {why}. Its neurons "
                "are in expert order: code that reads one of its weights alone gets another result than "
                "before the conversion.",
                DenseFallbackWarning,
                stacklevel=2,
            )


def _options(
    options: Mapping[str, Any] | None, mode: str | None, unknown: Mapping[str, Any]
) -> Options:
    if unknown:
        raise OptionError(f"Unknown argument {sorted(unknown)} for backend 'd2dmoe'.")
    if mode not in (None, *MODES):
        raise OptionError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    chosen = Options.parse(options or {})
    if mode not in (None, "default") and chosen.inner != "inductor":
        raise OptionError(f"mode {mode!r} needs inner 'inductor', not {chosen.inner!r}.")
    return chosen


def _plain(error: D2DError) -> D2DError:
    """The same error of the same type, in a form that Dynamo passes on instead of wrapping it."""
    if isinstance(error, ShortenTraceback):
        return error
    parts = {"__module__": __name__, "__init__": Exception.__init__, "first_useful_frame": None}
    kind = type(type(error).__name__, (type(error), ShortenTraceback), parts)
    plain: D2DError = kind(*error.args)
    return plain


def _states(captured: Captured, matches: Sequence[Match], options: Options) -> dict[str, State]:
    """{site name: attached state} of the matches that have one, attaching `conversion` if given."""
    conversion = _load(options.conversion)
    states: dict[str, State] = {}
    fresh = False
    sites = [found for found in matches if found.site.convertible]
    for found in sites:
        state = state_of(found, None)
        if state is None and conversion is not None:
            state = state_of(found, conversion)
            fresh |= state is not None
        if state is not None:
            states[found.site.name] = state
            if options.tau is not None and state.applied != options.tau:
                state.applied = options.tau  # once, so that a recompilation keeps a later set_tau
                state.set_tau(options.tau)
    if fresh and TracingContext.try_get() is not None:
        # Attaching changed the strides of weights, which Dynamo recorded before and guards on.
        raise TensorifyScalarRestartAnalysis(restart_reason="d2dmoe attached a conversion")
    if sites and not states:
        names = ", ".join(found.site.name for found in sites)
        message = (
            f"No conversion for the {len(sites)} convertible sites of this graph ({names}). Call "
            "d2dcompile.convert(model, batches) or d2dcompile.load(folder).attach(model) first, or "
            'pass options={"conversion": folder}.'
        )
        if options.strict:
            raise NoConversionError(
                message + ' To run dense instead, pass options={"strict": False}.'
            )
        warnings.warn(message + " Running dense.", DenseFallbackWarning, stacklevel=2)
    return states


def _load(conversion: Conversion | str | PathLike[str] | None) -> Conversion | None:
    if conversion is None or isinstance(conversion, Conversion):
        return conversion
    from .artifact import load

    return load(conversion)


def _of_fixed_shape(operand: Tensor) -> Tensor:
    """A fake tensor in place of an operand while compiling, so that its sizes are not made symbols.

    AOTAutograd makes symbols of all sizes of a tensor that Dynamo did not see, and Inductor then fails on
    what training saves of them (torch 2.13: "expected [s21] to have been codegen-ed").
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    return operand if mode is None else mode.from_tensor(operand, static_shapes=True)


def _inner(
    gm: GraphModule, inputs: Sequence[Any], options: Options, mode: str | None
) -> Callable[..., Any]:
    """Compile a graph with the inner backend."""
    if options.inner == "eager":
        return gm.forward
    if options.inner == "aot_eager":
        aot: Any = torch._dynamo.lookup_backend("aot_eager")
        run: Callable[..., Any] = aot(gm, list(inputs))
        return run
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = None if mode in (None, "default") else list_mode_options(mode)
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    lowered: Callable[..., Any] = compiled
    return lowered


@dataclass(frozen=True)
class Running:
    """A site as a compiled graph runs it: by one kernel or by separate ops, which take other operands."""

    state: State
    at_once: bool
    packs: bool
    int8: bool

    def operands(self) -> tuple[Tensor, ...]:
        """The graph's operands for this site."""
        if self.at_once:
            return (self.state.prepared(self.packs, self.int8).record,)
        return self.state.operands()


@dataclass(frozen=True)
class Looked:
    """The result of one look-up, and what it rests on: each weight's identity, memory and version."""

    weights: tuple[tuple[int, weakref.ref[Tensor], int, int | None], ...]
    states: tuple[tuple[int, weakref.ref[State]], ...]
    operands: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        running: Sequence[Running],
        places: Sequence[Mapping[str, int]],
        args: Sequence[Any],
        operands: Sequence[Tensor],
    ) -> Looked:
        """The look-up for a call; places: which argument each of a site's weights is, by role."""
        distinct = {place: args[place] for site in places for place in site.values()}
        weights = tuple(
            (place, weakref.ref(w), w.data_ptr(), None if w.is_inference() else w._version)
            for place, w in distinct.items()
        )
        states = tuple(
            (site["down"], weakref.ref(r.state)) for site, r in zip(places, running, strict=True)
        )
        return cls(weights, states, operands)

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
        return all(lookup(args[place]) is ref() is not None for place, ref in self.states)


class Dispatching:
    """A compiled graph that finds its sites' operands by the weights it is called with.

    Dynamo does not guard on which parameters a graph is called with: the same graph serves other
    layers and other instances of a model. So each call looks every site's weights up; where a site
    has no conversion, the call is an error, or with strict=False runs the captured graph dense.
    Inductor's freezing makes weights attributes of the graph, on whose identity Dynamo does guard.
    """

    def __init__(
        self,
        captured: Captured,
        matches: Sequence[Match],
        compiled: Callable[..., Any],
        options: Options,
        at_once: Container[str],
    ) -> None:
        self._dense = captured.gm.forward
        self._attributes = tuple(captured.tensors[node] for node in captured.attributes())
        self._compiled = compiled
        self._options = options
        self._sites = [tuple(parameter_places(captured, m).items()) for m in matches]
        self._kinds = [(m.site.kind, meaning(m.activation)) for m in matches]
        self._at_once = [m.site.name in at_once for m in matches]
        self._last: Looked | None = None
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        weights = args + self._attributes
        if self._last is not None and self._last.holds(weights):
            return self._compiled(*args, *self._last.operands)
        running = self._look_up(weights)
        if running is None:
            return self._run_dense(args)
        extra = [operand for site in running for operand in site.operands()]
        if not torch.is_grad_enabled():
            places = [dict(roles) for roles in self._sites]
            self._last = Looked.of(running, places, weights, extra)
        return self._compiled(*args, *extra)

    def _look_up(self, args: Sequence[Any]) -> list[Running] | None:
        """The sites that these arguments are the weights of; None if one has no conversion."""
        found: list[Running] = []
        for roles, kind, at_once in zip(self._sites, self._kinds, self._at_once, strict=True):
            weights = {role: args[place] for role, place in roles}
            state = lookup(weights["down"])
            if state is None or (state.site.kind, state.meaning) != kind or not state.owns(weights):
                return None
            if not self._options.trainable:
                state.check()
            found.append(Running(state, at_once, self._options.pack, self._options.int8))
        return found

    def names(self, args: Sequence[Any]) -> list[str]:
        """The names of the sites that a call with these arguments runs."""
        weights = (*args, *self._attributes)
        found = (lookup(weights[dict(roles)["down"]]) for roles in self._sites)
        return [state.site.name for state in found if state is not None]

    def _run_dense(self, args: Sequence[Any]) -> Any:
        """The captured graph as it was, for weights without a conversion; an error when strict."""
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
