"""Put mixture-of-experts nodes into captured graphs: for the backend, and for programmatic use."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .attachment import State, lookup, recognise, register
from .capture import Captured, from_graph_module
from .errors import ConversionMismatchError, NoConversionError
from .ir import Conversion, Experts, Miss
from .passes import RULES, Match, match_all
from .passes.insert_moe import Inserted, insert_moe, operand_names
from .passes.verify import verify

log = logging.getLogger(__name__)


def match(captured: Captured) -> tuple[list[Match], list[Miss]]:
    """The sites of a graph in execution order, and one miss for each linear outside of them."""
    return match_all(captured, RULES)


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a graph whose new operands are trailing placeholders.

    Attributes:
        gm: the graph; it takes the old inputs followed by each converted match's operands.
        matches: the converted matches, in the order of their operands.
        inserted: the nodes that replaced each of them.
    """

    gm: GraphModule
    matches: tuple[Match, ...]
    inserted: tuple[Inserted, ...]


def rewrite_captured(captured: Captured, matches: Sequence[Match]) -> Rewritten:
    """Replace the given matches in a copy of the graph, operands as placeholders after all others."""
    gm, where = captured.copy()
    last = max((n for n in gm.graph.nodes if n.op == "placeholder"), key=list(gm.graph.nodes).index)
    inserted = []
    for index, found in enumerate(matches):
        operands: dict[str, Node] = {}
        for name in operand_names(found.site):
            with gm.graph.inserting_after(last):
                last = operands[name] = gm.graph.placeholder(f"d2d_{index}_{name}")
            last._dynamo_source = None  # AOTAutograd asks every placeholder
        inserted.append(insert_moe(gm.graph, found, operands, where.__getitem__))
    gm.recompile()
    verify(gm, len(matches))
    return Rewritten(gm, tuple(matches), tuple(inserted))


def rewrite(
    graph_module: GraphModule,
    conversion: Conversion,
    example_inputs: Sequence[Any] | None = None,
) -> GraphModule:
    """A copy of the graph with one mixture of experts per converted site, and the model's own weights.

    graph_module: from Dynamo, `torch.export.export(...).module()` or `torch.fx.symbolic_trace`. Its
    parameters are permuted in place if the conversion is not attached to them yet (their function is
    unchanged). Routers and tau become buffers named d2d_<site>_<operand>; tau follows `set_tau`.
    example_inputs: the inputs Dynamo gave with its graph, needed for graphs whose parameters are
    placeholders when rewriting outside of the backend call.

    Raises NoConversionError if no site of the graph has experts in the conversion, and
    ConversionMismatchError if the weights are not those that the conversion was made for.
    """
    captured = from_graph_module(graph_module, {}, example_inputs)
    matches, _ = match(captured)
    pairs = [
        (m, state) for m in matches if (state := state_of(captured, m, conversion)) is not None
    ]
    if not pairs:
        raise NoConversionError(
            f"The graph has {len(matches)} convertible sites, none of which belongs to the conversion "
            f"of {', '.join(conversion.experts) or 'no sites'}. Pass the conversion made for this "
            "model's weights, or make one with convert(model, batches)."
        )
    gm, where = captured.copy()
    for found, state in pairs:
        first = next(iter(gm.graph.nodes))
        operands = {}
        for name, value in zip(operand_names(state.site), state.operands(), strict=True):
            with gm.graph.inserting_before(first if found is pairs[0][0] else where[found.root]):
                operands[name] = _constant(gm, state, name, value)
        insert_moe(gm.graph, found, operands, where.__getitem__)
    gm.recompile()
    verify(gm, len(pairs))
    return gm


def _constant(gm: GraphModule, state: State, name: str, value: Tensor) -> Node:
    """A buffer that shares memory with the attached operand."""
    target = f"d2d_{state.site.name}_{name}".replace(".", "_")
    if not hasattr(gm, target):
        gm.register_buffer(target, value, persistent=False)
    return gm.graph.get_attr(target)


def state_of(captured: Captured, found: Match, conversion: Conversion | None) -> State | None:
    """The state attached to a match's weights, or attached now from `conversion` by their hashes."""
    weights = found.tensors(captured)
    state = lookup(weights["down"])
    if state is not None and state.owns(weights):
        return state
    return attach_by_weights(conversion, weights) if conversion is not None else None


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


def _fits(experts: Experts, weights: Mapping[str, Tensor]) -> bool:
    return {r: h["shape"] for r, h in experts.hashes.items()} == {
        role: list(weight.shape) for role, weight in weights.items()
    }


def dump(stage: str, gm: GraphModule) -> None:
    """Write a graph's code to the folder that D2D_DUMP names, if it is set."""
    folder = os.environ.get("D2D_DUMP")
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        number = len(list(path.glob("*.py")))
        (path / f"{number:03d}_{stage}.py").write_text(gm.print_readable(print_output=False))
        log.debug("wrote %s of stage %s", path, stage)
