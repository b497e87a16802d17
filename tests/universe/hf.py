"""Tiny transformers models of Hugging Face, with random weights: one case for each type that runs.

Configurations are shrunk by attribute name (`tiny_config`), with a few changes by hand for each
model type (`CHANGES`). Which call a model accepts is found by trial and kept in `hf_calls.json`;
make that file again with `PYTHONPATH=tests python -m universe.hf [model type ...]` after an update
of transformers. Besides the base models there are some with the eager attention (`EAGER`) and some
with heads (`HEADS`), whose extra weights are decoys.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from universe.case import Case, Truth
from universe.truth import truth_of

Call = dict[str, Any]
TABLE = Path(__file__).with_name("hf_calls.json")
MAX_PARAMETERS = 3_000_000
MAX_SECONDS = 2.0
VOCAB = 99

# Scalars, by the name of the attribute.
SIZES: dict[str, Any] = {}
for _names, _value in (
    ("hidden_size d_model n_embd dim model_dim", 32),
    ("encoder_hidden_size decoder_hidden_size", 32),
    ("embed_dim embedding_size embedding_dim emb_dim", 32),
    ("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth layers", 2),
    ("num_encoder_layers num_decoder_layers encoder_num_layers decoder_num_layers", 2),
    ("num_encoder_blocks", 4),
    ("num_attention_heads n_head n_heads num_heads encoder_attention_heads", 4),
    ("decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads", 4),
    ("num_encoder_attention_heads num_decoder_attention_heads attention_heads", 4),
    ("decoder_num_heads encoder_num_heads", 4),
    ("num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads", 2),
    ("num_kv_heads", 2),
    ("head_dim d_kv attention_head_dim attention_head_size", 8),
    ("d_head", 8),
    ("intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner ffn_hidden_size", 64),
    ("encoder_intermediate_size decoder_intermediate_size decoder_ffn_size", 64),
    ("intermediate_dim mlp_dim feed_forward_size hidden_dim", 64),
    ("moe_intermediate_size expert_ffn_dim", 24),
    ("shared_expert_intermediate_size shared_intermediate_size", 40),
    ("vocab_size encoder_vocab_size", VOCAB),
    ("max_position_embeddings n_positions max_target_positions max_text_positions", 64),
    ("max_source_positions n_ctx max_seq_len block_size", 64),
    ("image_size", 32),
    ("patch_size", 8),
    ("num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_layer", 4),
    ("num_experts_per_tok moe_topk moe_k num_selected_experts experts_per_token top_k", 2),
    ("n_shared_experts num_shared_experts", 1),
    ("n_group topk_group num_expert_group", 1),
    ("first_k_dense_replace", 1),
    ("q_lora_rank", 20),
    ("kv_lora_rank", 12),
    ("qk_rope_head_dim", 4),
    ("qk_nope_head_dim", 6),
    ("qk_head_dim", 10),
    ("v_head_dim", 8),
    ("index_head_dim", 8),
    ("index_n_heads", 2),
    ("index_topk", 4),
    ("projection_dim output_dim out_hidden_size projection_size", 32),
    ("codebook_size codebook_dim", 16),
    ("num_mel_bins", 16),
    ("sliding_window attention_window_size local_attention", 8),
    ("num_queries num_query_tokens num_detection_tokens", 5),
    ("num_feature_levels", 3),
    ("num_codebooks num_quantizers", 2),
    ("num_labels", 3),
    ("pad_token_id", 0),
    ("bos_token_id decoder_start_token_id", 1),
    ("eos_token_id", 2),
    ("num_conv_pos_embeddings", 8),
    ("num_conv_pos_embedding_groups", 2),
    ("classifier_proj_size", 16),
    ("conv_kernel_size", 3),
    ("window_size", 2),
    ("num_filters", 8),
    ("mamba_d_state state_size ssm_state_size mamba_state_size mamba_d_ssm", 8),
    ("mamba_n_heads mamba_num_heads", 4),
    ("mamba_d_head mamba_head_dim mamba_headdim", 16),
    ("mamba_n_groups mamba_ngroups", 1),
    ("mamba_chunk_size chunk_size mamba_dt_rank time_step_rank", 8),
    ("linear_num_key_heads linear_num_value_heads", 2),
    ("linear_key_head_dim linear_value_head_dim", 8),
    ("num_mem_blocks", 1),
    ("type_vocab_size", 2),
    ("decoder_layerdrop encoder_layerdrop layerdrop", 0.0),
):
    for _name in _names.split():
        SIZES[_name] = _value

# Sequences with one entry for each stage of a model: cut to the length that the default has.
STAGES: dict[str, tuple[Any, ...]] = {
    "depths": (1, 1, 2, 1, 1),
    "hidden_sizes": (16, 32, 48, 64, 64),
    "neck_hidden_sizes": (16, 32, 48, 64, 64),
    "embed_dims": (16, 32, 48, 64),
    "embed_dim": (16, 32, 48, 64),
    "num_attention_heads": (1, 2, 2, 4),
    "num_heads": (1, 2, 2, 4),
    "encoder_in_channels": (32, 48, 64),
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 3, 3),
}
# Sequences with one entry for each layer: one layer of each kind.
LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "layer_type")

# What the rules above do not get right, by model type (of the model or of a part of it).
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
ODD = {"intermediate_size": 37}  # as in the tests of transformers
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deit", "electra", "hubert", "olmo", "qwen2"), ODD),
    "sam_vision_model": {"output_channels": 32, "num_pos_feats": 16},
    "sam_hq_vision_model": {"output_channels": 32, "num_pos_feats": 16},
    "llama4_vision_model": {
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    "mimi": {"upsample_groups": 32},
    "pocket_tts_audio_tokenizer": {"upsample_groups": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "bailing_hybrid": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{
        f"{name}_text": {"rope_parameters": MROPE}
        for name in (
            "glm46v",
            "glm4v",
            "glm_image",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
            "qwen2_5_omni",
            "qwen2_5_vl",
            "qwen2_vl",
        )
    },
    "glm4v_moe_text": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "esmc": {"num_key_value_heads": 4},
    "kimi_linear": {
        "num_experts_per_token": 2,
        "num_expert_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "qwen2_5_vl_vision": {"fullatt_block_indexes": [1], "window_size": 16},
    "xclip_vision_model": {
        "mit_hidden_size": 32,
        "mit_num_attention_heads": 4,
        "mit_num_hidden_layers": 1,
        "mit_intermediate_size": 40,
    },
    "yolos": {"image_size": [32, 32]},
    "zamba": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "sam_mask_decoder": {"iou_head_hidden_dim": 24},
    "align_vision_model": {
        "initializer_range": 0.3,
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "hidden_dim": 32,
    },
    "audio-spectrogram-transformer": {"max_length": 32, "time_stride": 8, "frequency_stride": 8},
    "autoformer": {**SERIES, "moving_average": 5},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bros": {"hidden_size": 64, "dim_bbox": 8},
    "codegen": {"rotary_dim": 4},
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "donut-swin": SWIN,
    "esm": {"vocab_size": VOCAB, "mask_token_id": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "fsmt": {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 6,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [64, 64],
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 6,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 64},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"rope_parameters": ROPE, "head_dim": 8},
    "hunyuan_v1_moe": {"rope_parameters": ROPE, "head_dim": 8},
    "informer": SERIES,
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 3,
        "use_mamba_kernels": False,
    },
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [2, 4, 4],
        "depths": [1, 1, 1],
        "key_dim": [4, 4, 4],
        "down_ops": [["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 8, 4, 2, 2]],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 36, "num_attention_heads": 3},
    "longcat_flash": {"expert_ffn_hidden_size": 24, "ffn_hidden_size": 64, "zero_expert_num": 2},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "lxmert": {"visual_feat_dim": 12, "l_layers": 1, "x_layers": 1, "r_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "ministral": {"rope_parameters": ROPE, "head_dim": 8},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 12, 16, 24, 32, 40],
        "image_size": 64,
        "patch_size": 2,
    },
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": 64, "patch_size": 2},
    "moonshine": {
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
        "encoder_num_attention_heads": 4,
    },
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {**MAMBA, "n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        "hash_seed": 0,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "speecht5": {"speech_decoder_prenet_units": 16},
    "squeezebert": dict.fromkeys(
        (f"{part}_groups" for part in ("q", "k", "v", "post_attention", "intermediate", "output")),
        1,
    ),
    "swin": SWIN,
    "swin2sr": {**SWIN, "image_size": 32, "patch_size": 1, "window_size": 4},
    "swinv2": {**SWIN, "window_size": 4, "pretrained_window_sizes": [0, 0]},
    "time_series_transformer": SERIES,
    "videoprism_vision_model": {"image_size": 72},
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 24,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    },
    "vits": {
        "flow_size": 16,
        "noise_scale": 0.0,
        "noise_scale_duration": 0.0,
        "spectrogram_bins": 9,
        "upsample_initial_channel": 16,
        "duration_predictor_filter_channels": 16,
    },
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "xclip": {"prompt_num_attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "bridgetower": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    "bridgetower_vision_model": {"hidden_size": 64, "patch_size": 16},
    "bridgetower_text_model": {"hidden_size": 64},
    "perceiver": {
        "num_latents": 10,
        "d_latents": 32,
        "d_model": 24,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "dia_encoder": {"num_key_value_heads": 4},
    "dia_decoder": {
        "cross_hidden_size": 32,
        "cross_num_attention_heads": 4,
        "cross_head_dim": 8,
        "cross_num_key_value_heads": 4,
    },
    "clap_audio_model": {
        "spec_size": 64,
        "num_mel_bins": 16,
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 4],
        "patch_size": 4,
        "patch_stride": [4, 4],
        "hidden_size": 32,
        "aff_block_r": 2,
    },
    "sam_prompt_encoder": {"image_size": 32, "patch_size": 8, "mask_input_channels": 4},
}


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of this class with the smallest sizes that still look like the real one."""
    default = kind()
    given: dict[str, Any] = {}
    special = 60
    for name, value in sorted(vars(default).items()):
        if isinstance(value, PreTrainedConfig):
            given[name] = tiny_config(type(value))
        elif isinstance(value, (list, tuple)):
            if name in STAGES and value and not isinstance(value[0], (list, tuple)):
                given[name] = type(value)(STAGES[name][: len(value)])
            elif name in LAYERS and value:
                given[name] = layers_of_each_kind(value)
        elif isinstance(value, bool):
            continue
        elif name in SIZES and isinstance(value, (int, float)):
            given[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            given[name] = special
            special += 1
    if "kv_lora_rank" in given:  # multi-head latent attention: rotary dimensions count as the head
        given["num_key_value_heads"] = given["num_attention_heads"]
        if "head_dim" in given:
            given["head_dim"] = given["qk_rope_head_dim"]
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        rotary = given.get("head_dim", 8) * rope.get("partial_rotary_factor", 1.0)
        given["rope_parameters"] = {**rope, "mrope_section": [1, 1, int(rotary) // 2 - 2]}
    lengths = {len(given[name]) for name in LAYERS if name in given}
    if lengths and "num_hidden_layers" in given:
        count = max(lengths)
        given["num_hidden_layers"] = count
        for name in LAYERS:
            if name in given:
                kinds = given[name]
                given[name] = kinds + [kinds[-1]] * (count - len(kinds))
    given.update(CHANGES.get(default.model_type, {}))
    return kind(**given)


def layers_of_each_kind(kinds: list[Any] | tuple[Any, ...]) -> list[Any]:
    """The first layer of each kind, in order, and two layers at least."""
    firsts = list(dict.fromkeys(kinds))
    return firsts if len(firsts) > 1 else firsts * 2


# --- calls --------------------------------------------------------------------------------------


# Each takes the model's configuration; random numbers are seeded by the caller.


def ids(rows: int = 2, columns: int = 12) -> torch.Tensor:
    return torch.randint(3, 50, (rows, columns))


def find(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these attributes that the configuration or a part of it has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            value = find(part, *names)
            if value is not None:
                return value
    return default


def image(config: PreTrainedConfig, *lead: int) -> torch.Tensor:
    size = find(config, "image_size", "input_size", "img_size", default=64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = find(config, "num_channels", "in_channels", "in_chans", "channels", default=3)
    if not isinstance(channels, int):
        channels = 3
    return torch.randn(*lead, channels, height, width)


def features(config: PreTrainedConfig) -> int:
    return int(
        find(
            config,
            "feature_projection_input_dim",
            "num_mel_bins",
            "input_feat_per_channel",
            "feature_size",
            "input_size",
            "input_dim",
            "feat_extract_dim",
            "hidden_size",
            default=16,
        )
    )


def image_call(config: PreTrainedConfig) -> Call:
    return {"pixel_values": image(config, 2)}


def image_ids(config: PreTrainedConfig, count: int) -> torch.Tensor:
    """Two texts, each with a row of so many places for an image's tokens."""
    token = find(config, "image_token_id", "image_token_index")
    texts = ids(2, count + 7)
    texts[:, 3 : 3 + count] = token
    return texts


def image_tokens_call(count: int, config: PreTrainedConfig) -> Call:
    return {"input_ids": image_ids(config, count), **image_call(config)}


def image_grid_call(count: int, config: PreTrainedConfig) -> Call:
    width = (
        find(config, "in_channels", "num_channels", "in_chans", default=3)
        * find(config, "temporal_patch_size", default=1)
        * find(config, "patch_size") ** 2
    )
    return {
        "input_ids": image_ids(config, count),
        "pixel_values": torch.randn(32, width),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (image_ids(config, count) == find(config, "image_token_id")).int(),
    }


CALLS: dict[str, Callable[[PreTrainedConfig], Call]] = {
    "ids": lambda c: {"input_ids": ids()},
    "ids, decoder ids": lambda c: {"input_ids": ids(), "decoder_input_ids": ids(2, 9)},
    "ids, bbox": lambda c: {"input_ids": ids(), "bbox": torch.randint(0, 9, (2, 12, 4)).sort()[0]},
    "ids, pixels": lambda c: {"input_ids": ids(), **image_call(c)},
    "ids, decoder ids, bbox": lambda c: {
        "input_ids": ids(),
        "decoder_input_ids": ids(2, 9),
        "bbox": torch.rand(2, 12, 4).sort()[0],
    },
    "pixels, points": lambda c: {**image_call(c), "input_points": 16 * torch.rand(2, 1, 3, 2)},
    "pixels, noise": lambda c: {**image_call(c), "noise": torch.rand(2, 16)},
    "pixels": image_call,
    "video": lambda c: {"pixel_values": image(c, 2, find(c, "num_frames", default=4))},
    "videos": lambda c: {
        "pixel_values_videos": image(c, 2, find(c, "num_frames", "frames_per_clip", default=4))
    },
    "ids, videos": lambda c: {
        "input_ids": ids(),
        "pixel_values_videos": image(c, 2, find(c, "num_frames", default=4)),
    },
    "ids, mel image": lambda c: {
        "input_ids": ids(),
        "input_features": torch.randn(2, 1, 256, 16),
        "is_longer": torch.tensor([[False], [False]]),
    },
    "inputs": lambda c: {"inputs": torch.randn(2, 12, c.d_model)},
    "flat pixels, grid, merges": lambda c: {
        "pixel_values": torch.randn(16, 3 * find(c, "patch_size") ** 2),
        "grid_thw": torch.tensor([[1, 4, 4]]),
        "merge_sizes": torch.tensor([2]),
    },
    "ids, video": lambda c: {
        "input_ids": ids(),
        "pixel_values": image(c, 2, find(c, "num_frames", default=4)),
    },
    "wave": lambda c: {"input_values": torch.randn(2, 1600)},
    "wave channel": lambda c: {"input_values": torch.randn(2, 1, 1600)},
    "wave, decoder ids": lambda c: {
        "input_values": torch.randn(2, 1600),
        "decoder_input_ids": ids(2, 9),
    },
    "spectrum": lambda c: {"input_values": torch.randn(2, 32, features(c))},
    "features": lambda c: {"input_features": torch.randn(2, 32, features(c))},
    "features last": lambda c: {"input_features": torch.randn(2, features(c), 32)},
    "long features last": lambda c: {"input_features": torch.randn(2, features(c), 128)},
    "features last, decoder ids": lambda c: {
        "input_features": torch.randn(2, features(c), 128),
        "decoder_input_ids": ids(2, 9),
    },
    "features, decoder ids": lambda c: {
        "input_features": torch.randn(2, 32, features(c)),
        "decoder_input_ids": ids(2, 9),
    },
    "embeddings": lambda c: {"inputs_embeds": torch.randn(2, 12, find(c, "hidden_size"))},
    "series": lambda c: {
        "past_values": torch.randn(
            2, find(c, "context_length", default=32), find(c, "num_input_channels", default=1)
        )
    },
    "series, features": lambda c: {
        "past_values": torch.rand(2, 19),
        "past_time_features": torch.rand(2, 19, 0),
        "past_observed_mask": torch.ones(2, 19),
        "future_values": torch.rand(2, 8),
        "future_time_features": torch.rand(2, 8, 0),
    },
    "flat series, padding": lambda c: {
        "past_values": torch.randn(2, 64),
        "past_values_padding": torch.zeros(2, 64).long(),
        "freq": torch.zeros(2, 1).long(),
    },
    "trajectory": lambda c: {
        "states": torch.randn(2, 4, c.state_dim),
        "actions": torch.randn(2, 4, c.act_dim),
        "rewards": torch.randn(2, 4, 1),
        "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4).expand(2, 4),
        "attention_mask": torch.ones(2, 4),
    },
    "ids, regions": lambda c: {
        "input_ids": ids(),
        "visual_feats": torch.randn(2, 5, c.visual_feat_dim),
        "visual_pos": torch.rand(2, 5, 4),
    },
    "queries, pixels": lambda c: {
        "query_embeds": torch.randn(2, 5, c.hidden_size),
        "encoder_hidden_states": torch.randn(2, 7, c.encoder_hidden_size),
    },
    "spectrum, decoder spectrum": lambda c: {
        "input_values": torch.randn(2, 12, c.hidden_size),
        "decoder_input_values": torch.randn(2, 12, c.hidden_size),
    },
    "flat patches, shapes": lambda c: {
        "pixel_values": torch.randn(2, 16, 3 * find(c, "patch_size") ** 2),
        "pixel_attention_mask": torch.ones(2, 16).long(),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "ids, flat patches, shapes": lambda c: {
        "input_ids": ids(),
        "pixel_values": torch.randn(2, 16, 3 * find(c, "patch_size") ** 2),
        "pixel_attention_mask": torch.ones(2, 16).long(),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "flat pixels, grid": lambda c: {
        "pixel_values": torch.randn(
            16,
            find(c, "num_channels", "in_channels", default=3)
            * find(c, "temporal_patch_size", default=1)
            * find(c, "patch_size") ** 2,
        ),
        "grid_thw": torch.tensor([[1, 4, 4]]),
    },
    "flat series": lambda c: {"past_values": torch.randn(2, find(c, "context_length", default=32))},
    "patches, grid": lambda c: {
        "hidden_states": torch.randn(
            16,
            find(c, "num_channels", "in_channels", default=3)
            * find(c, "temporal_patch_size", default=1)
            * find(c, "patch_size") ** 2,
        ),
        "grid_thw": torch.tensor([[1, 4, 4]]),
    },
}

for _count in (1, 4, 5, 16):
    CALLS[f"ids, pixels, {_count} image tokens"] = partial(image_tokens_call, _count)
    CALLS[f"ids, patches, grid, {_count} image tokens"] = partial(image_grid_call, _count)


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build(
    model_type: str, attention: str | None = None, kind: type[Any] = AutoModel
) -> PreTrainedModel:
    """A model of this type, in eval mode, seeded."""
    config = tiny_config(CONFIG_MAPPING[model_type])
    if attention is not None:
        config._attn_implementation = attention
    with seeded():
        model = kind.from_config(config) if kind is AutoModel else kind(config)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


def call_of(model: PreTrainedModel, name: str) -> Call:
    with seeded():
        return CALLS[name](model.config)


def make(
    model_type: str, attention: str | None, call: str, kind: type[Any] = AutoModel
) -> tuple[nn.Module, Call]:
    model = build(model_type, attention, kind)
    return model, call_of(model, call)


def truth(call: str, model: nn.Module) -> Truth:
    """The truth about the weights that the named call of this model reads."""
    assert isinstance(model, PreTrainedModel)
    with seeded():
        return truth_of(model, call_of(model, call))


EAGER = (
    *("bart", "bert", "bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "opt"),
    *("phi3", "qwen3", "roberta", "t5", "vit", "whisper"),
)
HEADS = {
    "BartForConditionalGeneration": "bart",
    "BertForMaskedLM": "bert",
    "BertForSequenceClassification": "bert",
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "RobertaForMaskedLM": "roberta",
    "RobertaForSequenceClassification": "roberta",
    "T5ForConditionalGeneration": "t5",
    "ViTForImageClassification": "vit",
    "WhisperForConditionalGeneration": "whisper",
}
NOTES = {
    "bitnet": "RMS norm between the product of the two halves and the down projection",
    "grounding-dino": "the fusion's score matrix serves both directions, so that Q is K and K is Q",
    "informer": "draws keys at random: no two calls give the same",
    "kosmos-2.5": "layer norm between the activation and the down projection",
    "levit": "batch norm after every linear, also inside of blocks",
    "mm-grounding-dino": "as grounding-dino",
    "pp_ocrv6_small_rec": "batch norm after every convolution, also inside of blocks",
    "pp_ocrv6_tiny_rec": "batch norm after every convolution, also inside of blocks",
    "squeezebert": "with one group in every convolution, as a linear; the default has four",
    "vilt": "draws patches at random: no two calls give the same",
}


def cases() -> list[Case]:
    """Every case of this group."""
    table: dict[str, str] = json.loads(TABLE.read_text())
    variants: list[tuple[str, str, str | None, type[Any]]] = [
        *((name, name, None, AutoModel) for name in table),
        *((f"{name}-eager", name, "eager", AutoModel) for name in EAGER),
        *((name, base, None, getattr(transformers, name)) for name, base in HEADS.items()),
    ]
    return [
        Case(
            f"hf/{name}",
            partial(make, model_type, attention, table[model_type], kind),
            partial(truth, table[model_type]),
            NOTES.get(model_type, ""),
        )
        for name, model_type, attention, kind in variants
    ]


# --- making the table of calls ------------------------------------------------------------------


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def takes(name: str, argument: str) -> bool:
    """Whether the text of this call names the argument."""
    if argument == "pixel_values" and name.startswith("pixels"):
        return True
    code = getattr(CALLS[name], "__code__", None)
    return code is not None and repr(argument) in repr(code.co_consts)


def probe(model_type: str) -> tuple[str | None, str]:
    """The first call that this model accepts, or why there is none."""
    try:
        with time_limit(20):
            config = tiny_config(CONFIG_MAPPING[model_type])
    except Exception as error:
        return None, f"config: {error!r:.300}"
    try:
        with time_limit(20), torch.device("meta"):
            size = count(AutoModel.from_config(config))
        if size > MAX_PARAMETERS:
            return None, f"size: {size}"
    except Exception as error:
        if not any(w in str(error) for w in ("meta", "Meta")):
            return None, f"build: {error!r:.300}"
    try:
        with time_limit(20):
            model = build(model_type)
    except Exception as error:
        return None, f"build: {error!r:.300}"
    if count(model) > MAX_PARAMETERS:
        return None, f"size: {count(model)}"
    wanted = model.main_input_name
    accepted = inspect.signature(model.forward).parameters.keys()
    order = sorted(CALLS, key=lambda n: not takes(n, wanted))
    if find(config, "image_token_id", "image_token_index") is not None:
        order = [n for n in order if "image tokens" in n] + order
    why: dict[str, str] = {}
    for name in order:
        try:
            with time_limit(10), torch.no_grad():
                call = call_of(model, name)
                if not call.keys() <= accepted:  # would vanish in **kwargs
                    raise TypeError(f"no arguments {call.keys() - accepted}")
                start = time.perf_counter()
                model(**call)
                if time.perf_counter() - start > MAX_SECONDS:
                    return None, "slow"
            return name, ""
        except Exception as error:
            if takes(name, wanted) or not why:
                why[name] = f"{type(error).__name__}: {error}"[:160]
    return None, f"call {wanted}: {why}"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for model_type in sys.argv[1:] or MODEL_MAPPING_NAMES:
        name, why = probe(model_type)
        if name is None:
            table.pop(model_type, None)
            print(f"{model_type:32} {why}", flush=True)
        else:
            table[model_type] = name
            print(f"{model_type:32} OK {name}", flush=True)
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
