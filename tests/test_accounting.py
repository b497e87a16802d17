"""Multiply-adds: dense totals of known models by hand, and measured ones token by token."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.attachment import states
from d2dcompile.measuring import dense_macs

QUICK = d2d.Config(router_epochs=2, expert_size=8, router_width=4)
GIGA = 1e9


@dataclass(frozen=True)
class Sizes:
    """Of a transformer: layers, width, hidden width, matrices per FFN, width of keys and values."""

    layers: int
    d: int
    h: int
    matrices: int = 2
    kv: int = 0

    def blocks(self, tokens: int) -> int:
        """Projections, FFNs, and both products of attention, each token with every token."""
        projections = 2 * self.d * self.d + 2 * self.d * (self.kv or self.d)
        ffn = self.matrices * self.d * self.h
        return self.layers * (tokens * (projections + ffn) + 2 * tokens * tokens * self.d)


def vit(t: Any) -> tuple[nn.Module, dict[str, Tensor], int]:
    model = t.ViTForImageClassification(t.ViTConfig(num_labels=1000))
    patches = 196 * 768 * (3 * 16 * 16)
    return (
        model,
        {"pixel_values": torch.zeros(1, 3, 224, 224)},
        patches + Sizes(12, 768, 3072).blocks(197) + 768 * 1000,
    )


def bert(t: Any) -> tuple[nn.Module, dict[str, Tensor], int]:
    model = t.BertForSequenceClassification(t.BertConfig(num_labels=6))
    pooler = 768 * 768 + 768 * 6
    return model, {"input_ids": ids(1, 128)}, Sizes(12, 768, 3072).blocks(128) + pooler


def gpt2(t: Any) -> tuple[nn.Module, dict[str, Tensor], int]:
    model = t.GPT2LMHeadModel(t.GPT2Config())
    head = 1024 * 768 * 50257
    return model, {"input_ids": ids(1, 1024)}, Sizes(12, 768, 3072).blocks(1024) + head


def gemma(t: Any) -> tuple[nn.Module, dict[str, Tensor], int]:
    config = t.GemmaConfig(
        vocab_size=256000,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )
    head = 1024 * 2048 * 256000
    blocks = Sizes(18, 2048, 16384, 3, kv=256).blocks(1024)
    return t.GemmaForCausalLM(config), {"input_ids": ids(1, 1024)}, blocks + head


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "published"), [(vit, 17.56), (bert, 11.17), (gpt2, 145.8), (gemma, 2644)]
)
def test_dense_totals_are_those_by_hand_and_of_the_method(make: Any, published: float) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model, batch, by_hand = make(transformers)
    found = dense_macs(model.eval(), batch)
    assert found == by_hand
    assert float(f"{found / GIGA:.4g}") == published


def masked(block: testing.FFN, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block with its skipped experts' hidden values set to 0, and how many experts each token runs."""
    experts, plan = state.experts, state.experts.plan
    scores = (torch.relu(x @ experts.router1.T) @ experts.router2.T).abs()
    mask = scores >= state.tau * scores.amax(-1, keepdim=True)
    hidden = torch.nn.functional.gelu(block.up(x)) * mask.repeat_interleave(plan.expert_size, -1)
    return x + block.down(hidden), mask.sum(-1)


class Twice(nn.Module):
    """One block that runs twice, as in models that share weights between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = testing.FFN()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


@torch.no_grad()
def test_a_block_that_runs_twice_counts_the_experts_of_both_calls() -> None:
    model = Twice().eval()
    x = torch.randn(30, 16)
    d2d.convert(model, [x], QUICK, progress=False)
    d2d.set_tau(model, 0.5)
    state = states(model)[0]
    middle, first = masked(model.block, state, x)
    _, second = masked(model.block, state, middle)
    assert not torch.equal(first, second)
    stats = d2d.measure(model, [x])
    pairs, slab, router = int(first.sum() + second.sum()), 2 * 16 * 8, 4 * (16 + 8)
    assert (stats.sites["block"].pairs, stats.sites["block"].possible) == (pairs, 2 * 30 * 8)
    assert stats.macs == pairs * slab + 2 * 30 * router
    assert stats.dense_macs == 2 * 30 * 8 * slab


@torch.no_grad()
def test_counts_are_sums_over_single_tokens_whatever_their_batches() -> None:
    """No average over tokens on the way: twice the tokens are twice the multiply-adds of a sequence."""
    model = testing.Stack(2)
    x = torch.randn(3, 12, 16)
    d2d.convert(model, [x], QUICK, progress=False)
    d2d.set_tau(model, 0.4)
    held, by_hand, values = states(model), [], x
    for block, state in zip(model.blocks, held, strict=True):
        values, counts = masked(block, state, values)
        by_hand.append(counts)
    for token in ((0, 0), (1, 5), (2, 11)):
        stats = d2d.measure(model, [x[token][None, None]])
        assert stats.macs == sum(int(c[token]) * 256 + 4 * 24 for c in by_hand)
    whole = d2d.measure(model, [x])
    assert whole.macs == sum(int(c.sum()) * 256 + 36 * 4 * 24 for c in by_hand)
    twice, apart = d2d.measure(model, [torch.cat([x, x])]), d2d.measure(model, [x[:1], x[1:]])
    assert (twice.macs, twice.dense_macs) == (2 * whole.macs, 2 * whole.dense_macs)
    assert (apart.macs, apart.dense_macs, apart.executed) == (
        whole.macs,
        whole.dense_macs,
        whole.executed,
    )


def test_padding_counts_like_any_other_token() -> None:
    case = testing.tiny("bert")
    padded = {**case.inputs, "attention_mask": torch.ones_like(case.inputs["input_ids"])}
    padded["attention_mask"][1, 9:] = 0
    d2d.convert(case.model, [case.inputs], QUICK, progress=False)
    d2d.set_tau(case.model, 0.5)
    stats, full = d2d.measure(case.model, [padded]), d2d.measure(case.model, [case.inputs])
    assert stats.dense_macs == full.dense_macs
    assert all(site.possible == 2 * 17 * 8 for site in stats.sites.values())
    outside = stats.dense_macs - 2 * 34 * 2 * 32 * 64
    pairs = sum(site.pairs for site in stats.sites.values())
    assert 0 < pairs < 2 * 34 * 8
    assert stats.macs == outside + pairs * 2 * 32 * 8 + 2 * 34 * 4 * (32 + 8)


def test_grouped_queries_and_causal_attention_are_counted_by_hand_in_full() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model, batch = transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids(2, 17)}
    batch["input_ids"].random_(5, 99)
    d2d.convert(model, [batch], QUICK, progress=False)
    d2d.set_tau(model, 0.5)
    stats = d2d.measure(model, [batch])
    sequence = Sizes(2, 32, 64, 3, kv=16).blocks(17) + 17 * 32 * 99
    assert stats.dense_macs == 2 * sequence
    saved = sum(site.possible - site.pairs for site in stats.sites.values()) * 3 * 32 * 8
    assert saved > 0
    assert stats.macs == stats.dense_macs - saved + 2 * 34 * 4 * (32 + 8)
