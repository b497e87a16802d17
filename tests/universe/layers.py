"""Layers of torch.nn: transformer encoders and decoders, and MultiheadAttention by itself.

The truth is read off the module types: torch.nn fixes the parameter names, so every
MultiheadAttention and every transformer layer says by itself which weight plays which role.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case, Truth

WIDTH, HIDDEN, HEADS = 32, 64, 4
BATCH, TOKENS, MEMORY = 2, 7, 5

Call = dict[str, Any]


class SelfAttention(nn.Module):
    """MultiheadAttention with query, key and value from one stream, inside a pre-norm residual."""

    def __init__(self, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        h = self.norm(x)
        out, weights = self.attention(h, h, h, attn_mask=mask, need_weights=self.need_weights)
        return (x + out, weights) if self.need_weights else x + out


class CrossAttention(nn.Module):
    """MultiheadAttention which reads its keys and values from other streams than its queries."""

    def __init__(self, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, _ = self.attention(x, key, value, need_weights=self.need_weights)
        return x + out


def module_truth(model: nn.Module) -> Truth:
    """The roles that torch.nn's own module types give to their parameters."""
    blocks: list[dict[str, str]] = []
    projections: dict[str, str] = {}
    roles = {
        "in_proj_weight": "qkv",
        "q_proj_weight": "q",
        "k_proj_weight": "k",
        "v_proj_weight": "v",
    }
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            for parameter, role in roles.items():
                if getattr(module, parameter) is not None:
                    projections[prefix + parameter] = role
            projections[f"{prefix}out_proj.weight"] = "o"
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            blocks.append({"up": f"{prefix}linear1.weight", "down": f"{prefix}linear2.weight"})
    return Truth(tuple(blocks), projections)


def case(name: str, build: Callable[[], nn.Module], call: Callable[[], Call]) -> Case:
    """A case of this file: the model and its call are made from one seed."""

    def make() -> tuple[nn.Module, Call]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().eval(), call()

    return Case(f"nn/{name}", make, module_truth)


def stream(tokens: int = TOKENS, width: int = WIDTH, batch_first: bool = True) -> Tensor:
    return torch.randn((BATCH, tokens, width) if batch_first else (tokens, BATCH, width))


def causal(tokens: int = TOKENS) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(tokens)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **{"batch_first": True, **options})


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, **{"batch_first": True, **options})


def encoder_cases() -> list[Case]:
    """Encoder layers alone and stacked, over the options which change the traced graph."""
    variants: dict[str, dict[str, Any]] = {
        "encoder_layer": {},
        "encoder_layer_gelu_prenorm": {"activation": "gelu", "norm_first": True},
        "encoder_layer_no_bias": {"bias": False},
        "encoder_layer_time_first": {"batch_first": False, "activation": "gelu"},
        "encoder_layer_silu": {"activation": nn.functional.silu},
    }

    def layer(name: str, options: dict[str, Any]) -> Case:
        batch_first = options.get("batch_first", True)
        return case(
            name, lambda: encoder_layer(**options), lambda: {"src": stream(batch_first=batch_first)}
        )

    made = [layer(name, options) for name, options in variants.items()]
    made.append(
        case("encoder_layer_mask", encoder_layer, lambda: {"src": stream(), "src_mask": causal()})
    )
    made.append(
        case(
            "encoder",
            lambda: nn.TransformerEncoder(encoder_layer(), 2),
            lambda: {"src": stream()},
        )
    )
    made.append(
        case(
            "encoder_prenorm_mask",
            lambda: nn.TransformerEncoder(
                encoder_layer(norm_first=True, activation="gelu"),
                2,
                norm=nn.LayerNorm(WIDTH),
                enable_nested_tensor=False,
            ),
            lambda: {"src": stream(), "mask": causal(), "is_causal": False},
        )
    )
    return made


def decoder_cases() -> list[Case]:
    """Decoder layers alone and stacked, and the whole encoder-decoder."""

    def layer_call(batch_first: bool = True) -> Call:
        return {
            "tgt": stream(batch_first=batch_first),
            "memory": stream(MEMORY, batch_first=batch_first),
        }

    def stack_call(causal_target: bool) -> Call:
        mask = {"tgt_mask": causal()} if causal_target else {}
        return {**layer_call(), **mask, "tgt_is_causal": causal_target}

    def transformer(**options: Any) -> nn.Transformer:
        return nn.Transformer(
            WIDTH, HEADS, 1, 2, HIDDEN, **{"batch_first": True, "norm_first": True, **options}
        )

    return [
        case("decoder_layer", decoder_layer, layer_call),
        case(
            "decoder_layer_time_first_no_bias",
            lambda: decoder_layer(batch_first=False, bias=False, activation="gelu"),
            lambda: layer_call(batch_first=False),
        ),
        case(
            "decoder_layer_prenorm_mask",
            lambda: decoder_layer(norm_first=True),
            lambda: {**layer_call(), "tgt_mask": causal()},
        ),
        case(
            "decoder",
            lambda: nn.TransformerDecoder(decoder_layer(), 2),
            lambda: stack_call(causal_target=False),
        ),
        case(
            "decoder_causal",
            lambda: nn.TransformerDecoder(decoder_layer(norm_first=True), 2, nn.LayerNorm(WIDTH)),
            lambda: stack_call(causal_target=True),
        ),
        case(
            "transformer",
            transformer,
            lambda: {
                "src": stream(MEMORY),
                "tgt": stream(),
                "tgt_mask": causal(),
                "src_is_causal": False,
                "tgt_is_causal": True,
            },
        ),
        case(
            "transformer_time_first_gelu",
            lambda: transformer(activation="gelu", batch_first=False),
            lambda: {
                "src": stream(MEMORY, batch_first=False),
                "tgt": stream(batch_first=False),
                "src_is_causal": False,
                "tgt_is_causal": False,
            },
        ),
    ]


def attention_cases() -> list[Case]:
    """MultiheadAttention by itself."""

    def cross_call(key_width: int = WIDTH, value_width: int = WIDTH) -> Call:
        return {
            "x": stream(),
            "key": stream(MEMORY, key_width),
            "value": stream(MEMORY, value_width),
        }

    return [
        case("mha_self", lambda: SelfAttention(False), lambda: {"x": stream()}),
        case("mha_self_weights", lambda: SelfAttention(True), lambda: {"x": stream()}),
        case(
            "mha_self_mask_no_bias",
            lambda: SelfAttention(False, bias=False),
            lambda: {"x": stream(), "mask": causal()},
        ),
        case(
            "mha_self_bias_kv",
            lambda: SelfAttention(True, add_bias_kv=True, add_zero_attn=True),
            lambda: {"x": stream()},
        ),
        case("mha_cross", lambda: CrossAttention(False), cross_call),
        case(
            "mha_cross_kdim_vdim",
            lambda: CrossAttention(False, kdim=48, vdim=24),
            lambda: cross_call(48, 24),
        ),
        case(
            "mha_cross_kdim_vdim_weights",
            lambda: CrossAttention(True, kdim=48, vdim=24),
            lambda: cross_call(48, 24),
        ),
    ]


def cases() -> list[Case]:
    """All cases on layers of torch.nn."""
    return [*encoder_cases(), *decoder_cases(), *attention_cases()]
