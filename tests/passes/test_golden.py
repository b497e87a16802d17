"""Readable text of four graphs, before and after; UPDATE_EXPECTED=1 accepts what they are now."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

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


FORMS: dict[str, Callable[[], nn.Module]] = {
    "ffn": FFN,
    "glu": GLU,
    "fused_glu": FusedGLU,
    "conv1d": Conv1DBlock,
}


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
    traced = trace(FORMS[name](), torch.randn(2, 5, D), dynamic=name == "conv1d")
    done = rewriting.rewrite_captured(traced.captured, traced.matches())
    found = f"# before\n{readable(traced.captured.gm)}\n# after\n{readable(done.gm)}"
    path = EXPECTED / f"{name}.txt"
    if os.environ.get("UPDATE_EXPECTED") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists(), f"{path} is missing; run with UPDATE_EXPECTED=1 and read what it writes"
    assert found == path.read_text(), f"{path} differs; UPDATE_EXPECTED=1 accepts the new graph"
