"""The torch.compile backend: capture -> match -> rewrite -> lower, top to bottom in `backend`.

    torch.compile(model, backend="d2dmoe", options={"conversion": ..., "tau": ..., "strict": ...})

Registered by the entry point `torch_dynamo_backends: d2dmoe` alone; registering the same function by
decorator too makes torch refuse the name.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis
from torch._guards import TracingContext
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from .attachment import attached_shapes, lookup, owner
from .calling import Dispatching, Part, Slot, operands_of
from .capture import Captured, from_dynamo
from .dumping import dump
from .errors import D2DError, DenseFallbackWarning, NoConversionError
from .ir import Conversion, Miss
from .leaving import DenseGraph, Watch, is_left
from .lowering import lower
from .options import Options
from .passes import Match
from .passes.names import TRANSPOSES, argument, op_name
from .reading import load
from .recognising import knows, state_of, states_of
from .rewriting import match, parameter_places, rewrite_captured, shared
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
        dense = [m for m in matches if m.site.convertible and m.site.name not in states]
        watch = _watch(captured, dense, chosen)
        if not converted:
            compiled = _inner(gm, example_inputs, chosen, mode)
            attributes = [captured.tensors[node] for node in captured.attributes()]
            return compiled if watch is None else DenseGraph(compiled, attributes, watch)
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
        return Dispatching(captured, slots, compiled, chosen, watch)
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
    """Warn of matrices that are multiplied by, no parameters and of the shapes of a converted site's."""
    names: dict[tuple[int, ...], list[str]] = {}
    for node in captured.placeholders():
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor) or isinstance(value, Parameter) or not _multiplied(node):
            continue
        sizes = tuple(value.shape)
        if all(type(size) is int for size in sizes):  # comparing a symbol would fix it
            names.setdefault(sizes, []).append(captured.name(node))
    have = Counter({sizes: len(found) for sizes, found in names.items()})
    for site in attached_shapes() if names else ():
        if site and site <= have:
            listed = " and ".join(f"{names[sizes][0]} {list(sizes)}" for sizes in sorted(site))
            warnings.warn(
                f"This graph has matrices of a converted site's shapes that are not Parameters: {listed}. "
                "Sites are found by their own parameters: a block made of these runs dense. "
                "torch.func.functional_call with other tensors and replicas of nn.DataParallel do so: call "
                "the model itself, or use DistributedDataParallel.",
                DenseFallbackWarning,
                stacklevel=2,
            )
            return


def _multiplied(node: Node) -> bool:
    """Whether a product of the graph has this node, or it transposed, as its second matrix."""
    for user in node.users:
        name = op_name(user)
        if name in TRANSPOSES and _multiplied(user):
            return True
        place = {"linear": 1, "matmul": 1, "mm": 1, "addmm": 2}.get(name)
        if place is not None and argument(user, place, "weight") is node:
            return True
    return False


def _watch(captured: Captured, dense: Sequence[Match], options: Options) -> Watch | None:
    """What notices that the graph is called with the weights of converted blocks where these are."""
    places = [parameter_places(captured, found)["down"] for found in dense]
    weights = [found.tensors()["down"] for found in dense]
    return Watch(places, weights, lookup, options.strict) if dense else None


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
    sites = [m for m in matches if m.site.convertible and not _stays_dense(m, conversion)]
    states: dict[str, State] = {}
    fresh = False
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


def _stays_dense(found: Match, conversion: Conversion | None) -> bool:
    """Whether a block has no attached site and is one that the conversion leaves dense."""
    tensors = found.tensors()
    if lookup(tensors["down"]) is not None:
        return False
    if is_left(tensors.values()):
        return True
    if conversion is None or found.site.name not in conversion.dense:
        return False
    # Names are relative to the compiled module: a converted block may have that of another one.
    return not knows(conversion, tensors)


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
