"""Readable text of one graph per form, before and after; UPDATE_EXPECTED=1 accepts what they are now."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from d2dcompile import rewriting

EXPECTED = Path(__file__).parents[1] / "expected"
D, H = 8, 16


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class GLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*s, bias=False) for s in ((D, H), (D, H), (H, D))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class FusedGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * H, bias=False), nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + self.down(up * F.silu(gate))


class Conv1DBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pairs = ((D, H), (H, D))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(*pair)) for pair in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.randn(pair[1])) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 1):
            size = (*x.size()[:-1], self.weights[i].size(1))
            y = torch.addmm(self.biases[i], x.view(-1, x.size(-1)), self.weights[i]).view(size)
            x = y if i else F.gelu(y, approximate="tanh")
        return x


class Form(nn.Module):
    """Parts by name, and a forward given as a function of (self, x)."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def lin(d_in: int, d_out: int) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=False)


def conv(d_in: int, d_out: int) -> nn.Conv2d:
    return nn.Conv2d(d_in, d_out, 1)


def fused(split: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    """A block with one matrix for gate and up."""

    def run(m: Any, x: Tensor) -> Tensor:
        gate, up = split(m.gate_up(x))
        return x + m.down(F.silu(gate) * up)

    return lambda: Form(run, gate_up=lin(D, 2 * H), down=lin(H, D))


def plain(run: Callable[..., Tensor], **parts: Any) -> Callable[[], nn.Module]:
    """A block with up and down, and other parts."""
    return lambda: Form(run, **{"up": lin(D, H), "down": lin(H, D)}, **parts)


def bmm_block(m: Any, x: Tensor) -> Tensor:
    h = torch.baddbmm(m.b, x, m.w1.unsqueeze(0).expand(2, -1, -1))
    return torch.bmm(F.relu(h), m.w2.unsqueeze(0).expand(2, -1, -1))


def checkpointed(m: Any, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return m.down(F.gelu(m.up(y)))

    return x + checkpoint(inner, x, use_reentrant=False)


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.down(F.gelu(m.up(x)))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, H, batch_first=True).eval()


FORMS: dict[str, Callable[[], nn.Module]] = {
    "ffn": FFN,
    "glu": GLU,
    "fused_glu": FusedGLU,
    "conv1d": Conv1DBlock,
    "fused_split": fused(lambda u: u.split(H, -1)),
    "fused_slices": fused(lambda u: (u[..., :H], u[..., H:])),
    "fused_pairs": fused(lambda u: u.view(2, 5, 2, H).unbind(-2)),
    "fused_interleaved": fused(lambda u: (u[..., ::2], u[..., 1::2])),
    "fused_glu_call": lambda: Form(
        lambda m, x: m.down(F.glu(m.u(x))), u=lin(D, 2 * H), down=lin(H, D)
    ),
    "einsum": lambda: Form(
        lambda m, x: torch.einsum("bth,dh->btd", F.gelu(torch.einsum("btd,hd->bth", x, m.a)), m.b),
        a=weight(H, D),
        b=weight(D, H),
    ),
    "tensordot": lambda: Form(
        lambda m, x: torch.tensordot(F.gelu(torch.tensordot(x, m.a, 1)), m.b, 1),
        a=weight(D, H),
        b=weight(H, D),
    ),
    "batched_product": lambda: Form(bmm_block, w1=weight(D, H), w2=weight(H, D), b=weight(H)),
    "product_and_bias": lambda: Form(
        lambda m, x: F.relu(x @ m.a.T + m.b) @ m.c.T, a=weight(H, D), b=weight(H), c=weight(D, H)
    ),
    "convolution": lambda: Form(lambda m, x: x + m.b(F.gelu(m.a(x))), a=conv(D, H), b=conv(H, D)),
    "chain": plain(lambda m, x: m.down((h := m.up(x)) * torch.sigmoid(1.702 * h))),
    "learnable": plain(
        lambda m, x: m.down(F.softplus(m.s) * F.relu(m.up(x))), s=nn.Parameter(torch.ones(1))
    ),
    "rows_reshaped": plain(lambda m, x: m.down(F.relu(m.up(x)).view(-1, H)).view(2, 5, D)),
    "tied": lambda: Form(lambda m, x: F.linear(F.relu(F.linear(x, m.w)), m.w.t()), w=weight(H, D)),
    "dropout_in_training": plain(lambda m, x: m.down(F.dropout(F.relu(m.up(x)), 0.5))),
    "checkpoint": plain(checkpointed),
    "autocast": plain(autocast),
    "encoder_layer": encoder_layer,
}
SHAPES = {"convolution": (2, D, 3, 3)}


def readable(gm: GraphModule) -> str:
    """print_readable without source lines, paths and trailing blanks."""
    text = gm.print_readable(print_output=False)
    lines = [line.rstrip() for line in text.splitlines() if not line.lstrip().startswith("# File:")]
    text = re.sub(r"\n{2,}", "\n", "\n".join(lines))
    for index, symbol in enumerate(dict.fromkeys(re.findall(r"\bs\d+\b", text))):
        text = re.sub(rf"\b{symbol}\b", f"size{index}", text)
    return text.strip() + "\n"


@pytest.mark.parametrize("name", FORMS)
def test_graph_before_and_after(name: str, trace) -> None:
    traced = trace(
        FORMS[name](), torch.randn(SHAPES.get(name, (2, 5, D))), dynamic=name == "conv1d"
    )
    assert len(traced.matches()) == 1, traced.reasons()
    done = rewriting.rewrite_captured(traced.captured, traced.matches())
    found = f"# before\n{readable(traced.captured.gm)}\n# after\n{readable(done.gm)}"
    path = EXPECTED / f"{name}.txt"
    if os.environ.get("UPDATE_EXPECTED") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists(), f"{path} is missing; run with UPDATE_EXPECTED=1 and read what it writes"
    assert found == path.read_text(), f"{path} differs; UPDATE_EXPECTED=1 accepts the new graph"
