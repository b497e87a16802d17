"""The torch.compile backend: capture -> match -> rewrite -> lower, top to bottom in `backend`.

    torch.compile(model, backend="d2dmoe", options={"conversion": ..., "tau": ..., "strict": ...})

Registered by the entry point `torch_dynamo_backends: d2dmoe` alone; registering the same function by
decorator too makes torch refuse the name.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch.nn import Parameter

from .attachment import attached_shapes, lookup, owner
from .calling import Dispatching, Part, Slot, operands_of
from .capture import Captured, from_dynamo
from .dumping import dump
from .errors import D2DError, DenseFallbackWarning, NoConversionError
from .ir import Conversion, Miss
from .leaving import DenseGraph, is_left
from .lowering import lower
from .options import Options
from .passes import Match
from .reading import load
from .rewriting import match, parameter_places, rewrite_captured, shared, state_of, states_of
from .state import State

log = logging.getLogger(__name__)


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
    `d2dcompile.options`; mode: as for Inductor. Returns a callable with the graph's inputs and outputs.

    Raises OptionError, NoConversionError, ConversionMismatchError, ArtifactError and TauError.
    """
    try:
        chosen = Options.parse(options, mode, unknown)
        captured = from_dynamo(gm, example_inputs, {})
        dump("capture", gm)
        matches, misses = match(captured)
        states = _states(captured, matches, chosen)
        converted = [m for m in matches if m.site.name in states]
        _warn_of_unmatched(captured, states.values(), misses)
        _warn_of_other_tensors(captured)
        if not converted:
            return _dense(captured, matches, _inner(gm, example_inputs, chosen, mode), chosen)
        forms = lower(converted, states, chosen.pack, chosen.int8, chosen.inner == "inductor")
        choices = {name: state.choice for name, state in states.items()}
        shares = shared(converted, [states[m.site.name] for m in converted], forms)
        rewritten = rewrite_captured(captured, converted, forms, choices, shares)
        dump("rewritten", rewritten.gm)
        slots = [
            Slot.of(
                captured, m, forms[m.site.name], states[m.site.name], chosen,
                Part.of(shares, i),
            )
            for i, m in enumerate(converted)
        ]  # fmt: skip
        extra = operands_of(slots, [states[m.site.name] for m in converted])
        inputs = [*example_inputs, *map(_of_fixed_shape, extra)]
        compiled = _inner(rewritten.gm, inputs, chosen, mode)
        log.info("%d of %d sites run as experts", len(converted), len(matches))
        return Dispatching(captured, slots, compiled, chosen)
    except D2DError as error:
        raise _plain(error) from error.__cause__


def _warn_of_unmatched(
    captured: Captured, running: Iterable[State], misses: Sequence[Miss]
) -> None:
    """Warn of converted sites whose weights are in the graph, but not as a block that matches."""
    seen = {id(state) for state in running}
    reasons: dict[str, str] = {}
    for miss in misses:
        reasons.setdefault(miss.weight, miss.reason)
    by_weight = {id(tensor): captured.name(node) for node, tensor in captured.tensors.items()}
    for tensor in captured.tensors.values():
        state = owner(tensor)
        if state is not None and id(state) not in seen:
            seen.add(id(state))
            down = by_weight.get(id(state.weights()["down"]), "")
            why = reasons.get(down, "no linear of this graph reads its down weight")
            warnings.warn(
                f"Site {state.site.name!r} is converted but runs dense in this graph: {why}. Its neurons "
                "are in expert order: code that reads one of its weights alone gets another result than "
                "before the conversion.",
                DenseFallbackWarning,
                stacklevel=2,
            )


def _warn_of_other_tensors(captured: Captured) -> None:
    """Warn of matrices that are no parameters and together have the shapes of a converted site's."""
    shapes: dict[tuple[int, ...], str] = {}
    for node in captured.placeholders():
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and not isinstance(value, Parameter) and value.dim() > 1:
            sizes = tuple(value.shape)
            if all(type(size) is int for size in sizes):  # comparing a symbol would fix it
                shapes.setdefault(sizes, captured.name(node))
    for site in attached_shapes() if shapes else ():
        if site and site <= shapes.keys():
            listed = " and ".join(f"{shapes[size]} {list(size)}" for size in sorted(site))
            warnings.warn(
                f"This graph has matrices of a converted site's shapes that are not Parameters: {listed}. "
                "Sites are found by their own parameters: a block made of these runs dense. "
                "torch.func.functional_call with other tensors and replicas of nn.DataParallel do so: call "
                "the model itself, or use DistributedDataParallel.",
                DenseFallbackWarning,
                stacklevel=2,
            )
            return


def _dense(
    captured: Captured, matches: Sequence[Match], compiled: Callable[..., Any], options: Options
) -> Callable[..., Any]:
    """A graph without experts, which notices a call with the weights of a converted block."""
    sites = [found for found in matches if found.site.convertible]
    if not sites:
        return compiled
    places = [parameter_places(captured, found)["down"] for found in sites]
    weights = [found.tensors()["down"] for found in sites]
    attributes = [captured.tensors[node] for node in captured.attributes()]
    return DenseGraph(compiled, places, weights, attributes, lookup, options.strict)


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
    dense = () if conversion is None else conversion.dense
    sites = [
        found
        for found in matches
        if found.site.convertible
        and found.site.name not in dense
        and not is_left(found.tensors()["down"])
    ]
    before = [state_of(found, None) for found in sites]
    for found, held, state in zip(sites, before, states_of(sites, conversion), strict=True):
        fresh |= state is not held
        if state is not None:
            states[found.site.name] = state
            state.apply(options.tau)
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
