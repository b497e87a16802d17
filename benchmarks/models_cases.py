"""What benchmarks/models.py measures: whole models of random weights, their inputs, their ceilings.

bert    BertConfig's defaults (768/3072, 12 layers), 8 x 128 token ids with an attention mask
vit     ViTConfig's defaults (B/16), 4 images of 197 patches
llama   2048/5632, 16 layers, 32 heads of which 8 hold keys, 32,000 tokens of vocabulary, untied head;
        one token at position 128 of a StaticCache of 256
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SHARE = 0.2  # of the pairs (token, expert) that run
SIZE = 64  # neurons an expert
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH, LENGTH = 8, 128  # of BERT
IMAGES, PATCHES = 4, 197  # of ViT, its class token included
FILLED, CACHE = 128, 256  # positions of Llama's cache
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": CACHE,
}


@dataclass(frozen=True)
class Case:
    """One group: a model in a dtype, cut to some layers in a smoke test."""

    family: str
    dtype: str
    layers: int

    def __str__(self) -> str:
        return f"{self.family}-{self.dtype}"

    @property
    def rows(self) -> int:
        """Tokens that a block gets."""
        return {"bert": BATCH * LENGTH, "vit": IMAGES * PATCHES, "llama": 1}[self.family]

    @property
    def decodes(self) -> bool:
        """Whether bytes of weights bound the time, so that the ceiling is theirs."""
        return self.family == "llama"


class Blocks(nn.Module):
    """x + block(norm(x)), layer after layer: a model's feed-forward blocks alone, kept from overflowing."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(functional.rms_norm(x, x.shape[-1:]))
        return x


def cases(quick: bool) -> Iterator[Case]:
    """All models, cut to two layers for a smoke test."""
    for family, dtype, layers in (
        ("bert", "bf16", 12),
        ("bert", "fp32", 12),
        ("vit", "bf16", 12),
        ("vit", "fp32", 12),
        ("llama", "bf16", 16),
    ):
        yield Case(family, dtype, 2 if quick else layers)


def build(case: Case) -> Any:
    """The model, in eval mode, its weights drawn from a fixed seed."""
    import transformers

    torch.manual_seed(0)
    if case.family == "llama":
        config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": case.layers})
        model = transformers.LlamaForCausalLM(config)
    elif case.family == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=case.layers))
    else:
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=case.layers))
    return model.to(DTYPES[case.dtype]).eval()


def blocks(case: Case, model: Any) -> Blocks:
    """The feed-forward blocks of a model as a stack; the weights are the model's own."""
    if case.family == "llama":
        return Blocks([layer.mlp for layer in model.model.layers])
    if case.family == "vit":
        return Blocks([layer.mlp for layer in model.layers])
    layers = model.encoder.layer
    return Blocks([nn.Sequential(layer.intermediate, layer.output.dense) for layer in layers])


def hidden(case: Case, model: Any) -> Tensor:
    """An input of the stack of blocks, as many tokens as the model's blocks get."""
    draw = torch.Generator().manual_seed(2)
    shape = {"bert": (BATCH, LENGTH), "vit": (IMAGES, PATCHES), "llama": (1, 1)}[case.family]
    return torch.randn(*shape, model.config.hidden_size, generator=draw).to(model.dtype)


def calibration(case: Case, model: Any) -> list[dict[str, Any]]:
    """Batches to convert with: few, since masks are forced and weights are random."""
    if case.family == "llama":
        return [{"input_ids": _ids(model, 2, LENGTH), "use_cache": False}]
    return [inputs(case, model)]


def inputs(case: Case, model: Any) -> dict[str, Any]:
    """What the model is called with; a cache is the call's own, filled with random keys and values."""
    draw = torch.Generator().manual_seed(1)
    if case.family == "vit":
        size = model.config.image_size
        pixels = torch.randn(IMAGES, 3, size, size, generator=draw)
        return {"pixel_values": _rounded(pixels, case, model)}
    if case.family == "bert":
        lengths = torch.linspace(LENGTH // 2, LENGTH, BATCH).long()
        mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        return {"input_ids": _ids(model, BATCH, LENGTH), "attention_mask": mask}
    return {
        "input_ids": _ids(model, 1, 1),
        "past_key_values": _cache(case, model),
        "use_cache": True,
    }


def _ids(model: Any, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(5, model.config.vocab_size, shape, generator=draw)


def _rounded(values: Tensor, case: Case, model: Any) -> Tensor:
    """Values of the case's dtype in the model's, which is wider where the truth is computed."""
    return values.to(DTYPES[case.dtype]).to(model.dtype)


def _cache(case: Case, model: Any) -> Any:
    """A static cache with FILLED positions of random keys and values."""
    from transformers import StaticCache

    config, draw = model.config, torch.Generator().manual_seed(3)
    cache = StaticCache(config=config, max_cache_len=CACHE)
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, heads, size, model.dtype, torch.device("cpu"))
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            values = torch.randn(1, heads, FILLED, size, generator=draw)
            held[:, :, :FILLED] = _rounded(values, case, model)
    return cache


def step(run: Callable[..., Any], given: Mapping[str, Any]) -> Callable[[], Tensor]:
    """A call of the model that may be repeated: it puts the cache's position back first."""
    lengths = [
        layer.cumulative_length for layer in getattr(given.get("past_key_values"), "layers", ())
    ]

    def call() -> Tensor:
        for length in lengths:
            length.fill_(FILLED)
        result = run(**given)
        found: Tensor = result.logits if "logits" in result else result.last_hidden_state
        return found

    return call


@dataclass(frozen=True)
class Weights:
    """Weights that a decode step reads: of L layers, one block, its projections, its router; of the head."""

    layers: int
    ffn: int
    attention: int
    router: int
    head: int

    @classmethod
    def of(cls, model: Any, router_width: int) -> Weights:
        """Of a Llama: three matrices a block; the embedding is left out, one row of it is read."""
        c = model.config
        keys = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
        experts = c.intermediate_size // SIZE
        return cls(
            layers=c.num_hidden_layers,
            ffn=3 * c.hidden_size * c.intermediate_size,
            attention=2 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * keys,
            router=c.hidden_size * router_width + router_width * experts,
            head=c.hidden_size * c.vocab_size,
        )

    @property
    def dense(self) -> int:
        """Weights that the dense model reads."""
        return self.layers * (self.ffn + self.attention) + self.head

    def sparse(self, share: float) -> float:
        """Weights that the converted model reads when `share` of each block runs."""
        return self.dense + self.layers * (self.router - (1 - share) * self.ffn)

    def ceiling(self, share: float) -> float:
        """The largest speed-up of a decode step where bytes of weights are all that takes time.

        1 / (1 - phi (1 - share) + rho), phi and rho the blocks' and routers' part of the dense weights.
        """
        return self.dense / self.sparse(share)


def predicted(whole: float, layers: int, dense: float, ours: float) -> float:
    """Seconds of a model if `layers` blocks of `dense` seconds took `ours` and the rest as before."""
    return whole - layers * (dense - ours)
