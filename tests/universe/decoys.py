"""Models which resemble a feed-forward block or attention and are neither.

Nothing in them may be reported but what their truth lists. Some decoys stand beside a real block,
so that a matcher cannot pass by declining a whole model; `optional` names the weights on which
one may honestly differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .case import Case
from .forms import (
    BATCH,
    MLP,
    TOKENS,
    Call,
    D,
    Factory,
    H,
    Mlp,
    Net,
    RMSNorm,
    gated,
    inside,
    linear,
    make_case,
    matrix,
    rows,
)

WORDS, CLASSES, EXPERTS = 50, 3, 4

Run = Callable[..., Any]


def decoy(
    name: str,
    run: Run,
    parts: Callable[[], Mapping[str, nn.Module | Tensor]],
    call: Call | None = None,
    blocks: tuple[Mapping[str, str], ...] = (),
    optional: tuple[str, ...] = (),
    note: str = "",
) -> Case:
    """A decoy as a `Net`; truth by full parameter names."""
    return make_case(
        f"decoy/{name}",
        lambda: Net(run, **parts()),
        call or rows(),
        blocks,
        optional=optional,
        note=note,
    )


def pair(n_in: int = D, hidden: int = H, n_out: int | None = None, **more: Any) -> Factory:
    """Parts "up" and "down" as linear maps, and whatever else is given by a factory each."""
    return lambda: {
        "up": linear(n_in, hidden),
        "down": linear(hidden, n_in if n_out is None else n_out),
        **{name: make() for name, make in more.items()},
    }


def chain(m: Any, x: Tensor) -> Tensor:
    """The plain FFN of a `pair`."""
    return m.down(F.gelu(m.up(x)))


def norm(width: int = D) -> Callable[[], nn.Module]:
    return lambda: nn.LayerNorm(width)


# Heads and other maps outside the layers of a transformer


def dense_tanh(m: Any, x: Tensor) -> Tensor:
    return m.classifier(torch.tanh(m.dense(x[:, 0])))


def pooler_behind_block(m: Any, x: Tensor) -> Tensor:
    return dense_tanh(m, x + m.ffn(m.norm(x)))


def mlm_head(m: Any, x: Tensor) -> Tensor:
    return m.decoder(m.norm(F.gelu(m.dense(x))))


def tied_mlm_head(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids)
    x = x + m.ffn(m.norm(x))
    return F.linear(m.head_norm(F.gelu(m.dense(x))), m.words.weight) + m.bias


def roberta_head(m: Any, x: Tensor) -> Tensor:
    t = F.dropout(x[:, 0, :], 0.1, m.training)
    return m.out_proj(F.dropout(torch.tanh(m.dense(t)), 0.1, m.training))


def blip_pooler(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    pooled = m.activation(m.pooler(m.norm(x)[:, 0]))
    return pooled, F.normalize(m.projection(pooled), dim=-1)


def tied_head(m: Any, ids: Tensor) -> Tensor:
    return m.norm(F.silu(m.words(ids))) @ m.words.weight.T


def mean_classifier(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x.mean(dim=1))))


def variational(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    t = F.relu(m.up(x))
    return m.mu(t), m.logvar(t)


def head_cases() -> list[Case]:
    def token_ids() -> tuple[Tensor]:
        return (torch.randint(0, WORDS, (BATCH, TOKENS)),)

    return [
        decoy(
            "pooler_classifier",
            dense_tanh,
            lambda: {"dense": linear(D, D), "classifier": linear(D, CLASSES)},
        ),
        decoy(
            "pooler_equal_widths",
            dense_tanh,
            lambda: {"dense": linear(D, D), "classifier": linear(D, D)},
            note="an FFN in shape, but of the first token only",
        ),
        decoy(
            "pooler_behind_block",
            pooler_behind_block,
            lambda: {
                "norm": nn.LayerNorm(D),
                "ffn": Mlp(),
                "dense": linear(D, D),
                "classifier": linear(D, CLASSES),
            },
            blocks=inside(MLP, "ffn"),
        ),
        decoy(
            "mlm_head",
            mlm_head,
            lambda: {"dense": linear(D, D), "norm": nn.LayerNorm(D), "decoder": linear(D, WORDS)},
        ),
        decoy(
            "mlm_head_tied",
            tied_mlm_head,
            lambda: {
                "words": nn.Embedding(WORDS, D),
                "norm": nn.LayerNorm(D),
                "ffn": Mlp(),
                "dense": linear(D, D),
                "head_norm": nn.LayerNorm(D),
                "bias": matrix(WORDS),
            },
            token_ids,
            blocks=inside(MLP, "ffn"),
        ),
        decoy(
            "roberta_head",
            roberta_head,
            lambda: {"dense": linear(D, D), "out_proj": linear(D, CLASSES)},
        ),
        decoy(
            "blip_pooler",
            blip_pooler,
            lambda: {
                "norm": nn.LayerNorm(D),
                "pooler": linear(D, D),
                "activation": nn.Tanh(),
                "projection": linear(D, D, False),
            },
            note="the pooled value is also an output",
        ),
        decoy(
            "lm_head",
            lambda m, x: m.head(m.norm(x)),
            lambda: {"norm": nn.LayerNorm(D), "head": linear(D, WORDS, False)},
        ),
        decoy(
            "tied_head",
            tied_head,
            lambda: {"words": nn.Embedding(WORDS, D), "norm": nn.LayerNorm(D)},
            token_ids,
        ),
        decoy("mlp_classifier", mean_classifier, pair(n_out=CLASSES)),
        decoy(
            "variational_heads",
            variational,
            lambda: {"up": linear(D, H), "mu": linear(H, 8), "logvar": linear(H, 8)},
        ),
    ]


# Low rank, adapters, squeeze and excite


def houlsby(m: Any, x: Tensor) -> Tensor:
    return x + m.up(F.gelu(m.down(x)))


def squeeze(m: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(m.down(F.relu(m.up(x.mean(dim=1, keepdim=True)))))


def squeeze_conv(m: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(m.down(F.relu(m.up(x.mean(dim=(2, 3), keepdim=True)))))


def low_rank_cases() -> list[Case]:
    def image() -> tuple[Tensor]:
        return (torch.randn(BATCH, D, 4, 5),)

    ends = ("up.weight", "down.weight")
    return [
        decoy("low_rank", lambda m, x: x + m.down(m.up(x)), pair(hidden=8)),
        decoy(
            "linear_linear_wide",
            lambda m, x: x + m.down(m.drop(m.up(x)) * 0.5),
            pair(drop=lambda: nn.Dropout(0.1)),
            note="as wide as an FFN, but nothing nonlinear lies between",
        ),
        decoy(
            "linear_norm_linear",
            lambda m, x: m.down(m.norm(m.up(x))),
            pair(hidden=24, norm=lambda: RMSNorm(24)),
        ),
        decoy(
            "linear_layer_norm_linear",
            lambda m, x: x + m.down(m.norm(m.up(x))),
            pair(norm=norm(H)),
        ),
        decoy(
            "lora_only",
            lambda m, x: m.base(x) + m.down(m.up(x)) * 2.0,
            pair(hidden=4, base=lambda: linear(D, D)),
        ),
        decoy(
            "houlsby_adapter",
            houlsby,
            lambda: {"down": linear(D, 8), "up": linear(8, D)},
            optional=ends,
        ),
        decoy("squeeze_excite", squeeze, pair(hidden=8), optional=ends),
        decoy(
            "squeeze_excite_conv",
            squeeze_conv,
            lambda: {"up": nn.Conv2d(D, 8, 1), "down": nn.Conv2d(8, D, 1)},
            image,
            optional=ends,
        ),
    ]


# Token mixing


def channels_first(m: Any, x: Tensor) -> Tensor:
    return x + chain(m, x.transpose(1, 2)).transpose(1, 2)


def depthwise_between(m: Any, x: Tensor) -> Tensor:
    return x + m.down(F.gelu(m.conv(m.up(x).transpose(1, 2)).transpose(1, 2)))


def conv_glu(m: Any, x: Tensor) -> Tensor:
    """A Conformer's convolution module."""
    t = F.glu(m.first(x.transpose(1, 2)), dim=1)
    return x + m.last(F.silu(m.batch_norm(m.conv(t)))).transpose(1, 2)


def mamba(m: Any, x: Tensor) -> Tensor:
    """A gated mixer with a causal convolution and a running sum in place of the scan."""
    t, z = m.in_proj(x).chunk(2, dim=-1)
    t = F.silu(m.conv(t.transpose(1, 2))[..., : x.size(1)]).transpose(1, 2)
    step = F.softplus(m.step(t))
    state = torch.cumsum(step * t, dim=1) + t * m.skip
    return x + m.out_proj(state * F.silu(z))


def mixer(m: Any, x: Tensor) -> Tensor:
    x = x + m.tokens(m.norm_1(x).transpose(1, 2)).transpose(1, 2)
    return x + m.channels(m.norm_2(x))


def fnet(m: Any, x: Tensor) -> Tensor:
    x = m.norm_1(x + torch.fft.fft2(x.float(), dim=(-2, -1)).real)
    return m.norm_2(x + m.ffn(x))


def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x)
    value = q @ (k.transpose(1, 2) @ v) / (q @ k.sum(dim=1).unsqueeze(-1))
    return x + m.o(value)


def shifted_in_place(m: Any, x: Tensor) -> Tensor:
    t = F.gelu(m.up(x))
    t[:, 1:, : H // 4] = t[:, :-1, : H // 4].clone()
    return x + m.down(t)


def summed_in_place(m: Any, x: Tensor) -> Tensor:
    t = m.up(x)
    t.add_(t.mean(dim=1, keepdim=True))
    return x + m.down(F.relu(t))


def mixing_cases() -> list[Case]:
    def mixer_parts() -> dict[str, nn.Module]:
        tokens = Net(chain, up=linear(TOKENS, 16), down=linear(16, TOKENS))
        norms = {name: nn.LayerNorm(D) for name in ("norm_1", "norm_2")}
        return {"tokens": tokens, "channels": Mlp(), **norms}

    return [
        decoy(
            "conv_kernel_3",
            channels_first,
            lambda: {
                "up": nn.Conv1d(D, H, 3, padding=1),
                "down": nn.Conv1d(H, D, 3, padding=1),
            },
        ),
        decoy(
            "conv_strided",
            lambda m, x: chain(m, x),
            lambda: {"up": nn.Conv2d(D, H, 1, stride=2), "down": nn.Conv2d(H, D, 1)},
            lambda: (torch.randn(BATCH, D, 4, 6),),
            note="the first convolution drops three tokens of four",
        ),
        decoy(
            "conv_grouped",
            lambda m, x: x + chain(m, x),
            lambda: {"up": nn.Conv2d(D, H, 1, groups=4), "down": nn.Conv2d(H, D, 1, groups=4)},
            lambda: (torch.randn(BATCH, D, 3, 4),),
            note="the matrices are block diagonal: not dense maps of the features",
        ),
        decoy(
            "depthwise_between",
            depthwise_between,
            pair(conv=lambda: nn.Conv1d(H, H, 3, padding=1, groups=H)),
            optional=("up.weight", "down.weight"),
            note="an FFN of vision transformers, but not token-wise",
        ),
        decoy(
            "conv_glu_module",
            conv_glu,
            lambda: {
                "first": nn.Conv1d(D, 2 * D, 1),
                "conv": nn.Conv1d(D, D, 3, padding=1, groups=D),
                "batch_norm": nn.BatchNorm1d(D),
                "last": nn.Conv1d(D, D, 1),
            },
        ),
        decoy(
            "mamba_mixer",
            mamba,
            lambda: {
                "in_proj": linear(D, 2 * H, False),
                "conv": nn.Conv1d(H, H, 4, padding=3, groups=H),
                "step": linear(H, H),
                "skip": nn.Parameter(torch.ones(H)),
                "out_proj": linear(H, D, False),
            },
        ),
        decoy(
            "mlp_mixer",
            mixer,
            mixer_parts,
            blocks=inside(MLP, "channels"),
            optional=("tokens.up.weight", "tokens.down.weight"),
            note="the token MLP has an FFN's shape along the token axis",
        ),
        decoy(
            "fnet",
            fnet,
            lambda: {"norm_1": nn.LayerNorm(D), "norm_2": nn.LayerNorm(D), "ffn": Mlp()},
            blocks=inside(MLP, "ffn"),
        ),
        decoy(
            "linear_attention",
            linear_attention,
            lambda: {name: linear(D, D) for name in "qkvo"},
            optional=tuple(f"{name}.weight" for name in "qkvo"),
            note="attention without a softmax",
        ),
        decoy("shifted_in_place", shifted_in_place, pair()),
        decoy("summed_in_place", summed_in_place, pair()),
        decoy(
            "softmax_between",
            lambda m, x: x + m.down(torch.softmax(m.up(x), dim=-1)),
            pair(),
            note="external attention: the softmax runs over hidden units, with no keys from x",
        ),
        decoy(
            "softmax_over_tokens",
            lambda m, x: x + m.down(torch.softmax(m.up(x), dim=1)),
            pair(),
        ),
    ]


# Inputs that are not activations, weights that are not parameters


def position_bias(m: Any, x: Tensor) -> Tensor:
    """SwinV2's continuous position bias, added to scores of x with itself."""
    bias = 16 * torch.sigmoid(m.down(F.relu(m.up(m.table)))).permute(2, 0, 1)
    scores = (x @ x.transpose(1, 2)).unsqueeze(1) / math.sqrt(D) + bias
    return scores.softmax(dim=-1).mean(dim=1) @ x


def hyper(m: Any, x: Tensor, z: Tensor) -> Tensor:
    first, second = m.make_up(z).view(H, D), m.make_down(z).view(D, H)
    return x + F.linear(F.gelu(F.linear(x, first)), second)


def quantised(m: Any, x: Tensor) -> Tensor:
    first = m.up.to(x.dtype) * m.up_scale
    second = m.down.to(x.dtype) * m.down_scale
    return x + F.linear(F.gelu(F.linear(x, first)), second) * m.gamma


def modulus_relu(m: Any, x: Tensor) -> Tensor:
    t = F.linear(torch.complex(x, torch.zeros_like(x)), m.up)
    t = torch.complex(F.relu(t.real), F.relu(t.imag))
    return x + F.linear(t, m.down).real


def norm_pair() -> dict[str, nn.Module]:
    return {"up": weight_norm(linear(D, H)), "down": weight_norm(linear(H, D))}


class Masked(nn.Module):
    """A parametrization which prunes a weight by a fixed mask."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand(shape) > 0.5).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def pruned(n_in: int, n_out: int) -> nn.Module:
    layer = linear(n_in, n_out)
    nn.utils.parametrize.register_parametrization(layer, "weight", Masked(n_out, n_in))
    return layer


def operand_cases() -> list[Case]:
    ends = ("up", "down")
    return [
        decoy(
            "position_table",
            position_bias,
            pair(
                n_in=2,
                n_out=4,
                table=lambda: torch.linspace(-1, 1, TOKENS * TOKENS * 2).view(TOKENS, TOKENS, 2),
            ),
            note="an MLP of a constant table",
        ),
        decoy(
            "position_table_wide",
            lambda m, x: x + chain(m, m.table),
            pair(table=lambda: torch.randn(TOKENS, D)),
            note="an FFN in shape, but its rows are positions, the same for every input",
        ),
        decoy(
            "hypernetwork",
            hyper,
            lambda: {"make_up": linear(8, H * D), "make_down": linear(8, D * H)},
            lambda: (torch.randn(BATCH, TOKENS, D), torch.randn(8)),
        ),
        decoy(
            "weight_norm",
            lambda m, x: x + chain(m, x),
            norm_pair,
            optional=tuple(f"{end}.parametrizations.weight.original1" for end in ends),
            note="an FFN whose matrices are computed from the parameters",
        ),
        decoy(
            "pruned_weights",
            lambda m, x: x + chain(m, x),
            lambda: {"up": pruned(D, H), "down": pruned(H, D)},
            optional=tuple(f"{end}.parametrizations.weight.original" for end in ends),
            note="an FFN whose matrices are computed from the parameters",
        ),
        decoy(
            "quantised",
            quantised,
            lambda: {
                "up": torch.randint(-127, 128, (H, D), dtype=torch.int8),
                "up_scale": torch.full((H, 1), 1e-3),
                "down": torch.randint(-127, 128, (D, H), dtype=torch.int8),
                "down_scale": torch.full((D, 1), 1e-3),
                "gamma": nn.Parameter(torch.ones(D)),
            },
            note="the weights are buffers of int8",
        ),
        decoy(
            "complex_weights",
            modulus_relu,
            lambda: {
                "up": nn.Parameter(torch.randn(H, D, dtype=torch.complex64) * 0.2),
                "down": nn.Parameter(torch.randn(D, H, dtype=torch.complex64) * 0.2),
            },
        ),
    ]


# Experts


def routed(m: Any, x: Tensor) -> Tensor:
    """Each expert takes the tokens which score highest with it."""
    flat = x.reshape(-1, D)
    scores = m.router(flat).softmax(dim=-1)
    out = torch.zeros_like(flat)
    for number, expert in enumerate(m.experts):
        weight, chosen = scores[:, number].topk(5)
        out = out.index_add(0, chosen, expert(flat[chosen]) * weight[:, None])
    return x + out.view_as(x)


def routed_and_shared(m: Any, x: Tensor) -> Tensor:
    return routed(m, x) + m.shared(x)


def batched_experts(m: Any, x: Tensor) -> Tensor:
    """Llama-4's experts: all of them run on all tokens, by rank-3 weights."""
    flat = x.reshape(-1, D)
    weights = torch.sigmoid(m.router(flat)).T.unsqueeze(-1)
    spread = flat.expand(EXPERTS, -1, -1) * weights
    gate, up = torch.bmm(spread, m.gate_up).chunk(2, dim=-1)
    out = torch.bmm(up * F.silu(gate), m.down).sum(dim=0)
    return x + out.view_as(x)


def soft_experts(m: Any, x: Tensor) -> Tensor:
    """Every expert runs on every token; their values are mixed by the router."""
    weights = m.router(x).softmax(dim=-1)
    t = F.gelu(torch.einsum("bsd,edf->bsef", x, m.up))
    return x + torch.einsum("bsef,efd,bse->bsd", t, m.down, weights)


def expert_cases() -> list[Case]:
    def experts() -> dict[str, nn.Module]:
        return {
            "router": linear(D, EXPERTS, False),
            "experts": nn.ModuleList(Mlp() for _ in range(EXPERTS)),
        }

    def shared() -> dict[str, nn.Module]:
        return {**experts(), "shared": gated(lambda g, u: F.silu(g) * u)}

    return [
        decoy("routed_experts", routed, experts),
        decoy(
            "routed_and_shared_experts",
            routed_and_shared,
            shared,
            optional=tuple(f"shared.{part}.weight" for part in ("up", "gate", "down")),
        ),
        decoy(
            "batched_experts",
            batched_experts,
            lambda: {
                "router": linear(D, EXPERTS, False),
                "gate_up": matrix(EXPERTS, D, 2 * H),
                "down": matrix(EXPERTS, H, D),
            },
        ),
        decoy(
            "soft_experts",
            soft_experts,
            lambda: {
                "router": linear(D, EXPERTS),
                "up": matrix(EXPERTS, D, H),
                "down": matrix(EXPERTS, H, D),
            },
        ),
    ]


# Values and weights with a second use


def returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    t = F.gelu(m.up(x))
    return x + m.down(t), t


def probed(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    t = m.up(x)
    return x + m.down(F.relu(t)), m.probe(t)


def swapped_roles(m: Any, x: Tensor) -> Tensor:
    x = x + m.second(F.gelu(m.first(m.norm(x))))
    return x + m.first(F.gelu(m.second(m.norm(x))))


def two_downs(m: Any, x: Tensor) -> Tensor:
    y = m.down(F.gelu(m.up(x)))
    return y + m.other(F.relu(m.up(x)))


def also_a_skip(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return x + chain(m, m.norm(x)), m.up(x).sum(dim=-1)


def three_maps(m: Any, x: Tensor) -> Tensor:
    return x + m.third(F.gelu(m.second(F.gelu(m.first(x)))))


def second_use_cases() -> list[Case]:
    return [
        decoy("hidden_returned", returned, pair(), note="the hidden value is also an output"),
        decoy("hidden_probed", probed, pair(probe=lambda: linear(H, CLASSES))),
        decoy(
            "swapped_roles",
            swapped_roles,
            lambda: {"norm": nn.LayerNorm(D), "first": linear(D, D), "second": linear(D, D)},
            note="each matrix is up of one call and down of the other",
        ),
        decoy(
            "up_also_elsewhere",
            also_a_skip,
            pair(norm=norm()),
            optional=("up.weight", "down.weight"),
            note="the first call is an FFN; the second uses up by itself",
        ),
        decoy("two_downs", two_downs, pair(other=lambda: linear(H, D))),
        decoy(
            "three_maps",
            three_maps,
            lambda: {"first": linear(D, H), "second": linear(H, H), "third": linear(H, D)},
            optional=("first.weight", "second.weight", "third.weight"),
            note="two overlapping pairs: not both may be reported",
        ),
    ]


# Gates and norms


def per_layer_input(m: Any, x: Tensor, extra: Tensor) -> Tensor:
    """Gemma's per-layer input: the gate meets a value that is not a linear map of x."""
    return x + m.norm(m.project(F.gelu(m.gate(x)) * extra))


def recurrent_gate(m: Any, x: Tensor) -> Tensor:
    """Griffin's recurrent block: one branch goes through a convolution and a recurrence."""
    y = F.gelu(m.linear_y(x))
    t = m.conv(m.linear_x(x).transpose(1, 2))[..., : x.size(1)].transpose(1, 2)
    decay = torch.sigmoid(m.recurrence(t))
    return x + m.linear_out(torch.cumsum(decay * t, dim=1) * y)


def highway(m: Any, x: Tensor) -> Tensor:
    carry = torch.sigmoid(m.carry(x))
    return carry * F.relu(m.transform(x)) + (1 - carry) * x


def highway_linear(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.sigmoid(m.carry(x)) * x)


def gru_gate(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """A GRU-style gate in place of the residual sum, as in GTrXL."""
    r = torch.sigmoid(m.reset_x(x) + m.reset_y(y))
    z = torch.sigmoid(m.update_x(x) + m.update_y(y))
    return (1 - z) * x + z * torch.tanh(m.new_y(y) + m.new_x(r * x))


def gated_unit(m: Any, x: Tensor) -> Tensor:
    return m.norm(x + torch.sigmoid(m.gate(x)) * m.value(x))


def gated_residual_network(m: Any, x: Tensor) -> Tensor:
    """The GRN of temporal fusion transformers: linear, ELU, linear, then a gated unit."""
    t = m.down(F.elu(m.up(x)))
    return m.norm(x + torch.sigmoid(m.gate(t)) * m.value(t))


def cross_stitched(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + m.down(F.silu(m.gate(y)) * m.up(x))


def two_inputs(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Bahdanau's additive form: two streams are summed before the nonlinearity."""
    return x + m.down(torch.tanh(m.up(x) + m.other(y)))


def batch_norm_between(m: Any, x: Tensor) -> Tensor:
    return x + m.down(F.relu(m.norm(m.up(x))))


def gate_cases() -> list[Case]:
    def two_streams() -> tuple[Tensor, Tensor]:
        return torch.randn(BATCH, TOKENS, D), torch.randn(BATCH, TOKENS, D)

    def linears(*names: str, **more: Any) -> Factory:
        return lambda: {
            **{name: linear(D, D) for name in names},
            **{name: make() for name, make in more.items()},
        }

    return [
        decoy(
            "per_layer_input",
            per_layer_input,
            lambda: {"gate": linear(D, 16), "project": linear(16, D), "norm": RMSNorm()},
            lambda: (torch.randn(BATCH, TOKENS, D), torch.randn(BATCH, TOKENS, 16)),
        ),
        decoy(
            "recurrent_gate",
            recurrent_gate,
            linears(
                "linear_x",
                "linear_y",
                "recurrence",
                "linear_out",
                conv=lambda: nn.Conv1d(D, D, 4, padding=3, groups=D),
            ),
        ),
        decoy("highway", highway, linears("carry", "transform")),
        decoy("highway_linear", highway_linear, linears("carry", "out")),
        decoy(
            "gru_gate",
            gru_gate,
            linears("reset_x", "reset_y", "update_x", "update_y", "new_x", "new_y"),
            two_streams,
        ),
        decoy("gated_unit", gated_unit, linears("gate", "value", norm=norm())),
        decoy(
            "gated_residual_network",
            gated_residual_network,
            pair(gate=lambda: linear(D, D), value=lambda: linear(D, D), norm=norm()),
            optional=("up.weight", "down.weight"),
            note="linear, ELU, linear stands inside, with a gate behind it",
        ),
        decoy(
            "cross_stitched",
            cross_stitched,
            pair(gate=lambda: linear(D, H)),
            two_streams,
            note="up and gate read different values",
        ),
        decoy("two_inputs", two_inputs, pair(other=lambda: linear(D, H)), two_streams),
        decoy(
            "batch_norm_between",
            batch_norm_between,
            lambda: {
                "up": Net(
                    lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2),
                    conv=nn.Conv1d(D, H, 1),
                ),
                "norm": Net(
                    lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(H)
                ),
                "down": linear(H, D),
            },
            optional=("up.conv.weight", "down.weight"),
            note="an affine map of each hidden unit in eval mode, but not in training",
        ),
        decoy(
            "layer_norm_hidden",
            lambda m, x: x + m.down(F.relu(m.norm(m.up(x)))),
            pair(norm=norm(H)),
            optional=("up.weight", "down.weight"),
        ),
    ]


def cases() -> list[Case]:
    """All decoys."""
    return [
        *head_cases(),
        *low_rank_cases(),
        *mixing_cases(),
        *operand_cases(),
        *expert_cases(),
        *second_use_cases(),
        *gate_cases(),
    ]
