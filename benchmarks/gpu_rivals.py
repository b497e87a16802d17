"""The opponents: each builder gives a function of a turn that runs one layer, best form known.

Masks are theirs for nothing: no router runs and indices are made beforehand, in their favour.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence

import torch
from gpu_cases import Case, Layer
from gpu_device import Place
from torch import Tensor, nn
from torch._inductor import list_mode_options
from torch.nn import functional as F

Turn = Callable[[int], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swiglu": F.silu,
}
BEST = "max-autotune-no-cudagraphs"  # the graphs are ours, so that all are timed alike
PADDED_COPIES = 5  # [T * K, D] tensors that transformers holds at once
SAFE = 0.8  # of the free memory that a rival may take


class Unavailable(Exception):
    """A rival cannot run here; the message says why."""


def plain(x: Tensor, up: Tensor, linear: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return F.linear(act(F.linear(x, up)), linear)


def gated(
    x: Tensor, up: Tensor, gate: Tensor, linear: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    return F.linear(act(F.linear(x, gate)) * F.linear(x, up), linear)


def merged(x: Tensor, both: Tensor, linear: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = F.linear(x, both).chunk(2, -1)
    return F.linear(act(gate) * up, linear)


class Dense:
    """Builders of the dense layer, or of one that has only the first `width` hidden neurons."""

    def __init__(
        self, case: Case, layers: Sequence[Layer], x: Tensor, width: int | None = None
    ) -> None:
        self.case, self.x = case, x
        self.act = ACTIVATIONS[case.activation]
        self.name = f"dense_{width or case.hidden}"
        self.weights = [
            [w[:width] for w in (layer.up, layer.gate) if w is not None]
            + [layer.linear[:, :width].contiguous()]
            for layer in layers
        ]

    def eager(self) -> Turn:
        """cuBLAS, an elementwise kernel or two between its products."""
        return self._turn(gated if self.case.gated else plain, self.weights)

    def merged(self) -> Turn:
        """Gate and up as one product."""
        both = [[torch.cat([gate, up]), linear] for up, gate, linear in self.weights]
        return self._turn(merged, both)

    def inductor(self, dry: bool, best: bool) -> Turn:
        """torch.compile; best: max-autotune (of fp32 without Triton's products, which take minutes)."""
        form = gated if self.case.gated else plain
        name = f"{self.name}_{'best' if best else 'default'}"
        own = types.FunctionType(form.__code__.replace(co_name=name), form.__globals__, name)
        options = list_mode_options(BEST) if best and not dry else {}
        if best and self.case.dtype == "fp32" and not dry:
            options = {**options, "max_autotune_gemm_backends": "ATEN"}
        settings = {"backend": "eager"} if dry else {"options": options}
        call = torch.compile(own, dynamic=False, fullgraph=True, **settings)
        return self._turn(call, self.weights)

    def _turn(self, form: Callable[..., Tensor], weights: Sequence[Sequence[Tensor]]) -> Turn:
        def run(turn: int) -> Tensor:
            with torch.no_grad():
                return form(self.x, *weights[turn % len(weights)], self.act)

        return run


def flat(case: Case, layers: Sequence[Layer], x: Tensor, masks: Sequence[Tensor]) -> Turn:
    """torch's grouped_mm on a flat list of chosen pairs: nothing padded, no look from the host."""
    act, shape = ACTIVATIONS[case.activation], (case.experts, case.size, case.width)
    pairs = []
    for mask in masks:
        chosen = mask.t().to(x.device)
        pairs.append((chosen.nonzero()[:, 1], chosen.sum(1).cumsum(0, dtype=torch.int32)))

    def run(turn: int) -> Tensor:
        layer, (token, ends) = layers[turn % len(layers)], pairs[turn]
        rows = x.index_select(0, token)
        up = F.grouped_mm(rows, layer.up.view(shape).transpose(1, 2), offs=ends)
        if layer.gate is None:
            h = act(up)
        else:
            gate = F.grouped_mm(rows, layer.gate.view(shape).transpose(1, 2), offs=ends)
            h = act(gate) * up
        found = F.grouped_mm(h, layer.down.view(shape), offs=ends)
        return torch.zeros_like(x).index_add_(0, token, found)

    return run


class _Experts(nn.Module):
    """An experts module of transformers with given weights."""

    def __init__(self, config: object, case: Case, layer: Layer) -> None:
        super().__init__()
        self.num_experts = case.experts
        self.act_fn = ACTIVATIONS[case.activation]
        shape = (case.experts, case.size, case.width)
        if layer.gate is None:
            self.up_proj = layer.up.view(shape)
        else:
            self.gate_up_proj = torch.cat([w.view(shape) for w in (layer.gate, layer.up)], 1)
        self.down_proj = layer.down.view(shape).transpose(1, 2)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError("transformers' decorator replaces this method")


def transformers_experts(
    case: Case, layers: Sequence[Layer], x: Tensor, masks: Sequence[Tensor], place: Place
) -> Turn:
    """transformers' grouped_mm experts; places beyond a token's experts hold its sentinel, not computed."""
    from transformers.integrations.moe import use_experts_implementation

    widest = max(int(mask.sum(1).max()) for mask in masks)
    needed = PADDED_COPIES * case.tokens * widest * x[0].nbytes
    if needed > SAFE * place.free():
        raise Unavailable(f"needs {needed / 2**30:.1f} GiB")
    kind = use_experts_implementation(
        type("Experts", (_Experts,), {"forward": _Experts.forward}), has_gate=case.gated
    )
    config = types.SimpleNamespace(_experts_implementation="grouped_mm")
    modules = [kind(config, case, layer) for layer in layers]
    for module in modules:
        module._is_expert_parallel = True  # what makes it skip sentinels
    indices = [_top_k(mask).to(x.device) for mask in masks]
    weights = [(index < case.experts).to(x.dtype) for index in indices]

    def run(turn: int) -> Tensor:
        with torch.no_grad():
            return modules[turn % len(modules)](x, indices[turn], weights[turn])

    return run


def _top_k(mask: Tensor) -> Tensor:
    """Chosen experts [T, K] of each token, padded with E."""
    experts = mask.shape[1]
    numbered = torch.where(mask, torch.arange(experts), experts)
    return numbered.sort(1).values[:, : int(mask.sum(1).max())].contiguous()


def sparse(
    case: Case, layers: Sequence[Layer], x: Tensor, masks: Sequence[Tensor], place: Place
) -> dict[str, Callable[[], Turn]]:
    """Builders of what others offer for the same masks."""
    return {
        "grouped_mm": lambda: flat(case, layers, x, masks),
        "transformers": lambda: transformers_experts(case, layers, x, masks, place),
    }
