"""Composite calls: one node in a captured graph that stands for several, and what it means.

Some libraries run a whole layer as one fused call. Rules see through such a call when its meaning is
registered: a plain function of torch operations, traced in place of the call.

    @composite(mylib.fused_mlp)
    def fused_mlp(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

Meaning = TypeVar("Meaning", bound=Callable[..., Any])
_MEANINGS: dict[Any, Callable[..., Any]] = {}


def composite(target: Any) -> Callable[[Meaning], Meaning]:
    """Decorator that registers what calls of `target` mean, for matching and for rewriting.

    target: what the graph's node calls: a function such as `mylib.fused_mlp`, or an operator overload
    such as `torch.ops.mylib.fused_mlp.default`. The decorated function takes the same arguments and
    returns one tensor; it is run with symbolic tensors, so it must not branch on tensor values. It
    replaces the call in graphs that are rewritten: it has to compute the same.

    Raises TypeError if target cannot be called, and, when a graph is captured, if the function returns
    anything but one tensor.
    """
    if not callable(target):
        raise TypeError(
            f"composite() got a {type(target).__name__}; expected the function or operator overload "
            "that graph nodes call."
        )

    def register(meaning: Meaning) -> Meaning:
        _MEANINGS[target] = meaning
        return meaning

    return register


@composite(torch._transformer_encoder_layer_fwd)
@composite(torch.ops.aten._transformer_encoder_layer_fwd.default)
def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
    ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.TransformerEncoderLayer` on its inference fast path, in the steps of that operator."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    attended = torch._native_multi_head_attention(
        x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias,
        mask, False, True, mask_type,
    )[0]  # fmt: skip
    x = attended + src
    if not norm_first:
        x = norm(x, norm_weight_1, norm_bias_1)
    inner = norm(x, norm_weight_2, norm_bias_2) if norm_first else x
    hidden = F.linear(inner, ffn_weight_1, ffn_bias_1)
    hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
    x = F.linear(hidden, ffn_weight_2, ffn_bias_2) + x
    return x if norm_first else norm(x, norm_weight_2, norm_bias_2)


def has_composites(gm: GraphModule) -> bool:
    """Whether a graph calls anything whose meaning is registered."""
    return any(_meaning(node) is not None for node in gm.graph.nodes)


def expand(graph: Graph, node: Node, where: Mapping[Node, Node]) -> Node | None:
    """Append the meaning of a composite call to `graph`; None if the node is no such call.

    where: maps nodes of the old graph to `graph`. Shapes and dtypes are inferred where they are known.
    """
    meaning = _meaning(node)
    if meaning is None:
        return None
    tracer = GraphAppendingTracer(graph)

    def proxy(argument: Any) -> Any:
        def each(value: Any) -> Any:
            return Proxy(where[value], tracer) if isinstance(value, Node) else value

        return torch.fx.node.map_aggregate(argument, each)

    before = len(graph.nodes)
    result = meaning(*proxy(node.args), **proxy(node.kwargs))
    if not isinstance(result, Proxy):
        raise TypeError(
            f"The meaning {meaning.__name__!r} of {node.target} returned a {type(result).__name__}; "
            "expected one tensor. Register calls of one output only."
        )
    for made in list(graph.nodes)[before:]:
        made.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        _infer(made)
    last: Node = result.node
    last.meta = {**last.meta, **node.meta}
    return last


def _meaning(node: Node) -> Callable[..., Any] | None:
    if node.op != "call_function":
        return None
    try:
        return _MEANINGS.get(node.target)
    except TypeError:  # a target without a hash
        return None


def _infer(node: Node) -> None:
    """Compute a node's example value from those of its inputs, on fake tensors."""
    key = next(
        (k for n in node.all_input_nodes for k in ("example_value", "val") if k in n.meta), ""
    )
    if not key or any(key not in n.meta for n in node.all_input_nodes):
        return
    args = torch.fx.node.map_arg(node.args, lambda n: n.meta[key])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: n.meta[key])
    modes = [
        v.meta[key].fake_mode for v in node.all_input_nodes if hasattr(v.meta[key], "fake_mode")
    ]
    if not modes:
        return
    call: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    with modes[0], torch.no_grad():
        node.meta[key] = call(*(args[1:] if node.op == "call_method" else args), **kwargs)
