"""Random calls of the generated Triton kernels, and the meaning that they are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blocks import masks
from torch import Tensor

from d2dcompile import testing
from d2dcompile.expr import function
from d2dcompile.gpu_blocks import GpuSchedule, GpuSpec
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.expert_mlp.call import Call
from d2dcompile.kernels.int8 import Copy, copy_of, weights_of
from d2dcompile.kernels.native import SLABS

ON = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SPECS = {
    "plain": GpuSpec(40, 72, 5, 24, False, "gelu(up)"),
    "gated": GpuSpec(64, 48, 3, 16, True, "silu(gate) * up"),
    "tiny experts": GpuSpec(33, 33, 7, 5, True, "gelu(gate, approximate='tanh') * up"),
    "one expert": GpuSpec(16, 16, 1, 40, False, "relu(up) ** 2"),
    "many experts": GpuSpec(24, 20, 19, 8, False, "p0 * relu(up) + p1 * up"),
}


class Operands:
    """Random rows, slabs and lists of one call on the device that is tested.

    With an int8 spec the meaning is that of the weights which the int8 copy stands for.
    """

    def __init__(
        self, spec: GpuSpec, mask: Tensor, dtype: torch.dtype, bias: bool, seed: int
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        hidden, rows = spec.experts * spec.size, len(mask)

        def random(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=draw) * shape[-1] ** -0.5).to(ON, dtype)

        self.spec, self.mask = spec, mask
        self.rows = random(rows, spec.d) * spec.d**0.5
        self.weights: dict[str, Tensor | None] = {
            "w_up": random(hidden, spec.d),
            "w_gate": random(hidden, spec.d) if spec.gated else None,
            "w_down": random(hidden, spec.out),
            "b_up": random(hidden) if bias else None,
            "b_gate": random(hidden) if bias and spec.gated else None,
            "b_down": random(spec.out) if bias else None,
        }
        count = sum(f"p{i}" in spec.activation for i in range(2))
        self.scalars = [torch.tensor(0.3 + i).to(ON, dtype) for i in range(count)]
        tokens, offsets, slots = dispatch.meaning(mask.to(ON))
        tokens[offsets[-1] :] = 1 << 30
        slots[torch.arange(spec.experts + 1, device=ON)[None] > slots[:, :1]] = 1 << 30
        self.lists = tokens, offsets, slots

    def run(self, schedule: GpuSchedule) -> Tensor:
        y = self.rows.new_full((len(self.rows), self.spec.out), torch.nan)
        if len(self.rows):
            copy = self.int8() if self.spec.int8 else None
            call = Call(self.spec, self.rows, self.lists, self.weights, self.scalars, y, copy)
            call.run(schedule)
        return y

    def int8(self) -> Copy:
        w_up, w_gate, w_down = (self.weights[name] for name in SLABS[:3])
        return copy_of(w_up, w_gate, w_down, self.spec.experts)

    def slabs(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Slabs and biases as the meaning takes them."""
        held = dict(self.weights)
        if self.spec.int8:
            held.update(zip(SLABS[:3], weights_of(self.int8(), dtype), strict=True))
        return [None if w is None else w.to(dtype) for w in held.values()]

    def usual_error(self) -> float:
        """What the meaning in this dtype errs on many tokens, relative: on few it may be right by chance."""
        share = "all" if self.mask.all() else 0.5
        many = Operands(self.spec, masks(64, self.spec.experts, share, 0), self.rows.dtype, True, 0)
        exact = many.meaning(torch.float64)
        error = many.meaning(self.rows.dtype).double() - exact
        return testing.rms(error) / testing.rms(exact)

    def dense(self) -> Tensor:
        """The block without experts in plain PyTorch and its own dtype, of the weights that int8 means."""
        w = dict(zip(self.weights, self.slabs(self.rows.dtype), strict=True))
        values = {"up": F.linear(self.rows, w["w_up"], w["b_up"])}
        if self.spec.gated:
            values["gate"] = F.linear(self.rows, w["w_gate"], w["b_gate"])
        values.update((f"p{i}", scalar) for i, scalar in enumerate(self.scalars))
        hidden = function(self.spec.activation)(values)
        return F.linear(hidden, w["w_down"].t(), w["b_down"])

    def meaning(self, dtype: torch.dtype) -> Tensor:
        mask = self.mask
        scalars = [s.to(dtype) for s in self.scalars]
        rows = self.rows.to(dtype)
        lists = dispatch.meaning(mask.to(ON))
        return expert_mlp.meaning(
            rows, *lists, *self.slabs(dtype), None, scalars, self.spec.activation
        )


def assert_as_good(result: Tensor, operands: Operands) -> None:
    exact, eager = operands.meaning(torch.float64), operands.meaning(result.dtype)
    assert result.isfinite().all()
    error, allowed = (testing.rms(y.double() - exact) for y in (result, eager))
    usual = operands.usual_error() * testing.rms(exact)
    if operands.mask.all():  # one long sum errs more than one an expert
        usual = max(usual, testing.rms(operands.dense().double() - exact))
    assert error <= 2 * max(allowed, usual), (error, allowed, usual)
