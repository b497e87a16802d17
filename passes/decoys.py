"""What has the shape of a feed-forward block, but is something else by what stands around it.

A gate (only a sigmoid reads it), an adapter (a bottleneck), a routed expert (tokens picked by index, or
output weighted by a router), a classification head (reads one pooled token, and nothing is added to it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch.fx import Node

from ..ir import Miss
from ..operators import OPERATORS
from .canonicalize import View
from .linear import Linear
from .names import CASTS, IDENTITIES, VIEWS, argument, op_name, shape_of
from .region import Region, walk

# An adapter has few hidden neurons, and most often sits right behind a linear; MobileBERT's blocks have few
# as well, but behind a norm.
BOTTLENECK, BOTTLENECK_BEHIND_LINEAR = 4, 2
_STEPS = 12  # how far around a block is looked; what decides is never far in real models
_COPIES = (*IDENTITIES, *VIEWS, *CASTS, "dropout")
_CARRIES = (*_COPIES, "layer_norm", "rms_norm")
_PICKS = ("index_select", "masked_select", "take_along_dim", "index")
_POOLS = ("mean", "amax", "select", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool2d")
_ROUTES = ("softmax", "topk", "one_hot", "scatter", "sparsemax")
_SELECTS = (  # between a router's softmax or top-k and the factor of an expert
    *_CARRIES, "getitem", "select", "slice", "narrow", "index", "gather", "mul", "div", "sum", "where",
    "masked_fill", "clamp", "transpose", "permute", "expand", "unbind", "split", "chunk",
)  # fmt: skip
_PUTS = ("index_add", "index_put", "index_copy", "scatter_add")


def not_a_block(view: View, down: Linear, up: Linear, accept: Sequence[str] = ()) -> Miss | None:
    """Why a chain of linear, activation and linear is no feed-forward block, or None.

    accept: names of DECOYS that a rule takes for blocks after all.
    """
    for name, decoy in DECOYS.items():
        problem = decoy(view, down, up) if name not in accept else None
        if problem is not None:
            return problem
    return None


def gate(view: View, down: Linear, up: Linear) -> Miss | None:
    """Squeeze-and-excitation and its kin: a sigmoid makes factors of the output."""
    if not _only_sigmoid_reads(view, down.node):
        return None
    return Miss(down.node, "only a sigmoid reads its output: a gate, not a block")


def adapter(view: View, down: Linear, up: Linear) -> Miss | None:
    """A bottleneck added to a trained model (Houlsby et al. 2019, arXiv:1902.00751)."""
    behind = list(_before(up.x))[-1] in view.linears
    if (BOTTLENECK_BEHIND_LINEAR if behind else BOTTLENECK) * down.d_in > down.d_out:
        return None
    size = f"{down.d_in} hidden values for {down.d_out} features"
    return Miss(down.node, f"has {size}: a bottleneck adapter, not a block")


def routed_expert(view: View, down: Linear, up: Linear) -> Miss | None:
    """An expert of a mixture of experts that the model has already."""
    picked = next((node for node in _before(up.x) if _picks_tokens(node)), None)
    if picked is not None:
        return Miss(picked, "its input is picked by an index: a routed expert, not a block")
    if _is_routed(view, down.node):
        return Miss(down.node, "a router weighs its output: a routed expert, not a block")
    return None


def deeper_mlp(view: View, down: Linear, up: Linear) -> Miss | None:
    """Two layers of a box head or a position network with three layers or more."""
    last_of_more = _is_activation(walk(view, up)) and not _is_added(view, down.node)
    if _goes_on(view, down.node) or last_of_more:
        return Miss(
            down.node, "an activation joins it to a further linear: a deeper MLP, not a block"
        )
    return None


def pooled_head(view: View, down: Linear, up: Linear) -> Miss | None:
    """A pooler and the classifier behind it."""
    pooled = next((node for node in _before(up.x) if _pools(node)), None)
    if pooled is None or _is_added(view, down.node):
        return None
    return Miss(pooled, "reads one pooled token, and nothing is added to it: a head, not a block")


DECOYS: dict[str, Callable[[View, Linear, Linear], Miss | None]] = {
    "gate": gate,
    "adapter": adapter,
    "routed_expert": routed_expert,
    "deeper_mlp": deeper_mlp,
    "pooled_head": pooled_head,
}


def _only_sigmoid_reads(view: View, node: Node) -> bool:
    users = list(view.users(node))
    return bool(users) and all(
        _only_sigmoid_reads(view, user)
        if op_name(user) in (*IDENTITIES, *VIEWS)
        else op_name(user) in ("sigmoid", "hardsigmoid")
        for user in users
    )


def _is_activation(region: Region | Miss) -> bool:
    """Whether what feeds a linear is an activation of the linear before it."""
    return isinstance(region, Region) and region.expression.is_nonlinear()


def _goes_on(view: View, node: Node) -> bool:
    """Whether a block's output enters a further linear through nothing but an activation."""
    for user in view.users(node):
        if op_name(user) in OPERATORS and OPERATORS[op_name(user)].nonlinear:
            stack, seen = [user], {user}
            while stack and len(seen) < _STEPS:
                for reader in view.users(stack.pop()):
                    if reader in view.linears:
                        return True
                    carries = op_name(reader) in (*OPERATORS, *_COPIES)
                    if carries and op_name(reader) not in ("add", "sub") and reader not in seen:
                        seen.add(reader)
                        stack.append(reader)
    return False


def _before(node: Node) -> Iterator[Node]:
    """The calls that a value went through, latest first, up to the first that computes something."""
    for _ in range(_STEPS):
        yield node
        inner = node.args[0] if node.args else None
        if op_name(node) not in _CARRIES or not isinstance(inner, Node):
            return
        node = inner


def _picks_tokens(node: Node) -> bool:
    """Whether a call picks rows by an index tensor."""
    if op_name(node) == "getitem":
        index = node.args[1]
        keys = index if isinstance(index, tuple) else (index,)
        return any(isinstance(key, Node) and _is_tensor(key) for key in keys)
    return op_name(node) in _PICKS


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value is None or isinstance(value, Tensor)


def _pools(node: Node) -> bool:
    """Whether a call leaves one token, or one value per feature, of many."""
    if op_name(node) == "getitem":
        index = node.args[1]
        keys = index if isinstance(index, tuple) else (index,)
        return shape_of(node.all_input_nodes[0]) is not None and any(
            isinstance(key, int) for key in keys
        )
    return op_name(node) in _POOLS


def _after(view: View, node: Node) -> Iterator[Node]:
    """Calls that a block's output reaches through reshapes, norms, products and casts, and those."""
    stack, seen = [node], {node}
    while stack and len(seen) < 4 * _STEPS:
        for user in view.users(stack.pop()):
            if user not in seen:
                seen.add(user)
                yield user
                if op_name(user) in (*_CARRIES, "mul"):
                    stack.append(user)


def _is_added(view: View, node: Node) -> bool:
    """Whether a value of the call is added to a block's output: a residual connection."""
    for user in _after(view, node):
        if op_name(user) == "add" and sum(n in view.runtime for n in user.all_input_nodes) > 1:
            return True
    return False


def _is_routed(view: View, node: Node) -> bool:
    """Whether a block's output is scattered to tokens, or weighted by a router's choice."""
    for user in _after(view, node):
        if op_name(user) in _PUTS and argument(user, 0, "input") is not node:
            return True
        if op_name(user) == "mul":
            for weight in user.all_input_nodes:
                shape = shape_of(weight)
                if shape and shape[-1] == 1 and _comes_from_router(weight):
                    return True
    return False


def _comes_from_router(node: Node) -> bool:
    stack, seen = [node], {node}
    while stack and len(seen) < 4 * _STEPS:
        node = stack.pop()
        if op_name(node) in _ROUTES:
            return True
        for inner in node.all_input_nodes:
            if inner not in seen and op_name(node) in _SELECTS:
                seen.add(inner)
                stack.append(inner)
    return False
