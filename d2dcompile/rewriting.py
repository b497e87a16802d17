"""Put mixture-of-experts nodes into captured graphs: for the backend, and for programmatic use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .capture import Body, Captured, from_graph_module
from .errors import NoConversionError
from .ir import Conversion, Miss
from .passes import Match, match_all, rules
from .passes.forms import ROUTED, Choice, Form, operand_names
from .passes.insert_group import Groups
from .passes.insert_moe import Inserted, insert_moe
from .passes.share_routing import Shares, in_parts, same_inputs
from .passes.verify import verify
from .recognising import states_of
from .state import State

log = logging.getLogger(__name__)


def match(captured: Captured) -> tuple[list[Match], list[Miss]]:
    """The sites of a graph in execution order, and one miss for each linear outside of them.

    Names are relative to the module that Dynamo found, so that two models of one function may have equal
    ones: later ones get "#2" and so on.
    """
    found, misses = match_all(captured, *rules())
    return _told_apart(found), misses


def _told_apart(found: Sequence[Match]) -> list[Match]:
    """The matches, with other names for those that have another one's name and not its weights."""
    owners: dict[str, list[int]] = {}
    apart = []
    for one in found:
        own, name, count = [id(tensor) for tensor in one.tensors().values()], one.site.name, 1
        while owners.setdefault(name, own) != own:
            count += 1
            name = f"{one.site.name}#{count}"
        renamed = name != one.site.name
        apart.append(replace(one, site=replace(one.site, name=name)) if renamed else one)
    return apart


NO_FORMS: Mapping[str, Form] = {}
NO_CHOICES: Mapping[str, Choice] = {}


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a graph whose new operands are trailing placeholders.

    Attributes:
        gm: the graph; it takes the old inputs followed by each converted match's operands.
        matches: the converted matches, in the order of their operands.
        inserted: the nodes that replaced each of them.
        shares: which of them share a first router layer, and calls.
    """

    gm: GraphModule
    matches: tuple[Match, ...]
    inserted: tuple[Inserted, ...]
    shares: Shares


def rewrite_captured(
    captured: Captured,
    matches: Sequence[Match],
    forms: Mapping[str, Form] = NO_FORMS,
    choices: Mapping[str, Choice] = NO_CHOICES,
    shares: Shares | None = None,
) -> Rewritten:
    """Replace the given matches in a copy of the graph, operands as placeholders after all others.

    forms: what stands for each site, by name; separate ops where it is not said. choices: how its experts
    are chosen, by name; by the router and the rule "max" where it is not said. shares: what `shared` says
    of the matches; without it none shares its router's first layer.
    """
    alone = Shares(tuple(range(len(matches))), (0,) * len(matches))
    shares = alone if shares is None else shares

    def placeholders(gm: GraphModule, index: int, found: Match) -> dict[str, Node]:
        operands: dict[str, Node] = {}
        form = forms.get(found.site.name, "ops")
        part = shares.follows(index), bool(shares.led(index))
        for name in operand_names(found.site, form, *part):
            operands[name] = add_placeholder(gm.graph, f"d2d_{index}_{name}")
        return operands

    gm, inserted = _replaced(captured, matches, placeholders, shares, forms, choices)
    verify(gm, len(matches))
    return Rewritten(gm, tuple(matches), inserted, shares)


def shared(
    matches: Sequence[Match], states: Sequence[State], forms: Mapping[str, Form] = NO_FORMS
) -> Shares:
    """Which matches share a first router layer in a graph: those that read one x and hold one router1.

    Both have to have one form, and one in which that layer can be shared: not "routed" or "int8", whose op
    reads x, and "record" where rows need no padding. Those of the form "grouped" are also routed in one
    call if they read one x, and their experts run in one if they compute the same function of weights of one
    dtype.
    """
    kinds = [forms.get(found.site.name, "ops") for found in matches]

    def alike(first: int, later: int) -> bool:
        if kinds[first] != kinds[later] or not states[later].shares_with(states[first]):
            return False
        if kinds[later] == "record":
            return states[first].shareable and states[later].shareable
        if kinds[later] in ROUTED:
            name = matches[later].site.name
            log.info("site %s routes by itself: its op computes both router layers", name)
        return kinds[later] not in ROUTED

    def routed(first: int, later: int) -> bool:
        one, other = (states[i].weight("down") for i in (first, later))
        alike = (one.device, one.dtype) == (other.device, other.dtype)
        return kinds[first] == kinds[later] == "grouped" and alike

    def together(first: int, later: int) -> bool:
        one, other = matches[first], matches[later]
        return (
            kinds[first] == "grouped"
            and routing[first] == routing[later]
            and (one.site.kind, one.activation) == (other.site.kind, other.activation)
            and not any(found.scalars or found.noise is not None for found in (one, other))
        )

    widths = tuple(state.experts.plan.router_width for state in states)
    leaders = same_inputs(matches, alike)
    if "grouped" not in kinds:
        return Shares(leaders, widths)
    routing = in_parts(same_inputs(matches, routed))
    return Shares(leaders, widths, routing, same_inputs(matches, together))


def _replaced(
    captured: Captured,
    matches: Sequence[Match],
    operands_of: Callable[[GraphModule, int, Match], dict[str, Node]],
    shares: Shares,
    forms: Mapping[str, Form] = NO_FORMS,
    choices: Mapping[str, Choice] = NO_CHOICES,
) -> tuple[GraphModule, tuple[Inserted, ...]]:
    """A copy of the graph with matches replaced, also in its bodies; what was inserted for each match.

    operands_of: makes the operand nodes of match number i at the start of the copied graph. shares: see
    `shared`.
    """
    copies = captured.copies()
    gm = copies[id(captured)][0]
    operands = [operands_of(gm, i, found) for i, found in enumerate(matches)]
    for i, found in enumerate(matches):
        for body in _path(captured, found):
            operands[i] = _passed(body, copies, operands[i])
    groups = Groups(shares, matches, operands)
    inserted: list[Inserted] = []
    for i, found in enumerate(matches):
        own, where = copies[id(found.captured)]
        form, choice = forms.get(found.site.name, "ops"), choices.get(found.site.name, Choice())
        hidden = inserted[shares.leaders[i]].hidden if shares.follows(i) else None
        at, width = where.__getitem__, shares.widths[i]
        given = groups.given(i, own.graph, at)
        done = insert_moe(own.graph, found, operands[i], at, form, choice, hidden, width, given)
        inserted.append(done)
    for copied, _ in copies.values():
        copied.recompile()
    return gm, tuple(inserted)


def _path(captured: Captured, found: Match) -> list[Body]:
    """The bodies, from the outermost, that a match is inside of."""
    path: list[Body] = []
    while captured is not found.captured:
        path.append(next(b for b in captured.bodies if b.captured.holds(found.captured)))
        captured = path[-1].captured
    return path


def _passed(
    body: Body,
    copies: Mapping[int, tuple[GraphModule, dict[Node, Node]]],
    operands: Mapping[str, Node],
) -> dict[str, Node]:
    """New placeholders of a body for the operands, which its call passes on."""
    inner = copies[id(body.captured)][0]
    call = next(where[body.call] for _, where in copies.values() if body.call in where)
    call.args = (*call.args, *operands.values())
    return {name: add_placeholder(inner.graph, node.name) for name, node in operands.items()}


def add_placeholder(graph: Graph, name: str) -> Node:
    """A new last placeholder of a graph."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    first = next(iter(graph.nodes))
    with graph.inserting_after(last[0]) if last else graph.inserting_before(first):
        node = graph.placeholder(name)
    node._dynamo_source = None  # AOTAutograd asks every placeholder
    # At one address as parameters are: CUDA graphs then read it in place instead of a copy a replay.
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return node


def parameter_places(captured: Captured, found: Match) -> dict[str, int]:
    """Which input of the outermost graph each of a match's parameters is, by role.

    Parameters that are attributes of the graph are counted after its inputs.
    """
    index = {node: i for i, node in enumerate(captured.placeholders() + captured.attributes())}
    nodes = found.roles()
    for body in reversed(_path(captured, found)):
        nodes = {role: body.outer[node] for role, node in nodes.items()}
    return {role: index[node] for role, node in nodes.items()}


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

    The result goes on as it is where the model is detached or converted again later, with the weights of
    then.

    Raises NoConversionError if no site of the graph has experts in the conversion, and
    ConversionMismatchError if the weights are not those that the conversion was made for, or have
    another one attached.
    """
    captured = from_graph_module(graph_module, {}, example_inputs)
    matches, _ = match(captured)
    sites = [found for found in matches if found.site.convertible]
    found_states = states_of(sites, conversion)
    pairs = [(m, state) for m, state in zip(sites, found_states, strict=True) if state is not None]
    if not pairs:
        raise NoConversionError(
            f"The graph has {len(sites)} convertible sites, none of which belongs to the conversion "
            f"of {', '.join(conversion.experts) or 'no sites'}. Pass the conversion made for this "
            "model's weights, or make one with convert(model, batches)."
        )

    found_in = [found for found, _ in pairs]
    shares = shared(found_in, [state for _, state in pairs])

    def buffers(gm: GraphModule, index: int, found: Match) -> dict[str, Node]:
        state, operands = pairs[index][1], {}
        values = dict(zip(operand_names(state.site), state.operands(), strict=True))
        for name in operand_names(state.site, follows=shares.follows(index)):
            value = values[name]
            with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
                operands[name] = _constant(gm, state, name, value)
        return operands

    choices = {found.site.name: state.choice for found, state in pairs}
    gm, _ = _replaced(captured, found_in, buffers, shares, choices=choices)
    verify(gm, len(pairs))
    for _, state in pairs:
        state.rewritten = True
    return gm


def _constant(gm: GraphModule, state: State, name: str, value: Tensor) -> Node:
    """A buffer that shares memory with the attached operand."""
    target = f"d2d_{state.site.name}_{name}".replace(".", "_")
    if not hasattr(gm, target):
        # A parameter itself would follow where `detach` points it to.
        alias = value.view_as(value) if isinstance(value, nn.Parameter) else value
        gm.register_buffer(target, alias, persistent=False)
    return gm.graph.get_attr(target)
