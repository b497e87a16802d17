"""Projections: what a site says of them, in every capture, with dynamic shapes and in training mode.

That they are found in all their forms is tested by the universe of models (tests/test_universe.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 16


def heads(t: Tensor, n: int = 4) -> Tensor:
    return t.view(2, 5, n, -1).transpose(1, 2)


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.k, self.v = nn.Linear(D, D // 2), nn.Linear(D, D // 2)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (heads(t, 2).repeat_interleave(2, 1) for t in (self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(heads(self.q(x)), k, v)
        return x + self.o(y.transpose(1, 2).reshape(2, 5, D))


class Fused(nn.Module):
    """GPT-2's: weights stored [in, out], softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(D, 3 * D)), nn.Parameter(torch.zeros(3 * D))
        self.o = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        fused = torch.addmm(self.b, x.view(-1, D), self.w).view(2, 5, 3 * D)
        q, k, v = (heads(t) for t in fused.split(D, 2))
        weights = ((q @ k.transpose(-1, -2)) / 2).softmax(-1)
        return x + (weights @ v).transpose(1, 2).reshape(2, 5, D) @ self.o


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("how", ["dynamo", "export", "symbolic_trace"])
def test_what_a_projection_site_says(how: str, trace: Any) -> None:
    sites = [m.site for m in trace(Separate().eval(), torch.randn(2, 5, D), how).projections()]
    assert [(s.name, s.role, s.d_model, s.d_hidden) for s in sites] == [
        ("k", "k", D, D // 2),
        ("v", "v", D, D // 2),
        ("q", "q", D, D),
        ("o", "o", D, D),
    ]
    assert all(s.kind == "projection" and not s.convertible and not s.transposed for s in sites)
    assert sites[2].params == {"weight": "q.weight"} and sites[2].biases == {"weight": "q.bias"}
    assert sites[2].tensors == {"weight": "q.weight", "weight.bias": "q.bias"}
    assert sites[3].biases == {} and sites[0].activation == ""


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_a_fused_matrix_is_one_site(how: str, trace: Any) -> None:
    sites = [m.site for m in trace(Fused().eval(), torch.randn(2, 5, D), how).projections()]
    assert [(s.name, s.role, s.d_hidden, s.transposed) for s in sites] == [
        ("w", "qkv", 3 * D, ("weight",)),
        ("o", "o", D, ("weight",)),
    ]
    assert sites[0].biases == {"weight": "b"}


def test_packed_attention_holds_two_sites(trace: Any) -> None:
    sites = [m.site for m in trace(Packed().eval(), torch.randn(2, 5, D)).projections()]
    assert [(s.name, s.role, s.d_hidden) for s in sites] == [
        ("attention.in_proj_weight", "qkv", 3 * D),
        ("attention.out_proj", "o", D),
    ]


@pytest.mark.parametrize("model", [Separate, Fused, Packed])
def test_projections_are_the_same_with_dynamic_shapes_and_in_training(
    model: type[nn.Module], trace: Any
) -> None:
    x = torch.randn(2, 5, D)
    plain = [m.site for m in trace(model().eval(), x).projections()]
    torch._dynamo.reset()
    assert [m.site for m in trace(model().eval(), x, dynamic=True).projections()] == plain
    torch._dynamo.reset()
    assert [m.site for m in trace(model().train(), x).projections()] == plain


def test_a_residual_stream_is_not_walked_past(trace: Any) -> None:
    """Values without a projection of their own: the linear before the residual add is none of it."""

    class Unprojected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.q, self.after = (nn.Linear(D, D) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.before(x)
            y = x + F.scaled_dot_product_attention(self.q(x), x, x * 2)
            return y + self.after(y)

    found = trace(Unprojected().eval(), torch.randn(2, 5, D))
    assert [(m.site.name, m.site.role) for m in found.projections()] == [("q", "q")]
