"""Captured graph: an FX graph with the tensors and names behind its parameter nodes.

One form for the three ways to capture: Dynamo (parameters are placeholders whose example inputs are
the real Parameters), torch.export and torch.fx.symbolic_trace (parameters are get_attr nodes, and
calls of torch.nn modules are inlined first, so that matchers see functions only).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer

from .composites import expand, has_composites


@dataclass(frozen=True)
class Captured:
    """A graph module, its parameter tensors by node, and their names by identity.

    Attributes:
        gm: the graph; never edited, rewrites work on `copy()`.
        tensors: {placeholder or get_attr node: Parameter or buffer}.
        names: {id(tensor): fully qualified name}; a tensor without one is named by its source.
        bodies: the graphs that calls such as an activation checkpoint run.
    """

    gm: GraphModule
    tensors: Mapping[Node, Tensor]
    names: Mapping[int, str] = field(default_factory=dict)
    bodies: tuple[Body, ...] = ()

    def name(self, node: Node) -> str:
        """Fully qualified name of the parameter behind `node`."""
        known = self.names.get(id(self.tensors.get(node)))
        if known is not None:
            return known
        return str(node.target) if node.op == "get_attr" else source_name(node)

    def placeholders(self) -> list[Node]:
        """The graph's inputs in order."""
        return _placeholders(self.gm)

    def attributes(self) -> list[Node]:
        """The parameters that are attributes, as Dynamo makes them for Inductor's freezing, in order."""
        return [
            node
            for node, value in self.tensors.items()
            if node.op == "get_attr" and isinstance(value, nn.Parameter)
        ]

    def copy(self) -> tuple[GraphModule, dict[Node, Node]]:
        """A graph module that may be edited, and where each node went; Dynamo's metadata kept.

        AOTAutograd needs the sources of parameters and placeholders, which are attributes that
        torch.fx does not copy (torch 2.13: AssertionError on `_dynamo_source` without them).
        """
        return _rebuild(self.gm, lambda graph, node, where: None)

    def copies(self) -> dict[int, tuple[GraphModule, dict[Node, Node]]]:
        """`copy` of this graph and of its bodies, by the identity of each Captured.

        Every copied call runs the copy of its body.
        """
        gm, where = self.copy()
        made = {id(self): (gm, where)}
        for body in self.bodies:
            made.update(body.captured.copies())
            _set_body(gm, where[body.call], made[id(body.captured)][0])
        return made

    def holds(self, other: Captured) -> bool:
        """Whether `other` is this graph or inside of one of its bodies."""
        return other is self or any(body.captured.holds(other) for body in self.bodies)


@dataclass(frozen=True)
class Body:
    """A graph inside of a graph: what `call` runs, `torch.utils.checkpoint` for one.

    Attributes:
        call: the node that runs it, in the outer graph; its first argument is the body.
        captured: the body, its parameters resolved through the call.
        outer: placeholder of the body -> what the call gives it, in the outer graph.
    """

    call: Node
    captured: Captured
    outer: Mapping[Node, Node]


def _set_body(gm: GraphModule, call: Node, body: GraphModule) -> None:
    """Let a call run another body, under a name of its own: copies share their submodules."""
    name = f"{call.args[0]}_copy"
    while hasattr(gm, name):
        name += "_"
    gm.add_module(name, body)
    with gm.graph.inserting_before(call):
        first = gm.graph.get_attr(name)
    old = call.args[0]
    call.args = (first, *call.args[1:])
    if isinstance(old, Node) and not old.users:
        gm.graph.erase_node(old)


def _rebuild(
    gm: GraphModule, replace: Callable[[Graph, Node, dict[Node, Node]], Node | None]
) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy of a graph with some calls replaced, and where each node went; Dynamo's metadata kept.

    replace: appends what stands for a node to the new graph, or returns None for nodes to be copied.
    AOTAutograd needs the sources of parameters and placeholders, which are attributes that torch.fx
    does not copy (torch 2.13: AssertionError on `_dynamo_source` without them).
    """
    graph, where = _like(gm.graph), dict[Node, Node]()
    for node in gm.graph.nodes:
        if node.op == "output":
            new = graph.output(torch.fx.map_arg(node.args[0], where.__getitem__))
            new.meta = dict(node.meta)
            continue
        made = replace(graph, node, where)
        where[node] = made if made is not None else graph.node_copy(node, where.__getitem__)
        if hasattr(node, "_dynamo_source"):
            where[node]._dynamo_source = node._dynamo_source
    rebuilt = GraphModule(gm, graph)
    rebuilt.meta.update(gm.meta)
    for key in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, key):
            setattr(rebuilt, key, getattr(gm, key))
    return rebuilt, where


def source_name(node: Node) -> str:
    """A name from Dynamo's source, e.g. "encoder.layer.0.weight"; relative to the traced frame."""
    source = getattr(node, "_dynamo_source", None)
    return source_path(str(getattr(source, "name", None) or node.target)) or str(node.target)


def source_path(text: str) -> str:
    """The module path in a text such as "L['self']._modules['encoder']._parameters['weight']"."""
    for old, new in (("_modules['", "."), ("_parameters['", "."), ("_buffers['", "."), ("']", "")):
        text = text.replace(old, new)
    return ".".join(part for part in text.split(".") if part and part[:2] not in ("L[", "G["))


def parameter_names(model: nn.Module) -> dict[int, str]:
    """{id(parameter): its first fully qualified name}, tied parameters under one name."""
    names: dict[int, str] = {}
    for name, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    return names


def unwrap(model: nn.Module) -> nn.Module:
    """The module that torch.compile or DDP wraps, or the model itself."""
    for attribute in ("_orig_mod", "module"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and type(model).__name__ in _WRAPPERS:
            return unwrap(inner)
    return model


_WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel")


def from_dynamo(gm: GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> Captured:
    """The capture of a graph that Dynamo hands to a backend, with its example inputs in order."""
    plain = expanded(gm)
    tensors: dict[Node, Tensor] = {
        node: value
        for node, value in zip(_placeholders(plain), inputs, strict=True)
        if isinstance(value, nn.Parameter)
    }
    tensors.update(_attributes(plain))
    return Captured(plain, tensors, names, _bodies(plain, tensors, names))


def expanded(gm: GraphModule) -> GraphModule:
    """The graph with each composite call replaced by its meaning; itself if there is none."""
    return _rebuild(gm, expand)[0] if has_composites(gm) else gm


_WRAPPING = ("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap")


def _bodies(
    gm: GraphModule, tensors: Mapping[Node, Tensor], names: Mapping[int, str]
) -> tuple[Body, ...]:
    """The graphs inside of a graph that run once, unchanged, with the operands of their call."""
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in _WRAPPING:
            continue
        first, *operands = node.args
        inner = getattr(gm, str(first.target), None) if isinstance(first, Node) else None
        if not isinstance(inner, GraphModule) or len(operands) != len(_placeholders(inner)):
            continue
        plain = expanded(inner)
        outer = dict(zip(_placeholders(plain), operands, strict=True))
        known = {n: tensors[o] for n, o in outer.items() if isinstance(o, Node) and o in tensors}
        known.update(_attributes(plain))
        captured = Captured(plain, known, names, _bodies(plain, known, names))
        found.append(Body(node, captured, {n: o for n, o in outer.items() if isinstance(o, Node)}))
    return tuple(found)


def from_graph_module(
    gm: GraphModule, names: Mapping[int, str], inputs: Sequence[Any] | None = None
) -> Captured:
    """The capture of a graph from torch.export's `.module()`, symbolic_trace, or Dynamo.

    A Dynamo graph outside of a backend call has placeholders without values: they are resolved by
    `inputs`, or by the `grapharg` that Dynamo leaves there during the call; others cannot match.
    """
    inlined = expanded(inline_modules(gm))
    tensors: dict[Node, Tensor] = {}
    for index, (old, new) in enumerate(zip(_placeholders(gm), _placeholders(inlined), strict=True)):
        value = getattr(old.meta.get("grapharg"), "example", None)
        if inputs is not None and index < len(inputs):
            value = inputs[index]
        if isinstance(value, nn.Parameter):
            tensors[new] = value
    tensors.update(_attributes(inlined))
    return Captured(inlined, tensors, names, _bodies(inlined, tensors, names))


def _placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _attributes(gm: GraphModule) -> dict[Node, Tensor]:
    found: dict[Node, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value: Any = gm
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            if isinstance(value, Tensor):
                found[node] = value
    return found


def _like(old: Graph) -> Graph:
    """An empty graph called like `old`: torch.export's takes and returns nested containers."""
    graph = Graph()
    graph.set_codegen(copy.deepcopy(old._codegen))
    return graph


class _Inliner(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def inline_modules(gm: GraphModule) -> GraphModule:
    """The same graph with each call of a leaf module replaced by what its forward does.

    A module whose forward cannot be traced symbolically stays a call. Parameters become get_attr
    nodes under the module's own path, so that names are unchanged.
    """

    def inlined(graph: Graph, node: Node, where: dict[Node, Node]) -> Node | None:
        inner = _trace(gm, node) if node.op == "call_module" else None
        return _inline(graph, node, inner, where) if inner is not None else None

    return _rebuild(gm, inlined)[0]


def _trace(gm: GraphModule, call: Node) -> Graph | None:
    module = gm.get_submodule(str(call.target))
    if next(module.buffers(), None) is not None:
        return None  # tracing a BatchNorm in training mode would count a batch
    try:
        inner = _Inliner().trace(module)
    except Exception:  # tracing runs arbitrary forward code; whatever it raises, keep the call
        return None
    results = [node.args[0] for node in inner.nodes if node.op == "output"]
    starred = any(node.op == "placeholder" and str(node.target)[0] == "*" for node in inner.nodes)
    return inner if isinstance(results[0], Node) and not starred else None


def _inline(graph: Graph, call: Node, inner: Graph, where: Mapping[Node, Node]) -> Node:
    """Copy `inner` in place of `call`, its placeholders bound to the call's arguments."""
    given: Iterable[Any] = iter(call.args)
    bound: dict[Node, Any] = {}
    for node in inner.nodes:
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            value = call.kwargs.get(str(node.target), next(iter(given), default))
            bound[node] = torch.fx.map_arg(value, lambda n: where[n])
        elif node.op == "output":
            result: Node = bound[node.args[0]]
            return result
        else:
            copied = graph.node_copy(node, lambda n: bound[n])
            if node.op in ("get_attr", "call_module"):
                copied.target = f"{call.target}.{node.target}"
            copied.meta.setdefault("nn_module_stack", {str(call.target): (str(call.target), "")})
            bound[node] = copied
    raise AssertionError("a traced graph always ends with an output node")
