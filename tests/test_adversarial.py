"""Code written to be rewritten wrongly: every case is the same as dense, outputs and gradients, or declined.

Most were found by a review of the matcher; each failed before the guard that it tests.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import d2dcompile as d2d
from d2dcompile.errors import CalibrationError, DenseFallbackWarning

D, H = 8, 16
QUICK = d2d.Config(clustering="random", router_epochs=1, router_width=4)


class Net(nn.Module):
    """Linears and other parts, and a forward given as a function of (self, x)."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.up, self.gate, self.other = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(D, H)
        self.down, self.fused = nn.Linear(H, D), nn.Linear(D, 2 * H)
        self.w1, self.w2 = nn.Parameter(torch.randn(D, H)), nn.Parameter(torch.randn(H, D))
        self.one = nn.Parameter(torch.ones(1))
        self.register_buffer("scale", torch.tensor(0.7))
        self.drop = nn.Dropout(0.3)
        self.c1, self.c2 = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def twisted(m: Net, x: Tensor) -> Tensor:
    return x + m.down((lambda h: h * torch.sigmoid(h.detach()))(m.up(x)))


def straight_through(m: Net, x: Tensor) -> Tensor:
    h = m.up(x)
    return x + m.down(h + ((h > 0).to(h.dtype) - h).detach())


def detached_gate(m: Net, x: Tensor) -> Tensor:
    return x + m.down(F.silu(m.gate(x.detach())) * m.up(x))


def detached_scalar(m: Net, x: Tensor) -> Tensor:
    return x + m.down(F.gelu(m.up(x)) * m.one.detach())


def hidden_without_gradients(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = F.gelu(m.up(x))
    return x + m.down(h)


def gate_without_gradients(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        g = torch.sigmoid(m.gate(x))
    return x + m.down(g * m.up(x))


def weight_after_a_break(m: Net, x: Tensor) -> Tensor:
    y = x + m.down(F.gelu(m.up(x)))
    torch._dynamo.graph_break()
    return F.linear(y, m.up.weight)


def weight_outside_of_a_checkpoint(m: Net, x: Tensor) -> Tensor:
    y = x + checkpoint(lambda t: m.down(F.gelu(m.up(t))), x, use_reentrant=False)
    return F.linear(y, m.up.weight)


def mixed_halves(m: Net, x: Tensor) -> Tensor:
    u = m.fused(x)
    return x + m.down(F.silu(u[..., ::2]) * u[..., H:])


def scaled_elu(m: Net, x: Tensor) -> Tensor:
    return x + m.down(torch.ops.aten.elu.default(m.up(x), 1.673, 1.0507))


def rsub_alpha(m: Net, x: Tensor) -> Tensor:
    return x + m.down(torch.rsub(torch.tanh(m.up(x)), 1.0, alpha=2))


def scalar_changed(m: Net, x: Tensor) -> Tensor:
    scale = m.scale * 1
    h = F.gelu(m.up(x)) * m.scale
    m.scale.mul_(0.5)
    m.scale.copy_(scale)
    m.scale.mul_(0.5)
    y = x + m.down(h)
    m.scale.copy_(scale)
    return y


def changed_through_movedim(m: Net, x: Tensor) -> Tensor:
    z = x + 0
    v = z.movedim(0, 1)
    h = F.gelu(m.up(v))
    z.mul_(2)
    return m.down(h) + v


def changed_by_foreach(m: Net, x: Tensor) -> Tensor:
    z = x + 0
    h = F.gelu(m.up(z))
    torch._foreach_mul_([z], 2.0)
    return m.down(h) + z


def inplace_dropout(m: Net, x: Tensor) -> Tensor:
    h = F.gelu(m.up(x))
    d = F.dropout(h, 0.3, m.training, True)
    return x + m.down(d * h)


def weight_with_a_leading_axis(m: Net, x: Tensor) -> Tensor:
    return F.gelu(x @ m.w1.unsqueeze(0)) @ m.w2 + x


def scalar_with_leading_axes(m: Net, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x)) * m.one.view(1, 1, 1, 1))


def channels_last(m: Net, x: Tensor) -> Tensor:
    y = (
        torch.stack([x, x + 1], -1)
        .permute(0, 2, 1, 3)
        .contiguous(memory_format=torch.channels_last)
    )
    z = m.drop(m.c2(m.drop(F.gelu(m.c1(y)))))
    return z.permute(0, 2, 3, 1).view(3, -1)


def draws_in_order(m: Net, x: Tensor) -> Tensor:
    h = m.drop(F.gelu(m.up(x)))
    y = m.drop(x)
    return y + m.down(h)


def odd_bias(m: Net, x: Tensor) -> Tensor:
    return x + m.down(F.gelu(F.linear(x, m.up.weight, m.one)))


def ties_of_maximum(m: Net, x: Tensor) -> Tensor:
    h = m.up(x) * 0
    return x + m.down(torch.maximum(h, torch.zeros_like(h)))


def ties_of_clamp(m: Net, x: Tensor) -> Tensor:
    return x + m.down(torch.clamp(m.up(x) * 0, min=m.scale * 0))


def dropout_of_a_scalar(m: Net, x: Tensor) -> Tensor:
    return x + m.down(F.gelu(m.up(x)) * F.dropout(m.one, 0.3, m.training))


def bits(m: Net, x: Tensor) -> Tensor:
    return x + m.down(F.gelu(m.up(x)).view(torch.int64).to(torch.float64) * 1e-18)


CASES = [
    twisted, straight_through, detached_gate, detached_scalar, hidden_without_gradients,
    gate_without_gradients, weight_after_a_break, weight_outside_of_a_checkpoint, mixed_halves,
    scaled_elu, rsub_alpha, scalar_changed, changed_through_movedim, changed_by_foreach,
    inplace_dropout, weight_with_a_leading_axis, scalar_with_leading_axes, channels_last, draws_in_order,
    odd_bias, ties_of_maximum, ties_of_clamp, dropout_of_a_scalar, bits,
]  # fmt: skip


WITHOUT_GRADIENTS = (scalar_changed, changed_by_foreach)  # autograd refuses the dense code itself


def outcome(run: Any, model: Net, x: Tensor) -> list[Tensor | None]:
    """The output, and the gradients of its sum of squares, None where there is none."""
    torch.manual_seed(1)
    if model.run in WITHOUT_GRADIENTS:
        with torch.no_grad():
            return [run(x)]
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_rewritten_or_not_it_is_the_same(case: Callable[..., Tensor], train: bool) -> None:
    torch.manual_seed(0)
    model = Net(case).double().eval()
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(CalibrationError):  # declined altogether
            d2d.convert(model, [x.detach()], QUICK, progress=False)
        with torch.no_grad():
            assert torch.allclose(model(x), before(x), rtol=0, atol=1e-12), "the model was changed"
        model.train(train)
        torch._dynamo.reset()
        fast = torch.compile(model, backend="d2dmoe", options={"inner": "eager", "strict": False})
        found, expected = outcome(fast, model, x), outcome(model, model, x)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        assert f is None or (f.shape == e.shape and torch.allclose(f, e, rtol=0, atol=1e-10))


def test_parameters_that_share_memory_are_left_alone() -> None:
    torch.manual_seed(0)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u1, self.u2 = nn.Linear(D, H), nn.Linear(D, H)
            self.d1, self.d2 = nn.Linear(H, D), nn.Linear(H, D)
            self.u2.weight.data = self.u1.weight.data

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.d1(F.gelu(self.u1(x)))
            return x + self.d2(F.gelu(self.u2(x)))

    model, x = Shared().eval(), torch.randn(40, D)
    expected = model(x)
    with pytest.raises(CalibrationError, match=r"u1.weight shares memory with u2.weight"):
        d2d.convert(model, [x], QUICK, progress=False)
    assert torch.equal(model(x), expected)


def test_a_later_graph_that_reads_a_converted_weight_alone_is_warned_of() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return x + m.down(F.gelu(m.up(x))) if x.shape[0] > 2 else F.linear(x, m.up.weight)

    model = Net(run).eval()
    d2d.convert(model, [torch.randn(40, D)], QUICK, progress=False)
    fast = torch.compile(model, backend="d2dmoe", options={"inner": "eager", "strict": False})
    with torch.no_grad(), pytest.warns(DenseFallbackWarning, match="neurons are in expert order"):
        fast(torch.randn(2, D))


def test_calibration_under_autocast_does_its_own_arithmetic_in_full_precision() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.down(F.gelu(self.up(x.float())))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert d2d.convert(Mixed().eval(), [torch.randn(40, D)], QUICK, progress=False).experts


def test_a_soft_assignment_is_no_attention() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            s = torch.softmax(adjacency @ self.a(x), -1)
            return s.transpose(1, 2) @ F.relu(adjacency @ self.b(x))

    assert not d2d.explain(Pool().eval(), torch.randn(2, 5, 5), torch.randn(2, 5, D)).sites
