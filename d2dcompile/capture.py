"""Captured graph: an FX graph with the tensors and names behind its parameter nodes.

One form for the three ways to capture: Dynamo (parameters are placeholders whose example inputs are
the real Parameters), torch.export and torch.fx.symbolic_trace (parameters are get_attr nodes, and
calls of torch.nn modules are inlined first, so that matchers see functions only).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer


@dataclass(frozen=True)
class Captured:
    """A graph module, its parameter tensors by node, and their names by identity.

    Attributes:
        gm: the graph; never edited, rewrites work on `copy()`.
        tensors: {placeholder or get_attr node: Parameter or buffer}.
        names: {id(tensor): fully qualified name}; a tensor without one is named by its source.
    """

    gm: GraphModule
    tensors: Mapping[Node, Tensor]
    names: Mapping[int, str] = field(default_factory=dict)

    def name(self, node: Node) -> str:
        """Fully qualified name of the parameter behind `node`."""
        known = self.names.get(id(self.tensors.get(node)))
        if known is not None:
            return known
        return str(node.target) if node.op == "get_attr" else source_name(node)

    def placeholders(self) -> list[Node]:
        """The graph's inputs in order."""
        return _placeholders(self.gm)

    def copy(self) -> tuple[GraphModule, dict[Node, Node]]:
        """A graph module that may be edited, and where each node went; Dynamo's metadata kept.

        AOTAutograd needs the sources of parameters and placeholders, which are attributes that
        torch.fx does not copy (torch 2.13: AssertionError on `_dynamo_source` without them).
        """
        graph, where = _like(self.gm.graph), dict[Node, Node]()
        output = graph.graph_copy(self.gm.graph, where)
        old = next(node for node in self.gm.graph.nodes if node.op == "output")
        new = graph.output(output)
        new.meta = dict(old.meta)
        for before, after in where.items():
            if hasattr(before, "_dynamo_source"):
                after._dynamo_source = before._dynamo_source
        copied = GraphModule(self.gm, graph)
        copied.meta.update(self.gm.meta)
        for key in ("_param_name_to_source", "_source_to_user_stacks"):
            if hasattr(self.gm, key):
                setattr(copied, key, getattr(self.gm, key))
        return copied, where


def source_name(node: Node) -> str:
    """A name from Dynamo's source, e.g. "encoder.layer.0.weight"; relative to the traced frame."""
    source = getattr(node, "_dynamo_source", None)
    text = str(getattr(source, "name", None) or node.target)
    for old, new in (("_modules['", "."), ("_parameters['", "."), ("_buffers['", "."), ("']", "")):
        text = text.replace(old, new)
    parts = [part for part in text.split(".") if part and not part.startswith("L[")]
    return ".".join(parts) or str(node.target)


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
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    tensors: dict[Node, Tensor] = {
        node: value
        for node, value in zip(placeholders, inputs, strict=True)
        if isinstance(value, nn.Parameter)
    }
    tensors.update(_attributes(gm))
    return Captured(gm, tensors, names)


def from_graph_module(
    gm: GraphModule, names: Mapping[int, str], inputs: Sequence[Any] | None = None
) -> Captured:
    """The capture of a graph from torch.export's `.module()`, symbolic_trace, or Dynamo.

    A Dynamo graph outside of a backend call has placeholders without values: they are resolved by
    `inputs`, or by the `grapharg` that Dynamo leaves there during the call; others cannot match.
    """
    inlined = inline_modules(gm)
    tensors: dict[Node, Tensor] = {}
    for index, (old, new) in enumerate(zip(_placeholders(gm), _placeholders(inlined), strict=True)):
        value = getattr(old.meta.get("grapharg"), "example", None)
        if inputs is not None and index < len(inputs):
            value = inputs[index]
        if isinstance(value, nn.Parameter):
            tensors[new] = value
    tensors.update(_attributes(inlined))
    return Captured(inlined, tensors, names)


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
    graph, where = _like(gm.graph), dict[Node, Node]()
    result: Any = None
    for node in gm.graph.nodes:
        if node.op == "output":
            result = torch.fx.map_arg(node.args[0], lambda n: where[n])
        elif node.op == "call_module" and (inner := _trace(gm, node)) is not None:
            where[node] = _inline(graph, node, inner, where)
        else:
            where[node] = graph.node_copy(node, lambda n: where[n])
            if hasattr(node, "_dynamo_source"):
                where[node]._dynamo_source = node._dynamo_source
    graph.output(result)
    return GraphModule(gm, graph)


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
