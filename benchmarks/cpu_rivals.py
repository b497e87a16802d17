"""The opponents: each builder gives a function of x [T, D] that runs the whole stack, best form known.

Compiled variants own a code object each: Dynamo caches by it, and variants that shared one would
reach the recompile limit and quietly run eager.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from cpu_cases import ACTIVATIONS, SIZE, Case, Layer, tokens
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional

Call = Callable[[Tensor], Tensor]
Masks = Sequence[Sequence[Tensor]]
AUTOTUNED = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}
COLD = 1 << 26  # bytes of weights that a 32 MiB L3 does not keep from one pass to the next
DEEPEST = 64  # layers of a narrow stack at most: compiling more takes minutes
GROUPED_COPIES = 4  # [pairs, D] tensors a grouped form holds at once: gathered, result, sorted
mkldnn = torch.ops.mkldnn


class Unavailable(Exception):
    """A rival cannot run here; the message says why."""


class Dense(nn.Module):
    """The dense stack in plain PyTorch."""

    def __init__(self, case: Case, stack: Sequence[Layer]) -> None:
        super().__init__()
        frozen = {"requires_grad": False}
        self.up = nn.ParameterList(nn.Parameter(layer.up, **frozen) for layer in stack)
        self.gate = nn.ParameterList(
            nn.Parameter(layer.gate, **frozen) for layer in stack if layer.gate is not None
        )
        self.down = nn.ParameterList(nn.Parameter(layer.down, **frozen) for layer in stack)
        self.act = ACTIVATIONS[case.activation]

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.up)):
            h = functional.linear(x, self.up[i])
            gated = len(self.gate) > 0
            h = self.act(functional.linear(x, self.gate[i])) * h if gated else self.act(h)
            x = x + functional.linear(h, self.down[i])
        return x


def compiled(case: Case, model: nn.Module, name: str, **settings: Any) -> Call:
    """model under torch.compile, its forward a code object of its own, under Inductor's settings.

    Compiled here, by a first call inside the patch: `options=` come too late for freezing, which
    Dynamo asks about while it traces.
    """
    forward = type(model).forward
    own = types.FunctionType(forward.__code__.replace(co_name=name), forward.__globals__, name)
    model.__class__ = type(name, (type(model),), {"forward": own})
    call: Call = torch.compile(model.eval(), dynamic=False, fullgraph=True)
    with inductor.patch(settings):
        call(tokens(case))
    return call


def onednn(case: Case, stack: Sequence[Layer]) -> Call:
    """The dense stack on oneDNN with prepacked weights, activation and sums fused as Inductor fuses them."""
    pack = mkldnn._reorder_linear_weight
    packed = [
        [None if w is None else pack(w, case.tokens) for w in (layer.up, layer.gate, layer.down)]
        for layer in stack
    ]
    fused = {"gelu": ("gelu", [], "none"), "relu": ("relu", [], "")}

    def run(x: Tensor) -> Tensor:
        for up, gate, down in packed:
            if gate is None:
                h = mkldnn._linear_pointwise(x, up, None, *fused[case.activation])
            else:
                h = mkldnn._linear_pointwise(x, gate, None, "swish", [], "")
                h = mkldnn._linear_pointwise.binary(x, h, up, None, "mul")
            x = mkldnn._linear_pointwise.binary(h, x, down, None, "add")
        return x

    return run


def dense(case: Case, stack: Sequence[Layer]) -> dict[str, Callable[[], Call]]:
    """Builders of the dense rivals by name."""
    return {
        "eager": lambda: Dense(case, stack),
        "onednn": lambda: onednn(case, stack),
        "inductor": lambda: compiled(case, Dense(case, stack), "inductor", **AUTOTUNED),
        "default": lambda: compiled(case, Dense(case, stack), "default"),
    }


def ideal(
    case: Case, stack: Sequence[Layer], share: float
) -> tuple[dict[str, Callable[[], Call]], int, int]:
    """Builders of the dense stack of width share * H, its H and its depth.

    It is what a perfect kernel without a router reaches. Narrow layers are small, so there are more of
    them, to keep their weights out of the cache as well.
    """
    hidden = max(16, round(share * case.hidden / 16) * 16)
    size = case.matrices * case.width * hidden * case.itemsize
    depth = max(len(stack), min(DEEPEST, -(-COLD // size)))
    narrow = []
    for i in range(depth):
        layer = stack[i % len(stack)]
        gate = None if layer.gate is None else layer.gate[:hidden].clone()
        down = layer.down[:, :hidden].contiguous()
        narrow.append(Layer(layer.up[:hidden].clone(), gate, down, layer.w1, layer.w2))
    name = f"ideal_{hidden}"
    builders: dict[str, Callable[[], Call]] = {
        "ideal_inductor": lambda: compiled(case, Dense(case, narrow), name, **AUTOTUNED),
        "ideal_onednn": lambda: onednn(case, narrow),
    }
    return builders, hidden, depth


def sparse(case: Case, stack: Sequence[Layer], masks: Masks) -> dict[str, Callable[[], Call]]:
    """Builders of what others offer for the same masks."""
    return {
        "transformers": lambda: transformers_experts(case, stack, masks),
        "grouped_mm": lambda: grouped_mm(case, stack, masks),
    }


def _require_memory(case: Case, rows: int) -> None:
    """Raise Unavailable if [rows, D] tensors of a grouped form do not fit in half of what is free."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
    needed = GROUPED_COPIES * rows * case.width * case.itemsize
    if needed > free / 2:
        raise Unavailable(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


def _by_expert(case: Case, layer: Layer) -> tuple[Tensor, Tensor]:
    """Weights as transformers keeps them: [E, F or 2F, D] with the gate first, and [E, D, F]."""
    split = (case.experts, SIZE, case.width)
    parts = [w.view(split) for w in (layer.gate, layer.up) if w is not None]
    down = layer.down.view(case.width, case.experts, SIZE).transpose(0, 1).contiguous()
    return torch.cat(parts, 1).contiguous(), down


class _Experts(nn.Module):
    """An experts module of transformers with given weights."""

    def __init__(self, config: Any, case: Case, layer: Layer) -> None:
        super().__init__()
        self.num_experts = case.experts
        self.act_fn = ACTIVATIONS[case.activation]
        first, self.down_proj = _by_expert(case, layer)
        setattr(self, "up_proj" if layer.gate is None else "gate_up_proj", first)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError("transformers' decorator replaces this method")


def transformers_experts(case: Case, stack: Sequence[Layer], masks: Masks) -> Call:
    """transformers' own grouped_mm experts; places beyond a token's experts hold its sentinel, not computed.

    The indices are made beforehand and no router runs: in this rival's favour.
    """
    from transformers.integrations.moe import use_experts_implementation

    widest = max(int(mask.sum(1).max()) for turns in masks for mask in turns)
    _require_memory(case, widest * case.tokens)
    kind = use_experts_implementation(
        type("Experts", (_Experts,), {"forward": _Experts.forward}),
        has_gate=case.activation == "swiglu",
    )
    config = types.SimpleNamespace(_experts_implementation="grouped_mm")
    modules = [kind(config, case, layer) for layer in stack]
    for module in modules:
        module._is_expert_parallel = True  # what makes it skip sentinels
    indices = [[_top_k(mask) for mask in turns] for turns in masks]
    calls = count()

    def run(x: Tensor) -> Tensor:
        n = next(calls)
        for module, turns in zip(modules, indices, strict=True):
            index = turns[n % len(turns)]
            x = x + module(x, index, x.new_ones(index.shape))
        return x

    return run


def _top_k(mask: Tensor) -> Tensor:
    """Chosen experts [T, K] of each token, padded with E."""
    experts = mask.shape[1]
    numbered = torch.where(mask, torch.arange(experts), experts)
    return numbered.sort(1).values[:, : int(mask.sum(1).max())].contiguous()


def grouped_mm(case: Case, stack: Sequence[Layer], masks: Masks) -> Call:
    """The same GEMMs on a flat list of chosen pairs, made in one step from the mask: nothing padded."""
    pairs = max(int(mask.sum()) for turns in masks for mask in turns)
    _require_memory(case, pairs)
    weights = [[w.transpose(1, 2) for w in _by_expert(case, layer)] for layer in stack]
    act, gated = ACTIVATIONS[case.activation], case.activation == "swiglu"
    calls = count()

    def run(x: Tensor) -> Tensor:
        n = next(calls)
        for (first, down), turns in zip(weights, masks, strict=True):
            mask = turns[n % len(turns)].t()
            rows = mask.nonzero()[:, 1]
            offsets = mask.sum(1).cumsum(0, dtype=torch.int32)
            h = functional.grouped_mm(x[rows], first, offs=offsets)
            if gated:
                gate, up = h.chunk(2, -1)
                h = act(gate) * up
            else:
                h = act(h)
            x = x.index_add(0, rows, functional.grouped_mm(h, down, offs=offsets))
        return x

    return run


class Int8(nn.Module):
    """The dense stack on torch._weight_int8pack_mm: int8 weights, one scale a row, bf16 tokens."""

    def __init__(self, case: Case, stack: Sequence[Layer]) -> None:
        super().__init__()
        if case.activation == "swiglu":
            raise Unavailable("int8 is measured on blocks of two matrices")
        for i, layer in enumerate(stack):
            for name, weight in (("up", layer.up), ("down", layer.down)):
                scale = (weight.float().abs().amax(1) / 127).to(weight.dtype)
                whole = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
                self.register_buffer(f"{name}{i}", whole.to(torch.int8))
                self.register_buffer(f"{name}_scale{i}", scale)
        self.depth = len(stack)
        self.act = ACTIVATIONS[case.activation]

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            up, scale = getattr(self, f"up{i}"), getattr(self, f"up_scale{i}")
            h = self.act(torch._weight_int8pack_mm(x, up, scale))
            down, scale = getattr(self, f"down{i}"), getattr(self, f"down_scale{i}")
            x = x + torch._weight_int8pack_mm(h, down, scale)
        return x


def int8(case: Case, stack: Sequence[Layer]) -> dict[str, Callable[[], Call]]:
    """Builders of the dense int8 rivals by name."""
    return {
        "eager": lambda: Int8(case, stack),
        "inductor": lambda: compiled(case, Int8(case, stack), "int8", **AUTOTUNED),
    }
