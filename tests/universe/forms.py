"""Feed-forward blocks and attention as users write them by hand, one spelling per case.

A form is a factory of one block and the truth about that block. `Stack` repeats it in a pre-norm
residual stack, and the truth is repeated under the name of each layer. Most forms are `Net`s: a
bag of submodules and a function which says what the forward pass does with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .case import Case, Truth

D, H, HEADS, BATCH, TOKENS = 32, 64, 4, 2, 7
HEAD = D // HEADS

Unary = Callable[[Tensor], Tensor]
Factory = Callable[[], nn.Module]
Call = Callable[[], tuple[Any, ...]]

MLP = {"up": "up.weight", "down": "down.weight"}
GLU = {"up": "up.weight", "gate": "gate.weight", "down": "down.weight"}
FUSED = {"gate_up": "gate_up.weight", "down": "down.weight"}
QKVO = {"q.weight": "q", "k.weight": "k", "v.weight": "v", "o.weight": "o"}
QKV_O = {"qkv.weight": "qkv", "o.weight": "o"}


class Net(nn.Module):
    """Submodules, parameters and buffers by name, and the function to run with them."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


class Stack(nn.Module):
    """Layers of one kind, each (by default) behind a LayerNorm and beside a residual."""

    def __init__(
        self, block: Factory, depth: int = 2, norm: Factory | None = None, residual: bool = True
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(depth))
        norm = norm or (lambda: nn.LayerNorm(D))
        self.norms = nn.ModuleList(norm() for _ in range(depth))
        self.residual = residual

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out = layer(norm(x), *others)
            x = x + out if self.residual else out
        return x


class RMSNorm(nn.Module):
    """The root mean square norm written out, as in T5 and Llama."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def rows(batch: int = BATCH, tokens: int = TOKENS, width: int = D) -> Call:
    """A call with one activation [batch, tokens, width]."""
    return lambda: (torch.randn(batch, tokens, width),)


def linear(n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=bias)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.2)


def make_case(
    name: str,
    build: Factory,
    call: Call,
    blocks: tuple[Mapping[str, str], ...] = (),
    projections: Mapping[str, str] | None = None,
    optional: tuple[str, ...] = (),
    note: str = "",
) -> Case:
    """A case with its truth written out by full parameter names."""

    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().eval(), call()

    truth = Truth(blocks, projections or {}, frozenset(optional))
    return Case(name, make, lambda model: truth, note)


def form(
    name: str,
    block: Factory,
    blocks: tuple[Mapping[str, str], ...] = (),
    projections: Mapping[str, str] | None = None,
    optional: tuple[str, ...] = (),
    call: Call | None = None,
    note: str = "",
    **stack: Any,
) -> Case:
    """A case with `block` in a `Stack`; the truth is given by names inside one block."""
    prefixes = [f"layers.{i}." for i in range(stack.get("depth", 2))]
    return make_case(
        f"form/{name}",
        lambda: Stack(block, **stack),
        call or rows(),
        tuple({r: p + w for r, w in block.items()} for p in prefixes for block in blocks),
        {p + w: role for p in prefixes for w, role in (projections or {}).items()},
        tuple(p + w for p in prefixes for w in optional),
        note,
    )


# Feed-forward blocks: how the two products are spelled


class Product(nn.Module):
    """One linear map, spelled by a function of the input, the weight and the bias."""

    def __init__(
        self, spell: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...], n_out: int
    ) -> None:
        super().__init__()
        self.spell = spell
        self.weight = matrix(*shape)
        self.bias = nn.Parameter(torch.randn(n_out) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.spell(x, self.weight, self.bias)


def addmm_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """GPT-2's Conv1D."""
    return torch.addmm(b, x.view(-1, x.size(-1)), w).view(*x.shape[:-1], w.size(1))


def mm_reshaped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (torch.mm(x.reshape(-1, x.shape[-1]), w.t()) + b).reshape(*x.shape[:-1], -1)


def bmm_expanded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(x, w.t().unsqueeze(0).expand(x.size(0), -1, -1)) + b


def baddbmm_expanded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(b, x, w.expand(x.size(0), *w.shape))


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "matmul_transposed": (lambda x, w, b: x @ w.T + b, "oi"),
    "matmul_mt": (lambda x, w, b: b + torch.matmul(x, w.mT), "oi"),
    "matmul_in_out": (lambda x, w, b: x @ w + b, "io"),
    "conv1d_gpt2": (addmm_rows, "io"),
    "mm_reshaped": (mm_reshaped, "oi"),
    "bmm_expanded": (bmm_expanded, "oi"),
    "baddbmm_expanded": (baddbmm_expanded, "io"),
    "einsum_out_in": (lambda x, w, b: torch.einsum("bsd,fd->bsf", x, w) + b, "oi"),
    "einsum_ellipsis": (lambda x, w, b: torch.einsum("...d,df->...f", x, w) + b, "io"),
    "tensordot": (lambda x, w, b: torch.tensordot(x, w, dims=([2], [1])) + b, "oi"),
    "functional_linear": (F.linear, "oi"),
}


def spelled(spell: Callable[[Tensor, Tensor, Tensor], Tensor], order: str) -> nn.Module:
    def shape(n_in: int, n_out: int) -> tuple[int, int]:
        return (n_out, n_in) if order == "oi" else (n_in, n_out)

    return Net(
        lambda m, x: m.down(F.gelu(m.up(x))),
        up=Product(spell, shape(D, H), H),
        down=Product(spell, shape(H, D), D),
    )


def conv1d_mlp() -> nn.Module:
    return Net(
        lambda m, x: m.down(F.relu(m.up(x.transpose(1, 2)))).transpose(1, 2),
        up=nn.Conv1d(D, H, 1),
        down=nn.Conv1d(H, D, 1),
    )


def conv2d_mlp() -> nn.Module:
    """PoolFormer's MLP; its norm is a GroupNorm over channels first."""
    return Net(lambda m, x: m.down(F.gelu(m.up(x))), up=nn.Conv2d(D, H, 1), down=nn.Conv2d(H, D, 1))


def bare_weights() -> nn.Module:
    """Weights held by the block itself, with no module for a linear map."""
    return Net(
        lambda m, x: F.linear(F.silu(F.linear(x, m.w1, m.b1)), m.w2, m.b2),
        w1=matrix(H, D),
        b1=matrix(H),
        w2=matrix(D, H),
        b2=matrix(D),
    )


def spelling_forms() -> list[Case]:
    made = [
        form(f"mlp_{name}", lambda how=how: spelled(*how), (MLP,))
        for name, how in SPELLINGS.items()
    ]
    return [
        *made,
        form("mlp_conv1d", conv1d_mlp, (MLP,)),
        form(
            "mlp_conv2d",
            conv2d_mlp,
            (MLP,),
            norm=lambda: nn.GroupNorm(1, D),
            call=lambda: (torch.randn(BATCH, D, 3, 4),),
        ),
        form("mlp_bare_weights", bare_weights, ({"up": "w1", "down": "w2"},)),
    ]


# Feed-forward blocks: the activation and what stands around it


class XIELU(nn.Module):
    """Apertus' activation, with a learnable slope on either side of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor([0.5]))
        self.alpha_n = nn.Parameter(torch.tensor([0.3]))
        self.register_buffer("beta", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        alpha_p = F.softplus(self.alpha_p)
        alpha_n = self.beta + F.softplus(self.alpha_n)
        negative = (torch.expm1(torch.clamp_max(x, -1e-6)) - x) * alpha_n + self.beta * x
        return torch.where(x > 0, alpha_p * x * x + self.beta * x, negative)


def relu_product(t: Tensor) -> Tensor:
    r = F.relu(t)
    return r * r


def new_gelu(t: Tensor) -> Tensor:
    return 0.5 * t * (1.0 + torch.tanh(0.7978845608 * (t + 0.044715 * torch.pow(t, 3.0))))


def erf_gelu(t: Tensor) -> Tensor:
    return t * 0.5 * (1.0 + torch.erf(t / math.sqrt(2.0)))


ACTIVATIONS: dict[str, Callable[[], Unary]] = {
    "gelu_tanh": lambda: lambda t: F.gelu(t, approximate="tanh"),
    "relu_inplace": lambda: nn.ReLU(inplace=True),
    "relu_square": lambda: lambda t: torch.square(F.relu(t)),
    "relu_pow": lambda: lambda t: t.relu().pow(2),
    "relu_product": lambda: relu_product,
    "quick_gelu": lambda: lambda t: t * torch.sigmoid(1.702 * t),
    "new_gelu": lambda: new_gelu,
    "erf_gelu": lambda: erf_gelu,
    "mish": lambda: F.mish,
    "clamp_min": lambda: lambda t: t.clamp(min=0),
    "maximum": lambda: lambda t: torch.maximum(t, torch.zeros_like(t)),
    "where": lambda: lambda t: torch.where(t > 0, t, 0.01 * t),
    "threshold": lambda: lambda t: t * (t > 0.1),
    "softplus_chain": lambda: lambda t: t * torch.tanh(torch.log1p(torch.exp(t))),
    "tanh": lambda: torch.tanh,
    "xielu": XIELU,
    "prelu": lambda: nn.PReLU(),
}


class Mlp(nn.Module):
    """up, activation, down, with room for what users put between them."""

    def __init__(
        self,
        activation: Callable[[], Unary] = lambda: F.gelu,
        hidden: int = H,
        up_bias: bool = True,
        down_bias: bool = True,
        before: Unary | None = None,
        after: Unary | None = None,
    ) -> None:
        super().__init__()
        self.up = linear(D, hidden, up_bias)
        self.down = linear(hidden, D, down_bias)
        self.activation = activation()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        t = self.up(x)
        t = self.before(t) if self.before else t
        t = self.activation(t)
        return self.down(self.after(t) if self.after else t)


def late_bias() -> nn.Module:
    """Biases added as parameters of the block, after bias-free linear maps."""
    return Net(
        lambda m, x: m.down(F.gelu(m.up(x) + m.up_bias)) + m.down_bias,
        up=linear(D, H, False),
        up_bias=matrix(H),
        down=linear(H, D, False),
        down_bias=matrix(D),
    )


def dropped() -> nn.Module:
    return Net(
        lambda m, x: m.drop(m.down(F.dropout(F.relu(m.up(x)), 0.3, m.training))),
        up=linear(D, H),
        down=linear(H, D),
        drop=nn.Dropout(0.1),
    )


def half_precision() -> nn.Module:
    """A bfloat16 block which evaluates its activation in float32."""

    def run(m: Any, x: Tensor) -> Tensor:
        t = m.up(x.to(torch.bfloat16))
        return m.down(F.silu(t.float()).to(t.dtype)).to(x.dtype)

    return Net(run, up=linear(D, H).bfloat16(), down=linear(H, D).bfloat16())


def float_inside() -> nn.Module:
    return Net(
        lambda m, x: m.down(F.gelu(m.up(x).float()).type_as(x)), up=linear(D, H), down=linear(H, D)
    )


def flattened() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        flat = x.reshape(batch * tokens, width)
        return m.down(F.gelu(m.up(flat))).view(batch, tokens, width)

    return Net(run, up=linear(D, H), down=linear(H, D))


def hidden_reshaped() -> nn.Module:
    """Only the hidden value is flattened, between the two maps."""
    return Net(
        lambda m, x: m.down(F.gelu(m.up(x)).view(-1, H)).view_as(x),
        up=linear(D, H),
        down=linear(H, D),
    )


def scaled() -> nn.Module:
    return Net(
        lambda m, x: m.down(F.gelu(m.up(x * 0.5) * 2.0) / math.sqrt(H)) * 0.7,
        up=linear(D, H),
        down=linear(H, D),
    )


def sub_norm() -> nn.Module:
    """A sub-LN block: LayerNorm between the activation and the second map."""
    return Net(
        lambda m, x: m.down(m.norm(F.gelu(m.up(x)))),
        up=linear(D, H),
        norm=nn.LayerNorm(H),
        down=linear(H, D),
    )


def sequential() -> nn.Module:
    return nn.Sequential(linear(D, H), nn.GELU(), nn.Dropout(0.1), linear(H, D), nn.Dropout(0.1))


def activation_forms() -> list[Case]:
    made = [
        form(f"mlp_{name}", lambda make=make: Mlp(make), (MLP,))
        for name, make in ACTIVATIONS.items()
    ]
    return [
        *made,
        form("mlp_wide", lambda: Mlp(hidden=96), (MLP,)),
        form("mlp_narrow", lambda: Mlp(hidden=48, up_bias=False, down_bias=False), (MLP,)),
        form("mlp_square", lambda: Mlp(hidden=D), (MLP,), note="hidden as wide as the model"),
        form("mlp_bias_up", lambda: Mlp(down_bias=False), (MLP,)),
        form("mlp_bias_down", lambda: Mlp(up_bias=False), (MLP,)),
        form("mlp_late_bias", late_bias, (MLP,)),
        form("mlp_dropout", dropped, (MLP,)),
        form("mlp_bf16", half_precision, (MLP,)),
        form("mlp_float_inside", float_inside, (MLP,)),
        form("mlp_flattened", flattened, (MLP,)),
        form("mlp_hidden_reshaped", hidden_reshaped, (MLP,)),
        form("mlp_scaled", scaled, (MLP,)),
        form(
            "mlp_clamped",
            lambda: Mlp(before=lambda t: t.clamp(-3, 3), after=lambda t: t.contiguous() + 0.1),
            (MLP,),
        ),
        form("mlp_sub_norm", sub_norm, (MLP,)),
        form("mlp_sequential", sequential, ({"up": "0.weight", "down": "3.weight"},)),
    ]


# Gated feed-forward blocks


def gated(combine: Callable[[Tensor, Tensor], Tensor], gate_bias: bool = False) -> nn.Module:
    """GLU of separate linear maps; `combine` takes the gate's value and the up value."""
    return Net(
        lambda m, x: m.down(combine(m.gate(x), m.up(x))),
        gate=linear(D, H, gate_bias),
        up=linear(D, H, False),
        down=linear(H, D, False),
    )


def fused(combine: Unary) -> nn.Module:
    """GLU of one linear map; `combine` takes its value, of twice the hidden width."""
    return Net(
        lambda m, x: m.down(combine(m.gate_up(x))), gate_up=linear(D, 2 * H), down=linear(H, D)
    )


def clamped_glu(g: Tensor, u: Tensor) -> Tensor:
    """The gate of gpt-oss: clamps, a slope in the sigmoid, and one added to up."""
    g, u = g.clamp(max=7.0), u.clamp(min=-7.0, max=7.0)
    return (u + 1) * (g * torch.sigmoid(g * 1.702))


def by_chunk(t: Tensor) -> Tensor:
    g, u = t.chunk(2, dim=-1)
    return F.silu(g) * u


def by_chunk_second(t: Tensor) -> Tensor:
    u, g = t.chunk(2, dim=-1)
    return u * F.gelu(g)


def by_split(t: Tensor) -> Tensor:
    g, u = torch.split(t, [H, H], dim=-1)
    return F.relu(g) * u


def by_unbind(t: Tensor) -> Tensor:
    g, u = t.view(*t.shape[:-1], 2, H).unbind(-2)
    return u * F.silu(g)


def interleaved_view(t: Tensor) -> Tensor:
    pairs = t.view(*t.shape[:-1], H, 2)
    return F.silu(pairs[..., 0]) * pairs[..., 1]


SEPARATE_GLUS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "glu_silu": lambda g, u: F.silu(g) * u,
    "glu_silu_swapped": lambda g, u: u * F.silu(g),
    "glu_gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "glu_relu": lambda g, u: torch.mul(u, F.relu(g)),
    "glu_sigmoid": lambda g, u: torch.sigmoid(g) * u,
    "glu_chain": lambda g, u: g * torch.sigmoid(g) * u,
    "glu_clamped": clamped_glu,
    "glu_multiplied": lambda g, u: F.silu(g * 1.5) * u * 0.8,
}

FUSED_GLUS: dict[str, Unary] = {
    "fused_chunk": by_chunk,
    "fused_chunk_second": by_chunk_second,
    "fused_split": by_split,
    "fused_slices": lambda t: F.silu(t[..., :H]) * t[..., H:],
    "fused_unbind": by_unbind,
    "fused_interleaved": interleaved_view,
    "fused_strided": lambda t: F.gelu(t[..., ::2]) * (1 + t[..., 1::2]),
    "fused_narrow": lambda t: F.silu(t.narrow(-1, 0, H)) * t.narrow(-1, H, H),
    "fused_glu": lambda t: F.glu(t, dim=-1),
}


def glu_forms() -> list[Case]:
    bilinear_note = "no activation: neither branch is a gate more than the other"
    return [
        *(
            form(name, lambda combine=combine: gated(combine), (GLU,))
            for name, combine in SEPARATE_GLUS.items()
        ),
        form("glu_bilinear", lambda: gated(torch.mul), (GLU,), note=bilinear_note),
        form("glu_gate_bias", lambda: gated(lambda g, u: F.silu(g) * u, True), (GLU,)),
        *(
            form(name, lambda combine=combine: fused(combine), (FUSED,))
            for name, combine in FUSED_GLUS.items()
        ),
    ]


# Feed-forward blocks: where they stand in the model


def tied() -> nn.Module:
    return Net(
        lambda m, x: F.relu(F.linear(x, m.weight, m.bias)) @ m.weight,
        weight=matrix(H, D),
        bias=matrix(H),
    )


def chunked() -> nn.Module:
    """The tokens go through the same block in pieces, as with HF's chunk_size_feed_forward."""
    return Net(
        lambda m, x: torch.cat([m.ffn(part) for part in x.split(3, dim=1)], dim=1), ffn=Mlp()
    )


def checkpointed() -> nn.Module:
    return Net(lambda m, x: checkpoint(m.ffn, x, use_reentrant=False), ffn=Mlp())


def layer_scaled() -> nn.Module:
    return Net(
        lambda m, x: m.gamma * m.ffn(x), ffn=Mlp(), gamma=nn.Parameter(torch.full((D,), 0.1))
    )


def modulated() -> nn.Module:
    """A DiT layer's FFN half: shift, scale and gate come from a conditioning vector."""

    def run(m: Any, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = m.modulation(F.silu(condition)).unsqueeze(1).chunk(3, dim=-1)
        return gate * m.ffn(x * (1 + scale) + shift)

    return Net(run, modulation=linear(D, 3 * D), ffn=Mlp(lambda: nn.GELU(approximate="tanh")))


def macaron() -> nn.Module:
    """Two half-step FFNs with a norm of their own, as in a Conformer."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = x + 0.5 * m.first(x)
        return 0.5 * m.second(m.norm(x))

    return Net(run, first=Mlp(lambda: F.silu), norm=nn.LayerNorm(D), second=Mlp(lambda: F.silu))


def windows() -> nn.Module:
    """An FFN over windows cut from [B, H, W, C]."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        cut = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        out = m.ffn(cut).view(b, h // 2, w // 2, 2, 2, c)
        return out.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)

    return Net(run, ffn=Mlp())


def recurrent() -> nn.Module:
    """One block run three times over, as in a universal transformer."""

    def run(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.ffn(m.norm(x))
        return x

    return Net(run, norm=nn.LayerNorm(D), ffn=Mlp())


def two_streams() -> nn.Module:
    """One block run on two token streams."""
    return Net(lambda m, x, y: torch.cat([m.ffn(x), m.ffn(y)], dim=1), ffn=Mlp())


def inside(block: Mapping[str, str], *prefixes: str) -> tuple[dict[str, str], ...]:
    """The truth of a block under one or more submodule names."""
    return tuple({role: f"{p}.{w}" for role, w in block.items()} for p in prefixes)


def placement_forms() -> list[Case]:
    ffn = inside(MLP, "ffn")

    def image() -> tuple[Tensor]:
        return (torch.randn(BATCH, 4, 6, D),)

    return [
        form(
            "mlp_tied",
            tied,
            ({"up": "weight", "down": "weight"},),
            note="one matrix is up and, transposed, down",
        ),
        form("mlp_chunked", chunked, ffn),
        form("mlp_checkpoint", checkpointed, ffn),
        form("mlp_layer_scale", layer_scaled, ffn),
        form(
            "mlp_modulated",
            modulated,
            ffn,
            call=lambda: (torch.randn(BATCH, TOKENS, D), torch.randn(BATCH, D)),
        ),
        form("mlp_macaron", macaron, inside(MLP, "first", "second")),
        form("mlp_4d", lambda: gated(lambda g, u: F.silu(g) * u), (GLU,), call=image),
        form("mlp_windows", windows, ffn, call=image),
        form("mlp_2d", Mlp, (MLP,), call=lambda: (torch.randn(BATCH * TOKENS, D),)),
        form("mlp_no_residual", Mlp, (MLP,), residual=False),
        form("mlp_rms_norm", lambda: Mlp(lambda: F.relu), (MLP,), norm=RMSNorm),
        form("mlp_no_norm", Mlp, (MLP,), norm=nn.Identity),
        make_case("form/mlp_bare", Mlp, rows(), (MLP,), note="no residual and no norm"),
        make_case("form/mlp_recurrent", recurrent, rows(), ffn),
        make_case(
            "form/mlp_two_streams",
            two_streams,
            lambda: (torch.randn(BATCH, TOKENS, D), torch.randn(BATCH, 5, D)),
            ffn,
        ),
    ]


# Attention: the core between separate projections

Core = Callable[..., Tensor]


def heads(t: Tensor, n: int = HEADS) -> Tensor:
    """[B, S, n * h] as [B, n, S, h]."""
    return t.view(*t.shape[:2], n, -1).transpose(1, 2)


def merge(t: Tensor) -> Tensor:
    """[B, n, S, h] as [B, S, n * h]."""
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], -1)


def causal_mask(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


def core_sdpa(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def core_mask_add(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(HEAD)
    mask = (~causal_mask(q.size(2))).to(scores.dtype) * torch.finfo(scores.dtype).min
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, 0.1, m.training) @ v


def core_where(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * HEAD**-0.5) @ k.mT
    return attend(torch.where(causal_mask(q.size(2)), scores, -1e4), v)


def core_masked_fill(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q is divided and k multiplied: the scale is spread over both operands."""
    scores = (q / math.sqrt(HEAD)) @ (k * 1.25).transpose(2, 3)
    return attend(scores.masked_fill(~causal_mask(q.size(2)), float("-inf")), v)


def core_einsum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bnqh,bnkh->bnqk", q, k) * HEAD**-0.5
    return torch.einsum("bnqk,bnkh->bnqh", scores.softmax(-1), v)


def core_alibi(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BLOOM's scores: `baddbmm` onto a bias that is linear in the distance."""
    b, n, s, h = q.shape
    slopes = 2.0 ** -torch.arange(1, n + 1)
    alibi = (slopes[:, None, None] * torch.arange(s)).repeat(b, 1, 1)
    flat_q, flat_k = q.reshape(b * n, s, h), k.reshape(b * n, s, h).transpose(1, 2)
    scores = alibi.baddbmm(batch1=flat_q, batch2=flat_k, beta=1.0, alpha=h**-0.5)
    return torch.bmm(scores.softmax(-1), v.reshape(b * n, s, h)).view(b, n, s, h)


def core_softcap(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * HEAD**-0.5
    return attend(torch.tanh(scores / 30.0) * 30.0, v)


def core_sinks(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt-oss: one learned logit per head joins the scores and leaves after the softmax."""
    scores = q @ k.transpose(-1, -2) * HEAD**-0.5
    sinks = m.sinks.view(1, HEADS, 1, 1).expand(q.size(0), -1, q.size(2), 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)
    return weights[..., :-1] @ v


def core_norm(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.q_norm(q), m.k_norm(k), v)


def rotate_half(t: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def core_rope(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    frequencies = 1.0 / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)
    angles = torch.outer(torch.arange(q.size(2)).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def core_rope_complex(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Interleaved pairs turned as complex numbers, as in Meta's Llama."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)
    angles = torch.outer(torch.arange(q.size(2)).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(3).type_as(t)

    return F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)


def core_position_bias(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """T5's: no scale, and a bias per head looked up by relative position."""
    positions = torch.arange(q.size(2))
    distance = (positions[None, :] - positions[:, None]).clamp(-4, 4) + 4
    bias = m.position(distance).permute(2, 0, 1).unsqueeze(0)
    return attend(q @ k.transpose(3, 2) + bias, v)


def core_talking(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear maps across heads, before and after the softmax."""
    scores = q @ k.transpose(-1, -2) * HEAD**-0.5
    scores = m.mix_scores(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weights = m.mix_weights(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return weights @ v


def core_cache_cat(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    past = m.past.expand(q.size(0), -1, -1, -1)
    return F.scaled_dot_product_attention(
        q, torch.cat([past, k], dim=2), torch.cat([0.5 * past, v], dim=2)
    )


def core_cache_static(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A static cache: keys and values reach the core only through a buffer written in place."""
    slots = torch.arange(q.size(2)) + 2
    m.keys.index_copy_(2, slots, k)
    m.values.index_copy_(2, slots, v)
    mask = torch.arange(m.keys.size(2))[None, :] <= slots[:, None]
    return F.scaled_dot_product_attention(q, m.keys, m.values, attn_mask=mask)


def core_windows(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within blocks of 4 tokens and their predecessor block."""
    b, n, s, h = q.shape

    def blocks(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, -s % 4)).view(b, n, -1, 4, h)

    def with_previous(t: Tensor) -> Tensor:
        t = blocks(t)
        return torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], dim=3)

    scores = blocks(q) @ with_previous(k).transpose(-1, -2) * h**-0.5
    return (scores.softmax(-1) @ with_previous(v)).view(b, n, -1, h)[:, :, :s]


def attention(core: Core, bias: bool = True, **parts: nn.Module | Tensor) -> nn.Module:
    """Separate q, k, v and o around a core of per-head tensors."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.o(merge(core(m, heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))))

    names = {name: linear(D, D, bias) for name in "qkvo"}
    return Net(run, **names, **parts)


def head_mixers() -> dict[str, nn.Module]:
    return {"mix_scores": linear(HEADS, HEADS, False), "mix_weights": linear(HEADS, HEADS, False)}


def static_cache() -> dict[str, Tensor]:
    return {name: torch.zeros(BATCH, HEADS, 12, HEAD) for name in ("keys", "values")}


CORES: dict[str, tuple[Core, Callable[[], Mapping[str, nn.Module | Tensor]]]] = {
    "sdpa": (core_sdpa, dict),
    "mask_add": (core_mask_add, dict),
    "where": (core_where, dict),
    "masked_fill": (core_masked_fill, dict),
    "einsum": (core_einsum, dict),
    "alibi_baddbmm": (core_alibi, dict),
    "softcap": (core_softcap, dict),
    "sinks": (core_sinks, lambda: {"sinks": matrix(HEADS)}),
    "layer_norm_qk": (core_norm, lambda: {n: nn.LayerNorm(HEAD) for n in ("q_norm", "k_norm")}),
    "rms_norm_qk": (core_norm, lambda: {n: RMSNorm(HEAD) for n in ("q_norm", "k_norm")}),
    "rope": (core_rope, dict),
    "rope_complex": (core_rope_complex, dict),
    "position_bias": (core_position_bias, lambda: {"position": nn.Embedding(9, HEADS)}),
    "cache_cat": (core_cache_cat, lambda: {"past": torch.randn(1, HEADS, 3, HEAD)}),
    "cache_index_copy": (core_cache_static, static_cache),
    "sliding_windows": (core_windows, dict),
}


# Attention: how the projections are laid out


def qkv_chunk(t: Tensor) -> tuple[Tensor, ...]:
    return tuple(heads(part) for part in t.chunk(3, dim=-1))


def qkv_view_unbind(t: Tensor) -> tuple[Tensor, ...]:
    """timm's: view, permute, unbind."""
    return t.reshape(*t.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)


def qkv_per_head(t: Tensor) -> tuple[Tensor, ...]:
    """GPT-NeoX's: the three parts of each head lie together."""
    return t.view(*t.shape[:2], HEADS, 3 * HEAD).transpose(1, 2).chunk(3, dim=-1)


def qkv_slices(t: Tensor) -> tuple[Tensor, ...]:
    return heads(t[..., :D]), heads(t[..., D : 2 * D]), heads(t[..., 2 * D :])


def qkv_multi_query(t: Tensor) -> tuple[Tensor, ...]:
    """Falcon's and BigCode's: all heads of q, then one head each of k and v."""
    q, k, v = t.split([D, HEAD, HEAD], dim=-1)
    q, k, v = heads(q), heads(k, 1), heads(v, 1)
    return q, k.expand_as(q), v.expand_as(q)


def fused_attention(split: Callable[[Tensor], tuple[Tensor, ...]], width: int = 3 * D) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m.qkv(x))
        return m.o(merge(F.scaled_dot_product_attention(q, k, v)))

    return Net(run, qkv=linear(D, width), o=linear(D, D))


def conv1d_attention() -> nn.Module:
    """GPT-2's attention: fused Conv1D weights of [in, out]."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).split(D, dim=2)
        return m.o(merge(core_mask_add(m, heads(q), heads(k), heads(v))))

    return Net(run, qkv=Product(addmm_rows, (D, 3 * D), 3 * D), o=Product(addmm_rows, (D, D), D))


def cross_attention() -> nn.Module:
    """Separate q from the stream, fused k and v from a memory of another width."""

    def run(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        k, v = m.kv(memory).view(*memory.shape[:2], 2, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        return m.o(merge(F.scaled_dot_product_attention(heads(m.q(x)), k, v)))

    return Net(run, q=linear(D, D), kv=linear(48, 2 * D), o=linear(D, D))


def grouped(how: str) -> nn.Module:
    """Grouped queries: two heads of keys and values serve four of queries."""

    def spread(t: Tensor) -> Tensor:
        if how == "repeat":
            return t.repeat_interleave(2, dim=1)
        if how == "expand":
            b, n, s, h = t.shape
            return t[:, :, None].expand(b, n, 2, s, h).reshape(b, 2 * n, s, h)
        return t

    def run(m: Any, x: Tensor) -> Tensor:
        k, v = spread(heads(m.k(x), 2)), spread(heads(m.v(x), 2))
        native = how == "native"
        return m.o(merge(F.scaled_dot_product_attention(heads(m.q(x)), k, v, enable_gqa=native)))

    return Net(
        run,
        q=linear(D, D, False),
        k=linear(D, D // 2, False),
        v=linear(D, D // 2, False),
        o=linear(D, D, False),
    )


def output_gate() -> nn.Module:
    """A sigmoid gate, linear in the input, on the attention's value before o."""

    def run(m: Any, x: Tensor) -> Tensor:
        value = merge(core_sdpa(m, heads(m.q(x)), heads(m.k(x)), heads(m.v(x))))
        return m.o(value * torch.sigmoid(m.gate(x)))

    return Net(run, **{name: linear(D, D) for name in "qkvo"}, gate=linear(D, D))


def latent_attention() -> nn.Module:
    """DeepSeek's MLA; keys and queries are assembled by writes into slices of empty tensors."""
    rope, latent = 4, 16

    def run(m: Any, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = heads(m.q_b(m.q_norm(m.q_a(x))))
        compressed, k_rope = m.kv_a(x).split([latent, rope], dim=-1)
        k_part, v = heads(m.kv_b(m.kv_norm(compressed))).split([HEAD, HEAD], dim=-1)
        k = k_part.new_empty(b, HEADS, s, HEAD + rope)
        k[..., :HEAD] = k_part
        k[..., HEAD:] = k_rope[:, None]
        scores = q @ k.transpose(2, 3) * (HEAD + rope) ** -0.5
        return m.o(merge(attend(scores, v)))

    return Net(
        run,
        q_a=linear(D, 24, False),
        q_norm=RMSNorm(24),
        q_b=linear(24, HEADS * (HEAD + rope), False),
        kv_a=linear(D, latent + rope, False),
        kv_norm=RMSNorm(latent),
        kv_b=linear(latent, HEADS * 2 * HEAD, False),
        o=linear(D, D, False),
    )


def pooling() -> nn.Module:
    """Attention pooling: the queries are a parameter, so there is no q projection."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = heads(m.queries.expand(x.size(0), -1, -1))
        return m.o(merge(F.scaled_dot_product_attention(q, heads(m.k(x)), heads(m.v(x)))))

    return Net(run, queries=matrix(1, 3, D), k=linear(D, D), v=linear(D, D), o=linear(D, D))


class Lora(nn.Module):
    """A linear map with a low-rank correction, as peft wraps it."""

    def __init__(self, n_in: int, n_out: int, rank: int = 4) -> None:
        super().__init__()
        self.base = linear(n_in, n_out)
        self.a = linear(n_in, rank, False)
        self.b = linear(rank, n_out, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 2.0


def lora_attention() -> nn.Module:
    run = attention(core_sdpa).run
    return Net(run, q=Lora(D, D), k=linear(D, D), v=Lora(D, D), o=linear(D, D))


def lora_mlp() -> nn.Module:
    return Net(lambda m, x: m.down(F.gelu(m.up(x))), up=Lora(D, H), down=Lora(H, D))


def head_weights() -> nn.Module:
    """XLNet's spelling: 3-D weights [d, n, h] and einsum throughout."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsd,dnh->bsnh", x, w) for w in (m.q, m.k, m.v))
        weights = torch.einsum("bqnh,bknh->bnqk", q, k).mul(HEAD**-0.5).softmax(-1)
        value = torch.einsum("bnqk,bknh->bqnh", weights, v)
        return torch.einsum("bsnh,dnh->bsd", value, m.o)

    return Net(run, **{name: matrix(D, HEADS, HEAD) for name in "qkvo"})


def time_first() -> nn.Module:
    """[S, B, D] rows with heads folded into the batch, as in fairseq."""

    def run(m: Any, x: Tensor) -> Tensor:
        s, b, _ = x.shape
        q, k, v = (p(x).view(s, b * HEADS, HEAD).transpose(0, 1) for p in (m.q, m.k, m.v))
        weights = torch.bmm(q * HEAD**-0.5, k.transpose(1, 2)).softmax(dim=-1)
        return m.o(torch.bmm(weights, v).transpose(0, 1).reshape(s, b, D))

    return Net(run, **{name: linear(D, D) for name in "qkvo"})


def attention_forms() -> list[Case]:
    made = [
        form(
            f"attention_{name}",
            lambda how=how: attention(how[0], **how[1]()),
            projections=QKVO,
        )
        for name, how in CORES.items()
    ]
    splits = {
        "chunk": qkv_chunk,
        "view_unbind": qkv_view_unbind,
        "per_head": qkv_per_head,
        "slices": qkv_slices,
    }
    made += [
        form(f"qkv_{name}", lambda split=split: fused_attention(split), projections=QKV_O)
        for name, split in splits.items()
    ]
    made += [
        form(f"gqa_{how}", lambda how=how: grouped(how), projections=QKVO)
        for how in ("native", "expand", "repeat")
    ]
    return [
        *made,
        form(
            "qkv_multi_query",
            lambda: fused_attention(qkv_multi_query, D + 2 * HEAD),
            projections=QKV_O,
        ),
        form("qkv_conv1d", conv1d_attention, projections=QKV_O),
        form(
            "attention_cross_kv",
            cross_attention,
            projections={"q.weight": "q", "kv.weight": "kv", "o.weight": "o"},
            call=lambda: (torch.randn(BATCH, TOKENS, D), torch.randn(BATCH, 5, 48)),
        ),
        form(
            "attention_talking_heads",
            lambda: attention(core_talking, **head_mixers()),
            projections=QKVO,
            optional=("mix_scores.weight", "mix_weights.weight"),
        ),
        form("attention_output_gate", output_gate, projections=QKVO, optional=("gate.weight",)),
        form(
            "attention_latent",
            latent_attention,
            projections={"q_b.weight": "q", "kv_b.weight": "kv", "o.weight": "o"},
            optional=("q_a.weight", "kv_a.weight"),
            note="kv_a also holds the rotary part of the keys, so it may be called a projection",
        ),
        make_case(
            "form/attention_pooling",
            pooling,
            rows(),
            projections={"k.weight": "k", "v.weight": "v", "o.weight": "o"},
        ),
        form(
            "attention_lora",
            lora_attention,
            projections={
                "q.base.weight": "q",
                "k.weight": "k",
                "v.base.weight": "v",
                "o.weight": "o",
            },
            optional=("q.a.weight", "q.b.weight", "v.a.weight", "v.b.weight"),
        ),
        form(
            "mlp_lora",
            lora_mlp,
            optional=(
                *("up.base.weight", "down.base.weight"),  # an FFN once the adapters are merged
                *("up.a.weight", "up.b.weight", "down.a.weight", "down.b.weight"),
            ),
        ),
        form(
            "attention_head_weights",
            head_weights,
            projections={"q": "q", "k": "k", "v": "v", "o": "o"},
        ),
        form("attention_time_first", time_first, projections=QKVO),
    ]


# Blocks with attention and a feed-forward part, and whole small models


def parallel() -> nn.Module:
    """GPT-J's layer: attention and FFN read the same normed value and are summed."""
    return Net(lambda m, x: m.attention(x) + m.ffn(x), attention=attention(core_rope), ffn=Mlp())


def shared_input() -> nn.Module:
    """PaLM's layer: one matrix makes q, k, v and the FFN's hidden value, another ends both."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v, t = m.wide(x).split([D, D, D, H], dim=-1)
        value = merge(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))
        return m.last(torch.cat([value, F.gelu(t)], dim=-1))

    return Net(run, wide=linear(D, 3 * D + H), last=linear(D + H, D))


class Layer(nn.Module):
    """A transformer layer of a given attention and FFN, with its norms before or after."""

    def __init__(
        self,
        attend_with: Factory,
        ffn: Factory,
        norm: Factory = lambda: nn.LayerNorm(D),
        post_norm: bool = False,
        cross: Factory | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.ffn = attend_with(), ffn()
        self.cross = cross() if cross else None
        self.norms = nn.ModuleList(norm() for _ in range(3 if cross else 2))
        self.post_norm = post_norm

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if self.post_norm:
            x = self.norms[0](x + self.attention(x))
            return self.norms[1](x + self.ffn(x))
        x = x + self.attention(self.norms[0](x))
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), memory)
        return x + self.ffn(self.norms[1](x))


def layers(**options: Any) -> nn.ModuleList:
    return nn.ModuleList(Layer(**options) for _ in range(2))


def run_layers(stack: nn.ModuleList, x: Tensor, *others: Tensor) -> Tensor:
    for layer in stack:
        x = layer(x, *others)
    return x


def bert_like() -> nn.Module:
    """Post-norm encoder with embeddings, a pooler and a classifier."""

    def run(m: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = m.norm(m.words(ids) + m.places(torch.arange(ids.size(1))))
        x = run_layers(m.layers, x)
        return x, m.classifier(torch.tanh(m.pooler(x[:, 0])))

    return Net(
        run,
        words=nn.Embedding(50, D),
        places=nn.Embedding(16, D),
        norm=nn.LayerNorm(D),
        layers=layers(attend_with=lambda: attention(core_mask_add), ffn=Mlp, post_norm=True),
        pooler=linear(D, D),
        classifier=linear(D, 3),
    )


def gpt_like() -> nn.Module:
    """Pre-norm decoder of Conv1D weights, with a head tied to the embedding."""

    def run(m: Any, ids: Tensor) -> Tensor:
        x = m.words(ids) + m.places[: ids.size(1)]
        return F.linear(m.norm(run_layers(m.layers, x)), m.words.weight)

    return Net(
        run,
        words=nn.Embedding(50, D),
        places=matrix(16, D),
        layers=layers(
            attend_with=conv1d_attention,
            ffn=lambda: Net(
                lambda m, x: m.down(new_gelu(m.up(x))),
                up=Product(addmm_rows, (D, 4 * D), 4 * D),
                down=Product(addmm_rows, (4 * D, D), D),
            ),
        ),
        norm=nn.LayerNorm(D),
    )


def llama_like() -> nn.Module:
    """RMSNorm, RoPE without biases, SwiGLU, and a head over the last token only."""

    def run(m: Any, ids: Tensor) -> Tensor:
        x = run_layers(m.layers, m.words(ids))
        return m.head(m.norm(x)[:, -1:])

    return Net(
        run,
        words=nn.Embedding(50, D),
        layers=layers(
            attend_with=lambda: attention(core_rope, bias=False),
            ffn=lambda: gated(lambda g, u: F.silu(g) * u),
            norm=RMSNorm,
        ),
        norm=RMSNorm(),
        head=linear(D, 50, False),
    )


def vit_like() -> nn.Module:
    """Patches by a convolution, a class token, and a classifier."""

    def run(m: Any, image: Tensor) -> Tensor:
        x = m.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.size(0), -1, -1), x], dim=1) + m.places
        return m.classifier(m.norm(run_layers(m.layers, x))[:, 0])

    return Net(
        run,
        patches=nn.Conv2d(3, D, 4, stride=4),
        token=matrix(1, 1, D),
        places=matrix(1, 7, D),
        layers=layers(attend_with=lambda: fused_attention(qkv_view_unbind), ffn=Mlp),
        norm=nn.LayerNorm(D),
        classifier=linear(D, 10),
    )


def t5_like() -> nn.Module:
    """Encoder and decoder with RMSNorm, gated FFNs, and cross attention."""

    def attend_with() -> nn.Module:
        return attention(core_position_bias, bias=False, position=nn.Embedding(9, HEADS))

    def cross() -> nn.Module:
        def run(m: Any, x: Tensor, memory: Tensor) -> Tensor:
            scores = heads(m.q(x)) @ heads(m.k(memory)).transpose(3, 2)
            return m.o(merge(attend(scores, heads(m.v(memory)))))

        return Net(run, **{name: linear(D, D, False) for name in "qkvo"})

    def ffn() -> nn.Module:
        return gated(lambda g, u: F.gelu(g, approximate="tanh") * u)

    def run(m: Any, ids: Tensor, target: Tensor) -> Tensor:
        memory = m.norm(run_layers(m.encoder, m.words(ids)))
        return m.head(run_layers(m.decoder, m.words(target), memory) * D**-0.5)

    return Net(
        run,
        words=nn.Embedding(50, D),
        encoder=layers(attend_with=attend_with, ffn=ffn, norm=RMSNorm),
        norm=RMSNorm(),
        decoder=layers(attend_with=attend_with, ffn=ffn, norm=RMSNorm, cross=cross),
        head=linear(D, 50, False),
    )


def model_case(
    name: str,
    build: Factory,
    call: Call,
    block: Mapping[str, str],
    projections: Mapping[str, str],
    stacks: tuple[str, ...] = ("layers",),
    crossed: tuple[str, ...] = (),
    note: str = "",
) -> Case:
    """A case on a whole model whose `stacks` are lists of two `Layer`s."""
    owners = [f"{stack}.{i}" for stack in stacks for i in range(2)]
    attentions = [f"{owner}.attention" for owner in owners]
    attentions += [f"{stack}.{i}.cross" for stack in crossed for i in range(2)]
    return make_case(
        f"form/{name}",
        build,
        call,
        inside(block, *(f"{owner}.ffn" for owner in owners)),
        {f"{a}.{w}": role for a in attentions for w, role in projections.items()},
        note=note,
    )


def token_ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, 50, (BATCH, tokens))


def model_forms() -> list[Case]:
    attended = {f"attention.{w}": role for w, role in QKVO.items()}
    return [
        form("parallel", parallel, inside(MLP, "ffn"), attended),
        form(
            "parallel_one_matrix",
            shared_input,
            optional=("wide.weight", "last.weight"),
            note="each matrix holds an attention projection and half an FFN",
        ),
        model_case(
            "bert_like",
            bert_like,
            lambda: (token_ids(),),
            MLP,
            QKVO,
            note="pooler and classifier must not be reported",
        ),
        model_case("gpt_like", gpt_like, lambda: (token_ids(),), MLP, QKV_O),
        model_case("llama_like", llama_like, lambda: (token_ids(),), GLU, QKVO),
        model_case(
            "vit_like",
            vit_like,
            lambda: (torch.randn(BATCH, 3, 8, 12),),
            MLP,
            QKV_O,
        ),
        model_case(
            "t5_like",
            t5_like,
            lambda: (token_ids(5), token_ids()),
            GLU,
            QKVO,
            stacks=("encoder", "decoder"),
            crossed=("decoder",),
        ),
    ]


def cases() -> list[Case]:
    """All hand-written forms."""
    return [
        *spelling_forms(),
        *activation_forms(),
        *glu_forms(),
        *placement_forms(),
        *attention_forms(),
        *model_forms(),
    ]
