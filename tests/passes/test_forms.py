"""Every spelling of a feed-forward block is found as what it is, and its rewrite computes the same.

One table of forms, each captured by Dynamo, torch.export and symbolic_trace.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2dcompile.kernels.expert_mlp import expert_mlp

D, H = 8, 16
HOWS = ("dynamo", "export", "symbolic_trace")
FFN = ("up", "down")
GLU = ("gate", "up", "down")
FUSED = ("gate_up", "down")


class Conv1D(nn.Module):
    """GPT-2's linear: weight [in, out], addmm on flattened rows."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.d_out = d_out
        self.weight, self.bias = (
            nn.Parameter(torch.randn(d_in, d_out)),
            nn.Parameter(torch.randn(d_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.d_out,)  # noqa: RUF005  (symbolic_trace cannot unpack)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Block(nn.Module):
    """Submodules and parameters by name, and a forward given as a function of (self, x)."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def ffn(act: Callable[..., Tensor], bias: bool = True, **parts: Any) -> Block:
    """down(act(self, up(x)))"""
    return Block(
        lambda m, x: m.down(act(m, m.up(x))),
        up=nn.Linear(D, H, bias=bias),
        down=nn.Linear(H, D, bias=bias),
        **parts,
    )


def glu(mix: Callable[..., Tensor], bias: bool = False) -> Block:
    """down(mix(gate(x), up(x)))"""
    return Block(
        lambda m, x: m.down(mix(m.gate(x), m.up(x))),
        gate=nn.Linear(D, H, bias=bias),
        up=nn.Linear(D, H, bias=bias),
        down=nn.Linear(H, D, bias=bias),
    )


def fused(mix: Callable[..., Tensor], bias: bool = True) -> Block:
    """down(mix(gate_up(x)))"""
    return Block(
        lambda m, x: m.down(mix(m.gate_up(x))),
        gate_up=nn.Linear(D, 2 * H, bias=bias),
        down=nn.Linear(H, D, bias=bias),
    )


def new_gelu(h: Tensor) -> Tensor:
    return (
        0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
    )


def xielu(m: Block, h: Tensor) -> Tensor:
    p, n = F.softplus(m.alpha_p), 0.5 + F.softplus(m.alpha_n)
    negative = (torch.expm1(torch.clamp(h, max=-1e-6)) - h) * n + 0.5 * h
    return torch.where(h > 0, p * h * h + 0.5 * h, negative)


def scalar(value: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value))


@dataclass(frozen=True)
class Form:
    """A block and what the matcher has to say of it.

    Attributes:
        roles: weights of the site; biases default to those of them that the block has.
        act: activation text;  exported: the same as torch.export spells it, numbers last.
        not_by: captures whose graph cannot carry it, with the reason it is refused for.
    """

    make: Callable[[], Block]
    roles: tuple[str, ...]
    act: str
    scalars: tuple[str, ...] = ()
    biases: tuple[str, ...] | None = None
    transposed: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    shape: tuple[int, ...] = (2, 5, D)
    not_by: tuple[str, ...] = ()
    exported: str | None = None


def split_at(u: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    parts = torch.split(u, [H, H], dim=dim)
    return parts[0], parts[1]


def halves_of(u: Tensor) -> tuple[Tensor, Tensor]:
    parts = u.chunk(2, dim=-1)
    return parts[0], parts[1]


def lazily_where(h: Tensor) -> Tensor:
    return torch.where(h > 0, h, torch.zeros_like(h))


def act_form(act: Callable[[Tensor], Tensor], text: str, **more: Any) -> Form:
    return Form(lambda: ffn(lambda m, h: act(h)), FFN, text, **more)


def conv1d_glu(m: Block, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def flat_views(m: Block, x: Tensor) -> Tensor:
    h = m.up(x)
    h = F.relu(h.reshape(-1, H)).unsqueeze(0).squeeze(0)
    return m.down(h.view(2, 5, H))


QUICK = "up * sigmoid(1.702 * up)"
SQUARED = "relu(up) ** 2"
NEW_GELU = "0.5 * up * (1.0 + tanh(0.7978845608028654 * (up + 0.044715 * (up ** 3.0))))"
EXPORTED_NEW_GELU = "up * 0.5 * (tanh((up + (up ** 3.0) * 0.044715) * 0.7978845608028654) + 1.0)"
XIELU = (
    "where(gt(up, 0), softplus(p0) * up * up + 0.5 * up, "
    "(expm1(clamp(up, max=-1e-06)) - up) * (0.5 + softplus(p1)) + 0.5 * up)"
)
EXPORTED_XIELU = XIELU.replace("0.5 * up", "up * 0.5").replace(
    "(0.5 + softplus(p1))", "(softplus(p1) + 0.5)"
)

FORMS: dict[str, Form] = {
    # Activations in one node: functions, methods, modules, in place.
    "gelu": act_form(F.gelu, "gelu(up)"),
    "gelu_tanh": act_form(lambda h: F.gelu(h, approximate="tanh"), "gelu(up, approximate='tanh')"),
    "relu_method": act_form(lambda h: h.relu(), "relu(up)"),
    "relu_torch": act_form(torch.relu, "relu(up)"),
    "relu_inplace": act_form(lambda h: F.relu(h, inplace=True), "relu(up)"),
    "relu_method_inplace": act_form(lambda h: h.relu_(), "relu(up)"),
    "silu": act_form(F.silu, "silu(up)"),
    "tanh": act_form(torch.tanh, "tanh(up)"),
    "sigmoid_method": act_form(lambda h: h.sigmoid(), "sigmoid(up)"),
    "mish": act_form(F.mish, "mish(up)"),
    "elu_alpha": act_form(lambda h: F.elu(h, 0.5), "elu(up, alpha=0.5)"),
    "leaky_relu": act_form(lambda h: F.leaky_relu(h, 0.2), "leaky_relu(up, negative_slope=0.2)"),
    "leaky_relu_inplace": act_form(
        lambda h: F.leaky_relu(h, 0.2, True), "leaky_relu(up, negative_slope=0.2)"
    ),
    "hardswish": act_form(F.hardswish, "hardswish(up)"),
    "threshold": act_form(
        lambda h: F.threshold(h, 0.5, 0.0), "threshold(up, threshold=0.5, value=0.0)"
    ),
    "module_gelu": Form(lambda: ffn(lambda m, h: m.fn(h), fn=nn.GELU()), FFN, "gelu(up)"),
    "module_relu_inplace": Form(
        lambda: ffn(lambda m, h: m.fn(h), fn=nn.ReLU(inplace=True)), FFN, "relu(up)"
    ),
    "module_softplus": Form(
        lambda: ffn(lambda m, h: m.fn(h), fn=nn.Softplus(beta=2.0)), FFN, "softplus(up, beta=2.0)"
    ),
    # Activations in several nodes.
    "new_gelu": act_form(new_gelu, NEW_GELU, exported=EXPORTED_NEW_GELU),
    "quick_gelu": act_form(
        lambda h: h * torch.sigmoid(1.702 * h), QUICK, exported="up * sigmoid(up * 1.702)"
    ),
    "relu_squared": act_form(lambda h: torch.square(F.relu(h)), "square(relu(up))"),
    "relu_pow": act_form(lambda h: F.relu(h) ** 2, SQUARED),
    "relu_pow_method": act_form(lambda h: h.relu().pow(2), SQUARED),
    "relu_times_itself": act_form(lambda h: F.relu(h) * F.relu(h), "relu(up) * relu(up)"),
    "clamp_min": act_form(lambda h: h.clamp(min=0), "clamp(up, min=0)"),
    "clamp_min_function": act_form(lambda h: torch.clamp_min(h, 0.0), "clamp(up, min=0.0)"),
    "clamp_both": act_form(lambda h: torch.clamp(h, -1.0, 2.0), "clamp(up, min=-1.0, max=2.0)"),
    "maximum_of_constant": act_form(
        lambda h: torch.maximum(h, torch.tensor(0.25)), "maximum(up, 0.25)"
    ),
    "max_of_zeros": act_form(lambda h: torch.max(torch.zeros_like(h), h), "maximum(0.0, up)"),
    "minimum_of_two": act_form(lambda h: torch.minimum(h, -h), "minimum(up, -up)"),
    "where_number": act_form(lambda h: torch.where(h > 0, h, 0.0), "where(gt(up, 0), up, 0.0)"),
    "where_zeros": act_form(lazily_where, "where(gt(up, 0), up, 0.0)"),
    "one_minus": act_form(lambda h: h * (1 - torch.exp(-h.abs())), "up * (1 - exp(-abs(up)))"),
    "inplace_chain": act_form(lambda h: h.mul_(0.5).relu_().add_(0.25), "relu(up * 0.5) + 0.25"),
    "multiplied_outside": act_form(lambda h: F.silu(h).div(2.0), "silu(up) / 2.0"),
    "xielu": Form(
        lambda: ffn(xielu, alpha_p=scalar(0.3, 1), alpha_n=scalar(-0.2, 1)),
        FFN,
        XIELU,
        scalars=("alpha_p", "alpha_n"),
        exported=EXPORTED_XIELU,
    ),
    "scalar_0d": Form(
        lambda: ffn(lambda m, h: F.relu(h) * m.s, s=scalar(1.5)),
        FFN,
        "relu(up) * p0",
        scalars=("s",),
    ),
    "prelu": Form(
        lambda: ffn(lambda m, h: m.fn(h), fn=nn.PReLU()),
        FFN,
        "prelu(up, p0)",
        scalars=("fn.weight",),
    ),
    # Inactive dropout, casts, views, ranks.
    "dropout": Form(
        lambda: ffn(lambda m, h: m.drop(F.relu(m.drop(h))), drop=nn.Dropout(0.5)), FFN, "relu(up)"
    ),
    "dropout_p0": act_form(lambda h: F.dropout(F.relu(h), 0.0, training=True), "relu(up)"),
    "cast": act_form(
        lambda h: F.gelu(h.float()).to(torch.float64),
        "cast(gelu(cast(up, dtype='float32')), dtype='float64')",
        not_by=("symbolic_trace",),
    ),
    "cast_to_same": act_form(
        lambda h: F.gelu(h).to(torch.float64), "gelu(up)", not_by=("symbolic_trace",)
    ),
    "contiguous": act_form(lambda h: F.gelu(h).contiguous().clone(), "gelu(up)"),
    "views": Form(
        lambda: Block(flat_views, up=nn.Linear(D, H), down=nn.Linear(H, D)),
        FFN,
        "relu(up)",
        not_by=("symbolic_trace",),
    ),
    "rows_1d": act_form(F.relu, "relu(up)", shape=(D,)),
    "rows_2d": act_form(F.relu, "relu(up)", shape=(6, D)),
    "rows_4d": act_form(F.relu, "relu(up)", shape=(2, 3, 4, D)),
    "no_bias": Form(lambda: ffn(lambda m, h: F.gelu(h), bias=False), FFN, "gelu(up)"),
    # Other linears.
    "conv1d": Form(
        lambda: Block(lambda m, x: m.down(F.gelu(m.up(x))), up=Conv1D(H, D), down=Conv1D(D, H)),
        FFN,
        "gelu(up)",
        transposed=FFN,
    ),
    "conv1d_and_linear": Form(
        lambda: Block(
            lambda m, x: m.down(F.gelu(m.up(x))),
            up=nn.Linear(D, H),
            down=nn.Linear(H, D, bias=False),
        ),
        FFN,
        "gelu(up)",
        biases=("up",),
    ),
    "conv1d_glu": Form(
        lambda: Block(conv1d_glu, gate=Conv1D(H, D), up=Conv1D(H, D), down=Conv1D(D, H)),
        GLU,
        "silu(gate) * up",
        transposed=GLU,
    ),
    "matmul_T": Form(
        lambda: Block(
            lambda m, x: F.relu(x @ m.up.weight.T) @ m.down.weight.t(),
            up=nn.Linear(D, H, bias=False),
            down=nn.Linear(H, D, bias=False),
        ),
        FFN,
        "relu(up)",
    ),
    "matmul_in_out": Form(
        lambda: Block(
            lambda m, x: torch.matmul(F.relu(x.matmul(m.up.weight)), m.down.weight.transpose(0, 1)),
            up=nn.Linear(H, D, bias=False),
            down=nn.Linear(H, D, bias=False),
        ),
        FFN,
        "relu(up)",
        transposed=("up",),
    ),
    "addmm_permuted": Form(
        lambda: Block(
            lambda m, x: torch.addmm(
                m.down.bias, F.relu(torch.mm(x, m.up.weight.permute(1, 0))), m.down.weight.mT
            ),
            up=nn.Linear(D, H, bias=False),
            down=nn.Linear(H, D),
        ),
        FFN,
        "relu(up)",
        shape=(6, D),
    ),
    # Gated blocks.
    "swiglu": Form(lambda: glu(lambda g, u: F.silu(g) * u), GLU, "silu(gate) * up"),
    "geglu_up_first": Form(
        lambda: glu(lambda g, u: u * F.gelu(g), bias=True), GLU, "up * gelu(gate)"
    ),
    "bilinear": Form(lambda: glu(lambda g, u: g * u), GLU, "gate * up"),
    "clamped_glu": Form(
        lambda: glu(lambda g, u: F.silu(g.clamp(max=7.0)) * (u.clamp(-7.0, 7.0) + 1)),
        GLU,
        "silu(clamp(gate, max=7.0)) * (clamp(up, min=-7.0, max=7.0) + 1)",
    ),
    "relu_of_sum": Form(lambda: glu(lambda g, u: F.relu(g + u)), GLU, "relu(gate + up)"),
    "fused_chunk": Form(
        lambda: fused(lambda u: (lambda g, v: F.silu(g) * v)(*halves_of(u))),
        FUSED,
        "silu(gate) * up",
        halves=("gate", "up"),
    ),
    "fused_chunk_second": Form(
        lambda: fused(lambda u: (lambda v, g: v * F.gelu(g))(*halves_of(u)), bias=False),
        FUSED,
        "up * gelu(gate)",
        halves=("up", "gate"),
    ),
    "fused_split": Form(
        lambda: fused(lambda u: (lambda g, v: F.silu(g) * v)(*split_at(u))),
        FUSED,
        "silu(gate) * up",
        halves=("gate", "up"),
    ),
    "fused_split_size": Form(
        lambda: fused(lambda u: u.split(H, -1)[0] * torch.sigmoid(u.split(H, -1)[-1])),
        FUSED,
        "up * sigmoid(gate)",
        halves=("up", "gate"),
    ),
    "fused_slices": Form(
        lambda: fused(lambda u: F.silu(u[..., :H]) * u[..., H:]),
        FUSED,
        "silu(gate) * up",
        halves=("gate", "up"),
    ),
    "fused_slices_second": Form(
        lambda: fused(lambda u: u[:, :, :H] * F.silu(u[:, :, H:])),
        FUSED,
        "up * silu(gate)",
        halves=("up", "gate"),
    ),
    "fused_glu": Form(lambda: fused(F.glu), FUSED, "up * sigmoid(gate)", halves=("up", "gate")),
    "fused_glu_module": Form(
        lambda: Block(
            lambda m, x: m.down(m.act(m.gate_up(x))),
            gate_up=nn.Linear(D, 2 * H),
            down=nn.Linear(H, D),
            act=nn.GLU(dim=-1),
        ),
        FUSED,
        "up * sigmoid(gate)",
        halves=("up", "gate"),
    ),
}


def cases() -> list[Any]:
    return [
        pytest.param(form, how, id=f"{name}-{how}")
        for name, form in FORMS.items()
        for how in HOWS
        if how not in form.not_by
    ]


@pytest.mark.parametrize(("form", "how"), cases())
def test_form_is_found_and_its_rewrite_is_the_same(
    form: Form, how: str, trace, convert_by_hand
) -> None:
    model = form.make().double().eval()
    x = torch.randn(form.shape, dtype=torch.float64)
    with torch.no_grad():
        traced = trace(model, x, how)
        found = traced.matches()
        assert [m.site.kind for m in found] == ["ffn" if form.roles == FFN else "glu"], (
            traced.reasons()
        )
        text = form.exported if how == "export" and form.exported else form.act
        check_site(form, model, found[0].site, text)
        expected = model(x.clone())
        run = traced.rewritten(convert_by_hand(traced))
        for original in traced.captured.gm.graph.nodes:
            assert original.target is not expert_mlp.overload, "the captured graph was edited"
        assert torch.allclose(
            run(), expected, rtol=0, atol=1e-6 if "float32" in form.act else 1e-12
        )


def check_site(form: Form, model: Block, site: Any, text: str) -> None:
    assert site.params == {role: f"{role}.weight" for role in form.roles}
    biases = form.biases
    if biases is None:
        named = dict(model.named_parameters())
        biases = tuple(role for role in form.roles if f"{role}.bias" in named)
        if "matmul" in str(model.run.__code__.co_names):
            biases = ()
    scalars = {f"p{i}": name for i, name in enumerate(form.scalars)}
    assert site.biases == {**{role: f"{role}.bias" for role in biases}, **scalars}
    assert site.activation == text
    assert (site.transposed, site.halves) == (form.transposed, form.halves)
    assert (site.d_model, site.d_hidden, site.calls) == (D, H, 1)
    assert site.name == form.roles[0]


def test_forms_not_found_by_a_capture_are_refused_there(trace) -> None:
    for name, form in FORMS.items():
        for how in form.not_by:
            model = form.make().double().eval()
            traced = trace(model, torch.randn(form.shape, dtype=torch.float64), how)
            assert traced.matches() == [], (
                f"{name} is found by {how} after all: remove it from not_by"
            )


DYNAMIC = (
    "gelu",
    "new_gelu",  # math.pi becomes a symbol
    "conv1d",
    "swiglu",
    "fused_chunk",
    "fused_slices",
    "views_dynamic",
)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes(name: str, trace, convert_by_hand) -> None:
    if name == "views_dynamic":
        model: nn.Module = ffn(lambda m, h: F.relu(h.reshape(-1, H)).reshape(h.shape))
    else:
        model = FORMS[name].make()
    model = model.double().eval()
    x = torch.randn(3, 7, D, dtype=torch.float64)
    with torch.no_grad():
        traced = trace(model, x, dynamic=True)
        assert any(isinstance(a, int) for a in traced.args), "no size is symbolic"
        assert len(traced.matches()) == 1, traced.reasons()
        if name in FORMS:
            assert traced.matches()[0].site.activation == FORMS[name].act
        expected = model(x)
        assert torch.allclose(
            traced.rewritten(convert_by_hand(traced))(), expected, rtol=0, atol=1e-12
        )


class Layer(nn.Module):
    """Attention and feed-forward in parallel, then a gated block: two sites per layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        hidden = F.gelu(self.fc1(y))
        mixed = self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        x = x + mixed + 0.5 * self.fc2(hidden)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("how", HOWS)
def test_two_blocks_per_layer_beside_attention(how: str, trace, convert_by_hand) -> None:
    model = nn.Sequential(Layer(), Layer()).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with torch.no_grad():
        traced = trace(model, x, how)
        names = [m.site.name for m in traced.matches()]
        assert names == ["0.fc1", "0.gate", "1.fc1", "1.gate"]
        projections = [(m.site.name, m.site.role) for m in traced.projections()]
        assert projections == [(f"{i}.{role}", role) for i in (0, 1) for role in "qkvo"]
        expected = model(x)
        assert torch.allclose(
            traced.rewritten(convert_by_hand(traced))(), expected, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("how", HOWS)
def test_the_same_block_called_twice_is_one_site_with_two_calls(
    how: str, trace, convert_by_hand
) -> None:
    block = ffn(lambda m, h: F.gelu(h))
    model = Block(lambda m, x: m.block(m.block(x) + x), block=block).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with torch.no_grad():
        traced = trace(model, x, how)
        sites = [m.site for m in traced.matches()]
        assert [(s.name, s.calls) for s in sites] == [("block", 2), ("block", 2)]
        assert sites[0] == sites[1]
        expected = model(x)
        run = traced.rewritten(convert_by_hand(traced))
        assert torch.allclose(run(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", HOWS)
def test_a_block_may_read_another_ones_output(how: str, trace, convert_by_hand) -> None:
    """Without a residual the second block's input is the node that the first rewrite replaces."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(), nn.Linear(H, D)),
        nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D), nn.Dropout()),
    )
    model, x = model.double().eval(), torch.randn(4, D, dtype=torch.float64)
    traced = trace(model, x, how)
    sites = [m.site for m in traced.matches()]
    assert [(s.name, s.activation) for s in sites] == [("0", "relu(up)"), ("1", "silu(up)")]
    assert sites[0].params == {"up": "0.0.weight", "down": "0.3.weight"}
    with torch.no_grad():
        expected = model(x)
        run = traced.rewritten(convert_by_hand(traced))
        assert torch.allclose(run(), expected, rtol=0, atol=1e-12)


def test_rules_do_not_depend_on_operand_order_of_the_gate(trace) -> None:
    """The gate is the operand under the nonlinearity, whichever linear ran first."""
    run = Block(
        lambda m, x: m.down(m.up(x) * F.silu(m.gate(x))),
        up=nn.Linear(D, H),
        gate=nn.Linear(D, H),
        down=nn.Linear(H, D),
    )
    site = trace(copy.deepcopy(run), torch.randn(3, D)).matches()[0].site
    assert site.params == {"gate": "gate.weight", "up": "up.weight", "down": "down.weight"}
    assert site.activation == "up * silu(gate)"


def test_a_block_may_read_an_activation_where_its_output_is_added_to_it(trace) -> None:
    """An input layer with an activation makes no deeper MLP of the first residual block."""
    model = Block(
        lambda m, x: (y := F.relu(m.embed(x))) + m.down(F.gelu(m.up(y))),
        embed=nn.Linear(D, D),
        up=nn.Linear(D, H),
        down=nn.Linear(H, D),
    )
    assert [m.site.params["up"] for m in trace(model, torch.randn(2, 5, D)).matches()] == [
        "up.weight"
    ]


def test_a_norm_after_a_block_is_no_router(trace) -> None:
    """x * rsqrt(mean(x^2)) has a factor of one number per token, and attention's softmax before it."""

    def run(m: Block, x: Tensor) -> Tensor:
        y = x + (x @ x.transpose(-1, -2)).softmax(-1) @ x
        y = y + m.down(F.gelu(m.up(y)))
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)

    model = Block(run, up=nn.Linear(D, H), down=nn.Linear(H, D))
    assert len(trace(model, torch.randn(2, 5, D)).matches()) == 1
