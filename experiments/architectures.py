"""The two language models: GPT-2's blocks, and Llama's with gated ones."""

from __future__ import annotations

import torch
from torch import nn

from .language import Sizes


def gpt2(sizes: Sizes, hidden: int | None = None) -> nn.Module:
    """GPT-2 from scratch, GELU, tied embeddings, no dropout; seeded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes.vocabulary, n_positions=sizes.length, n_embd=sizes.width,
        n_layer=sizes.layers, n_head=sizes.heads, n_inner=hidden or sizes.hidden,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(sizes: Sizes, hidden: int | None = None) -> nn.Module:
    """Llama from scratch, SwiGLU, tied embeddings; seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary, max_position_embeddings=sizes.length,
        hidden_size=sizes.width, intermediate_size=hidden or sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)
