"""What the weights of a transformers model are, from their names and nothing else.

The rules were written by hand from the modeling sources: general naming habits first (`GENERAL`),
then what single model types do otherwise (`SPECIAL`, which wins). A model type is that of the whole
model or of the innermost `PreTrainedModel` that holds the weight, so that a tower is judged alike
wherever it is.

Every weight matrix which a call uses has to be classified by exactly one rule. Check that with
`PYTHONPATH=tests python -m universe.truth [case ...]`.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from universe.case import Truth

ANYWHERE = r"(?:.*\.)?"


@dataclass(frozen=True)
class Rule:
    """One naming habit.

    Attributes:
        kind: "block", "projection", "optional" or "other".
        role: of a block's or a projection's weight.
        pattern: of the whole name, less ".weight"; what it captures as `at` is the same for all
            weights of one block.
        group: what sets blocks apart that stand at the same place.
    """

    kind: str
    role: str
    pattern: re.Pattern[str]
    group: tuple[str, ...] = ()

    def match(self, name: str) -> str | None:
        found = self.pattern.fullmatch(name.removesuffix(".weight"))
        return None if found is None else found.groupdict().get("at", "")


def block(at: str = ANYWHERE, **roles: str) -> list[Rule]:
    """A feed-forward block whose weights are named `at` + the given ends."""
    group = tuple(roles.values())
    return [
        Rule("block", role, re.compile(f"(?P<at>{at})(?:{end})"), group)
        for role, end in roles.items()
    ]


def attention(at: str = ANYWHERE, **roles: str) -> list[Rule]:
    """Projections around a softmax attention, by role: q, k, v, o, qk, kv, qkv."""
    return [
        Rule("projection", role, re.compile(f"(?P<at>{at})(?:{end})"))
        for role, end in roles.items()
    ]


def optional(*patterns: str) -> list[Rule]:
    """Weights of which nothing is asked."""
    return [Rule("optional", "", re.compile(f"{ANYWHERE}(?:{p})")) for p in patterns]


def other(*patterns: str) -> list[Rule]:
    """Weights that are neither of a block nor a projection and must not be taken for one."""
    return [Rule("other", "", re.compile(f"{ANYWHERE}(?:{p})")) for p in patterns]


MLP = ANYWHERE + r"(?:mlp|feed_forward|ffn|mlp_block)\."
ATTENTION = (
    ANYWHERE + r"(?:attn|attention|self_attn|self_attention|encoder_attn|cross_attn|cross_attention"
    r"|encoder_attn_text|(?:cross)?attention\.(?:self|attention)"
    r"|attn\.attention|cross_attention_layer|temporal_attention)\."
)

GENERAL: list[Rule] = [
    # Feed-forward blocks.
    *block(MLP, gate="gate_proj", up="up_proj", gate_up="gate_up_proj", down="down_proj"),
    *block(ANYWHERE + r"(?:mlp|ffn|layers\.\d+)\.", up="fc1", down="fc2"),
    *block(
        ANYWHERE + r"(?<!att\.)(?<!attention\.)", up=r"intermediate\.dense", down=r"output\.dense"
    ),
    *block(MLP, up="linear_fc1", down="linear_fc2"),
    *block(MLP, up="dense1", down="dense2"),
    *block(ANYWHERE + r"feed_forward[12]?\.", up="linear1", down="linear2"),
    *block(
        ANYWHERE + r"(?:feed_forward|ffn1|ffn2)\.", up="intermediate_dense", down="output_dense"
    ),
    *block(MLP, up="c_fc", down="c_proj"),
    *block(MLP, up="dense_h_to_4h", down="dense_4h_to_h"),
    *block(ANYWHERE + r"(?:DenseReluDense|mlp)\.", up="wi|wi_1", gate="wi_0", down="wo"),
    *block(ANYWHERE + r"feed_forward\.", gate="w1", up="w3", down="w2"),
    *block(ANYWHERE + r"(?:mlp|ffn|ffns\.\d+)\.", up="lin1", down="lin2"),
    *block(MLP, gate_up="Wi", down="Wo"),
    *block(MLP, up="fc_in", down="fc_out"),
    # Attention.
    *attention(
        ATTENTION,
        q="q_proj|query|query_proj|q_lin|q|linear_q|q_proj\.linear",
        k="k_proj|key|key_proj|k_lin|k|linear_k|k_proj\.linear",
        v="v_proj|value|value_proj|v_lin|v|linear_v|v_proj\.linear",
        o="o_proj|out_proj|output_proj|out_lin|o|proj|c_proj|dense|projection|output"
        r"|projection_layer|linear_out|Wo|o_proj\.linear",
        qkv="qkv|qkv_proj|query_key_value|Wqkv|c_attn|in_proj_weight",
        kv="kv_b_proj|kv_proj",
    ),
    *attention(ANYWHERE + r"self_attn\.", q="q_b_proj"),  # the second half of a low-rank Q
    *attention(ANYWHERE + r"(?:\w*attention|att)\.", o=r"output\.dense"),
    *attention(ANYWHERE + r"(?:Self|EncDec|LocalSelf)Attention\.", q="q", k="k", v="v", o="o"),
    # Low-rank first halves, positions, shared experts, gates of sizes far below the stream's.
    *optional(
        r"(?:shared_experts?|shared_mlp)\.(?:gate_proj|up_proj|down_proj|gate_up_proj)(?:\.\w+)?",
        r"shared_mlp\.(?:input|output)_linear",
        r"q_a_proj|kv_a_proj_with_mqa",
        r"relative_k_proj|linear_pos|r_proj|rel_logits_proj\.proj|pos_proj|pos_q_proj",
        r"squeeze_excite\.\w+|token_squeeze_excitation\.convolutions\.\d+",
        r"adapter_modules\.\w+\.dense[12]",
    ),
    # Mixers of tokens that are no softmax attention.
    *optional(r"linear_attn\.\w+|mamba\.(?:in_proj|x_proj|dt_proj|out_proj)"),
    # From one tower to another, or into the space of a contrastive loss.
    *optional(
        r"merger\.(?:mlp\.\d+|\w+)",
        r"prompt_projector\.linear_[12]",
        r"(?:multi_modal_projector|aligner)\.\w+|projector\.linear_fc[12]",
        r"(?:audio|text)_projection\.linear[12]",
    ),
    *other(r"(?:text|visual|embedding|encoder|audio)_projection", r"encoder_projector"),
    # Experts that tokens are routed to, and routers.
    *other(
        r"experts(?:\.\w+)?\.(?:gate_up_proj|down_proj|up_proj|wi|wo|fc1|fc2)(?:_bias)?",
        r"(?<!router\.)gate|router|shared_expert_gate",
        r"router\.(?:gate|layer|classifier)|gate\.wg|gate\.moe_statics\.e_score_correction_bias",
    ),
    # Selection of keys (an index score, no softmax), gates on an attention's output, sinks.
    *other(
        r"self_attn\.(?:compressor\.)?indexer\.(?:(?!position_bias)\w+|scorer\.\w+)",
        r"self_attn\.(?:gate_proj|g_proj|output_gate|dt_proj|sink_proj)",
    ),
    # Decoys: gates per layer, convolution modules, low-rank pieces of a residual stream.
    *other(
        r"per_layer_input_gate|per_layer_projection|per_layer_model_projection",
        r"(?:conv|conv_module)\.pointwise_conv[12]",
        r"layers\.\d+\.conv\.(?:in_proj|out_proj)",
        r"(?:attn_hc|ffn_hc)\.fn|hc_head\.hc_fn",
    ),
    # Into and out of the stack: embeddings, downsampling, poolers and heads.
    *other(
        r"\w*pooler(?:\.dense)?",
        r"\w*embeddings?(?:\.\d+)?\.\w*(?:token|position|word)\w*(?:\.\d+)?"
        r"|\w*position_embeddings?|pos_embed|class_pos_emb|position_enc|level_embed"
        r"|cls_token|group_token|detection_tokens|class_embedding|mask_emb|probe",
        r"patch_embeddings?(?:\.projection)?|patch_embed(?:\.projection)?|patch_projection",
        r"feature_projection(?:\.projection)?|value_embedding\.value_projection",
        r"embedding_hidden_mapping_in|embedder\.(?:projection|linear|input_embedding)",
        r"subsampling\.(?:linear|layers\.\d+(?:\.pointwise_conv)?)|subsampler\.dense_[01]",
        r"neck\.conv1|upsample\.projection|downsample\.reduction",
        r"lm_head(?:\.(?:dense|decoder))?|cls\.predictions\.(?:transform\.dense|decoder)",
        r"(?<!router\.)classifier(?:\.(?:dense|out_proj))?|proj_out|output_projection",
        r"audio_lm_head|ctc_head|joint\.head|decoder_projector",
        r"lstm\.\w+",
    ),
    # Tables added to scores or to the hidden state, and scales.
    *other(
        r"relative_position_bias_table|relative_attention_bias|attention_biases|rel_pos_[hw]",
        r"(?:pos_)?bias_[uv]|logit_scale|layer_scale(?:_\d)?|position_bias|time_mix_\w+",
        r"emb_rel_[kv]|gru_rel_pos_const|gru_rel_pos_linear|\w+_l2_clip\.scale|A_log",
        r"continuous_position_bias_mlp\.\d+",
        r"parametrizations\.weight\.original[01]",
    ),
]

NO_SOFTMAX = optional(
    r"(?:self|attention)\.(?:query|key|value|receptance|output)", r"attention\.output\.dense"
)
MOBILE_NET = [
    *optional(r"(?:layer\.\d+|downsampling_layer)\.(?:expand|reduce)_1x1\.convolution"),
    *other(r"conv_(?:1x1|projection|1x1_exp)\.convolution|conv_stem\.reduce_1x1\.convolution"),
]
DEPTHWISE = optional(r"(?:mlp\.(?:dense|fc)|pwconv)[12]")  # a depthwise convolution or GRN between
CONVNEXT = block(up="pwconv1|pointwise_conv1", down="pwconv2|pointwise_conv2")
GROUNDING = [
    *block(ANYWHERE + r"(?:deformable_layer|text_enhancer_layer)\.", up="fc1", down="fc2"),
    *optional(  # deformable attention
        r"(?:self_attn|encoder_attn)\.(?:attention_weights|sampling_offsets|value_proj|output_proj)"
    ),
    # One score matrix, read by rows for one direction and by columns for the other.
    *attention(
        ANYWHERE + r"fusion_layer\.attn\.",
        qk="vision_proj|text_proj",
        v="values_vision_proj|values_text_proj",
        o="out_vision_proj|out_text_proj",
    ),
    *optional(r"reference_points_head\.layers\.\d+"),
    *other(r"encoder_output_bbox_embed\.layers\.\d+|enc_output|input_proj_vision\.\d+\.0"),
]
PLAIN_CONV = other(r"(?:layer|layers)\.\d+\.convolution|shortcut\.convolution")
PPLCNET = [
    # Batch norm between the matrices: in training every hidden value depends on all tokens.
    *optional(r"channel_conv[12]\.convolution"),
    *other(r"stem4\.convolution"),
]
MAMBA = optional(r"mixer\.(?:in_proj|x_proj|dt_proj|out_proj)")
MOSHI = block(MLP, gate_up="fc1", down="fc2")
TIMESFM = optional(r"input_ff_layer\.(?:input|output|residual)_layer")
XLM = attention(ANYWHERE + r"attentions\.\d+\.", q="q_lin", k="k_lin", v="v_lin", o="out_lin")
BYTES = other(r"block\.\d+\.conv")  # 1x1 convolutions of a waveform's residual units
SAM_NECK = other(r"neck\.fpn_layers\.\d+\.proj[12]")
AIM_HEAD = attention(ANYWHERE + r"head\.", k="k_proj", v="v_proj", o="output_proj")

SAM = [
    *attention(
        ANYWHERE + r"(?:cross_attn_image_to_token|(?:cross|final)_attn_token_to_image)\.",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="out_proj",
    ),
    *other(  # weights made for one image, scores of quality
        r"(?:output_hypernetworks_mlps\.\d+|iou_prediction_head|hq_mask_mlp)"
        r"\.(?:proj_in|proj_out|layers\.\d+)"
    ),
    *SAM_NECK,
]

# Attention whose outputs are no softmax of products of queries and keys, by its module's class.
OTHER_ATTENTION = (
    "AutoformerAttention",
    "BailingHybridDeltaAttention",
    "Glm5NextTextLinearAttention",
    "KimiLinearDeltaAttention",
    "LSHSelfAttention",
    "MiniMaxLightningAttention",
)

SPECIAL: dict[str, list[Rule]] = {
    "aimv2": AIM_HEAD,
    "aimv2_vision_model": AIM_HEAD,
    "albert": block(up="ffn", down="ffn_output"),
    "align": [
        *optional(r"expansion\.expand_conv|projection\.project_conv"),  # depthwise between
    ],
    "altclip": other(r"transformation"),
    "autoformer": other(r"seasonality_projection"),
    "axk2": [
        *attention(ANYWHERE + r"self_attn\.", q="q_gate_proj"),  # Q and the output's gate in one
        *optional(r"\w+_layernorm\.mlp\.fc[12]"),  # a low-rank gate on the normed stream
    ],
    "bigbird_pegasus": attention(ANYWHERE + r"self_attn\.self\.", q="query", k="key", v="value"),
    "blip_2_qformer": block(up=r"intermediate_query\.dense", down=r"output_query\.dense"),
    "bridgetower": other(r"cross_modal_(?:image|text)_transform"),
    "bros": other(r"bbox_projection"),
    "convbert": optional(
        # Dynamic convolution next to the attention heads: its kernel is a softmax too.
        r"conv_kernel_layer|conv_out_layer|key_conv_attn_layer\.(?:pointwise|bias)"
    ),
    "convnext": CONVNEXT,
    "convnextv2": [*DEPTHWISE, *other(r"grn(?:\.bias)?")],
    "cosmos3_edge_vision": other(r"patch_embedding"),
    "cpmant": [
        *block(ANYWHERE + r"ffn\.ffn\.", gate=r"w_in\.w_0", up=r"w_in\.w_1", down="w_out"),
        *attention(
            ANYWHERE + r"self_attention\.",
            q="project_q",
            k="project_k",
            v="project_v",
            o="attention_out",
        ),
    ],
    "ctrl": [
        *block(ANYWHERE + r"ffn\.", up="0", down="2"),
        *attention(ANYWHERE + r"multi_head_attention\.", q="Wq", k="Wk", v="Wv", o="dense"),
    ],
    "cvt": attention(
        ANYWHERE + r"attention\.attention\.",
        q="projection_query",
        k="projection_key",
        v="projection_value",
    ),
    "dbrx": other(r"experts\.mlp\.(?:w1|v1|w2)"),
    "deberta": attention(ANYWHERE + r"attention\.self\.", qkv="in_proj"),
    "decision_transformer": other(
        r"embed_(?:action|return|state)|predict_(?:return|state)|predict_action\.0"
    ),
    "deepseek_v4": [
        # One KV head is both K and V; the output's first half is a linear in groups of heads.
        *optional(r"self_attn\.(?:o_a_proj|o_b_proj)", r"compressor\.(?:gate_proj|kv_proj)"),
    ],
    "dinov3_convnext": CONVNEXT,
    "dpr": other(r"encode_proj"),
    "falcon_mamba": MAMBA,
    "flaubert": XLM,
    "flava": other(r"text_to_mm_projection|image_to_mm_projection"),
    "florence2": [
        *attention(ANYWHERE + r"window_attn\.", qkv="qkv", o="proj"),
        *optional(r"channel_attn\.(?:qkv|proj)"),  # scores between channels
    ],
    "fnet": other(r"embeddings\.projection"),
    "focalnet": other(r"modulation\.projection_(?:in|out|context)"),
    "gemma3n_text": other(r"altup(?:_\w*projections)?\.\w+|laurel\.linear_(?:left|right)"),
    "gemma4_audio": [
        *block(
            ANYWHERE + r"feed_forward[12]\.", up=r"ffw_layer_1\.linear", down=r"ffw_layer_2\.linear"
        ),
        *attention(ANYWHERE + r"self_attn\.", o=r"post\.linear"),
        *other(r"lconv1d\.linear_(?:start|end)\.linear", r"input_proj_linear|output_proj"),
    ],
    "glpn": DEPTHWISE,
    "granite_docling_vision": [
        *other(r"connector\.coarse\.projection"),
        *optional(r"connector\.mlp_fc[12]"),
    ],
    "grounding-dino": GROUNDING,
    "groupvit": [
        # Tokens are assigned by a hard Gumbel softmax; the first MLP mixes tokens.
        *optional(
            r"assign\.(?:q_proj|k_proj|v_proj|proj)",
            r"mlp_inter\.fc[12]",
            r"group_projector\.\d+\.fc[12]",
            r"(?:text|visual)_projection\.\d+",
        ),
        *block(ANYWHERE + r"mlp_channels\.", up="fc1", down="fc2"),
    ],
    "hiera": other(r"layers\.\d+\.proj"),
    "higgs_audio_v2": [
        *optional(r"audio_mlp\.(?:gate_proj|up_proj|down_proj)"),  # runs for audio tokens only
    ],
    "hunyuan_vl_vision": optional(r"patch_merger\.(?:mlp|proj_out)"),
    "inkling2_text": other(
        r"[kv]_sconv\.(?:weight_proj|static_weight)", r"(?:attention|mlp)_input\.query"
    ),
    "jetmoe": [
        *other(r"(?:mlp|experts)\.(?:input|output)_linear"),
    ],
    "kyutai_speech_to_text": MOSHI,
    "layoutlmv3": other(r"encoder\.rel_pos_(?:x_|y_)?bias"),
    "led": attention(
        ANYWHERE + r"longformer_self_attn\.",
        q="query|query_global",
        k="key|key_global",
        v="value|value_global",
    ),
    "levit": [  # every linear is followed by a batch norm, also the first of a block
        *optional(r"linear_(?:up|down)\.linear"),
        *attention(
            qkv=r"queries_keys_values\.linear",
            kv=r"keys_values\.linear",
            q=r"queries\.linear",
            o=r"projection\.linear",
        ),
    ],
    "lilt": [
        # A second stream of half the width; its scores are added to the first's.
        *block(up=r"layout_intermediate\.dense", down=r"(?<!attention\.)layout_output\.dense"),
        *optional(r"layout_(?:query|key)"),
        *attention(v="layout_value", o=r"attention\.layout_output\.dense"),
        *other(r"box_linear_embeddings"),
    ],
    "llama4": [
        *optional(r"vision_adapter\.mlp\.fc[12]"),
        *other(r"patch_embedding\.linear|positional_embedding_vlm"),
    ],
    "longcat_flash": [
        *block(ANYWHERE + r"mlps\.\d+\.", gate="gate_proj", up="up_proj", down="down_proj"),
        *attention(ANYWHERE + r"self_attn\.\d+\.", q="q_b_proj", kv="kv_b_proj", o="o_proj"),
    ],
    "lxmert": [
        *block(ANYWHERE, up=r"lang_inter\.dense", down=r"lang_output\.dense"),
        *block(ANYWHERE, up=r"visn_inter\.dense", down=r"visn_output\.dense"),
        *attention(
            ANYWHERE + r"(?:lang_self_att|visn_self_att)\.self\.", q="query", k="key", v="value"
        ),
        *attention(ANYWHERE + r"visual_attention\.att\.", q="query", k="key", v="value"),
        *attention(
            ANYWHERE + r"(?:lang_self_att|visn_self_att|visual_attention)\.", o=r"output\.dense"
        ),
        *other(r"visn_fc\.(?:box_fc|visn_fc)"),
    ],
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "markuplm": other(r"xpath_embeddings\.\w+"),
    "mgp-str": [
        # Tokens pooled by learned scores, with grouped convolutions.
        *optional(r"\w+_a3_module\.(?:feat|tokenLearner\.\d+)"),
        *other(r"(?:bpe|char|wp)_head"),
    ],
    "mimi_encoder": BYTES,
    "mm-grounding-dino": GROUNDING,
    "mobilebert": other(
        r"bottleneck\.(?:input|attention)\.dense|output\.bottleneck\.dense",
        r"embedding_transformation",
    ),
    "mobilenet_v2": MOBILE_NET,
    "mobilevit": MOBILE_NET,
    "mobilevitv2": [
        *MOBILE_NET,
        *block(ANYWHERE + r"ffn\.", up=r"conv1\.convolution", down=r"conv2\.convolution"),
        *optional(r"attention\.(?:qkv_proj|out_proj)\.convolution"),  # context scores, no QK^T
    ],
    "moonshine": block(r"(?:.*\.)?decoder\..*mlp\.", gate_up="fc1", down="fc2"),
    "moonshine_streaming": block(r"(?:.*\.)?decoder\..*mlp\.", gate_up="fc1", down="fc2"),
    "moshi": MOSHI,
    "mra": NO_SOFTMAX,
    "muse_spark_text": other(r"mlp\.(?:pre|post)_expert_proj"),
    "nemotron_h": [
        *block(ANYWHERE + r"mixer\.", up="up_proj", down="down_proj"),
        *attention(ANYWHERE + r"mixer\.", q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
        *MAMBA,
    ],
    "nystromformer": NO_SOFTMAX,
    "ovis2": other(r"head_linear"),
    "patchtsmixer": [
        *block(ANYWHERE + r"feature_mixer\.mlp\.", up="fc1", down="fc2"),
        *optional(r"(?:patch_mixer|channel_feature_mixer)\.mlp\.fc[12]"),  # mixes tokens
        *other(r"gating_block\.attn_layer|encoder\.patcher"),
    ],
    "patchtst": block(ANYWHERE + r"ff\.", up="0", down="3"),
    "pocket_tts_audio_tokenizer_encoder": BYTES,
    "perceiver": [
        *optional(r"encoder\.cross_attention\.attention\.self\.query"),  # of constants
        *other(r"embeddings\.latents"),
    ],
    "pocket_tts_audio_tokenizer": [*BYTES, *other(r"latent_proj")],
    "poolformer": block(ANYWHERE + r"output\.", up="conv1", down="conv2"),
    "pp_lcnet_v4": PPLCNET,
    "pp_ocrv6_small_rec": PPLCNET,
    "pp_ocrv6_tiny_rec": PPLCNET,
    "prophetnet": [
        *block(ANYWHERE + r"feed_forward\.", up="intermediate", down="output"),
        *optional(r"relative_pos_embeddings"),
    ],
    "pvt_v2": DEPTHWISE,
    "recurrent_gemma": [
        *attention(ANYWHERE + r"temporal_block\.", q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
        *other(r"temporal_block\.linear_(?:x|y|out)", r"rg_lru\.\w+"),
    ],
    "reformer": [
        *block(ANYWHERE + r"feed_forward\.", up=r"dense\.dense", down=r"output\.dense"),
        *optional(r"layers\.\d*[13579]\.attention\.output\.dense"),  # of hashed attention
    ],
    "regnet": [*PLAIN_CONV, *optional(r"layer\.\d+\.attention\.\d+")],
    "resnet": PLAIN_CONV,
    "roc_bert": other(r"map_inputs_layer"),
    "rwkv": [
        *block(ANYWHERE + r"feed_forward\.", up="key", down="value"),
        *other(r"feed_forward\.receptance"),
        *NO_SOFTMAX,
    ],
    "sam": SAM,
    "sam_hq": SAM,
    "sam3_lite_text_text_model": other(r"projection"),
    "sam3_vision_model": SAM_NECK,
    "sam_hq_vision_model": SAM_NECK,
    "sam_vision_model": SAM_NECK,
    "segformer": DEPTHWISE,
    "siglip": other(r"text_model\.head|patch_embedding"),
    "siglip2": other(r"text_model\.head|patch_embedding"),
    "siglip2_vision_model": other(r"patch_embedding"),
    "squeezebert": [
        *block(up=r"intermediate\.conv1d", down=r"output\.conv1d"),
        *attention(o=r"post_attention\.conv1d"),
    ],
    "swiftformer": [
        *block(ANYWHERE + r"linear\.", up="fc1", down="fc2"),
        *block(up="point_wise_conv1", down="point_wise_conv2"),
        *optional(r"attn\.(?:to_query|to_key|proj|final|w_g)"),  # additive attention
    ],
    "timesfm": [*block(MLP, up="gate_proj", down="down_proj"), *TIMESFM],
    "timesfm2_5": TIMESFM,
    "timesformer": [
        *attention(ANYWHERE + r"temporal_attention\.", qkv=r"attention\.qkv", o=r"output\.dense"),
        *other(r"temporal_dense|time_embeddings"),
    ],
    "videoprism": [
        # The pooling head's query is a parameter.
        *optional(r"head\.q_proj"),
        *attention(ANYWHERE + r"head\.", k="k_proj", v="v_proj", o="o_proj"),
        *other(r"cls_emb|pooling_attention_query"),
    ],
    "videoprism_vision_model": other(r"(?:spatial|temporal)_embeddings\.position_embeddings"),
    "vits": other(
        r"conv_dds\.convs_pointwise\.\d+|conv_pre|conv_proj|conv_post|text_encoder\.project",
        r"log_scale|translate",
    ),
    "vjepa2": other(r"predictor_embeddings|predictor\.proj"),
    "xclip": [
        *block(ANYWHERE + r"decoder\.\d+\.mlp\.", up="0", down="3"),
        *attention(ANYWHERE + r"message_attn\.", q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
        *other(r"message_fc|prompts_visual_projection"),
    ],
    "xlm": XLM,
    "xlnet": [
        *block(ANYWHERE + r"ff\.", up="layer_1", down="layer_2"),
        *attention(ANYWHERE + r"rel_attn\.", q="q", k="k", v="v", o="o"),
        *optional(r"rel_attn\.r"),
        *other(r"rel_attn\.r_[rws]_bias|seg_embed"),
    ],
    "yoso": NO_SOFTMAX,
    "zamba": [
        *optional(r"mamba\.(?:x_proj_weight|dt_proj_weight)"),
        *other(r"mamba\.(?:D|dt_proj_bias)|layers\.\d+\.linear"),
    ],
    "zaya": [
        # Q and K are mixed over time and with each other before the scores.
        *optional(r"qkv_proj\.(?:q_proj|k_proj)"),
        *attention(ANYWHERE + r"qkv_proj\.", v="v_proj_current|v_proj_delayed"),
        *other(r"gate\.(?:down_proj|router_mlp\.(?:fc1|fc2|out_proj))"),
    ],
}


# --- reading a model ----------------------------------------------------------------------------


class UsedParameters(TorchFunctionMode):
    """Collects the parameters that calls made inside read."""

    VIEWS = tuple(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "data"))

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__" or func in self.VIEWS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter):
                    self.seen.add(id(leaf))
        return func(*args, **kwargs)


def used(model: nn.Module, call: Mapping[str, Any]) -> set[str]:
    """The names of the parameters that this call reads."""
    with torch.no_grad(), UsedParameters() as mode:
        model(**call)
    return {name for name, p in model.named_parameters() if id(p) in mode.seen}


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each parameter that could be the weight of a linear map, with its module."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.modules.conv._ConvNd) and any(k > 1 for k in module.kernel_size):
            continue
        for name, p in module.named_parameters(prefix, recurse=False):
            if p.is_floating_point() and p.ndim >= 2:
                yield name, module


def holders(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that this parameter is in, from the whole model inwards."""
    module = model
    yield module
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        yield module


def model_types(model: nn.Module, name: str) -> list[str]:
    """The type of the innermost pretrained model that holds this parameter, then of the whole."""
    found = [m.config.model_type for m in holders(model, name) if isinstance(m, PreTrainedModel)]
    return [found[-1], found[0]] if found else []


def rules_of(model: nn.Module, name: str) -> list[tuple[Rule, str]]:
    """The rules that classify this weight, each with the place of its block."""
    rule = Rule("optional", "", re.compile(".*"))
    if any(type(m).__name__ in OTHER_ATTENTION for m in holders(model, name)):
        return [(rule, "")]
    for model_type in model_types(model, name):
        matches = matching(SPECIAL.get(model_type, ()), name)
        if matches:
            return matches
    return matching(GENERAL, name)


def matching(rules: Iterable[Rule], name: str) -> list[tuple[Rule, str]]:
    return [(rule, at) for rule in rules if (at := rule.match(name)) is not None]


def truth_of(model: nn.Module, call: Mapping[str, Any]) -> Truth:
    """The truth about the weights that this call reads."""
    names = used(model, call)
    blocks: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    projections = {}
    free = set()
    for name, _ in matrices(model):
        if name not in names:
            continue
        for rule, at in rules_of(model, name)[:1]:
            if rule.kind == "block":
                blocks[at, *rule.group][rule.role] = name
            elif rule.kind == "projection":
                projections[name] = rule.role
            elif rule.kind == "optional":
                free.add(name)
    return Truth(tuple(blocks.values()), projections, frozenset(free))


# --- self-check ---------------------------------------------------------------------------------


def whole(roles: Iterable[str]) -> bool:
    """Whether a block with these roles lacks nothing."""
    return set(roles) in ({"up", "down"}, {"gate", "up", "down"}, {"gate_up", "down"})


def problems(model: nn.Module, call: Mapping[str, Any]) -> list[str]:
    """What is wrong with the truth about this model."""
    found = []
    names = used(model, call)
    for name, module in matrices(model):
        if name not in names:
            continue
        rules = rules_of(model, name)
        if len(rules) != 1:
            kind = type(module).__name__
            shape = tuple(model.get_parameter(name).shape)
            kinds = ", ".join(f"{r.kind} {r.role}" for r, _ in rules) or "no rule"
            found.append(f"{name} {shape} {kind} {model_types(model, name)[0]}: {kinds}")
    blocks = truth_of(model, call).blocks
    return found + [f"block with {dict(roles)}" for roles in blocks if not whole(roles)]


def main() -> None:
    from universe import hf

    chosen = sys.argv[1:]
    blocks = projections = bad = 0
    for case in hf.cases():
        if chosen and case.name.removeprefix("hf/") not in chosen:
            continue
        model, call = case.make()
        assert isinstance(call, dict)
        truth = case.truth(model)
        blocks += len(truth.blocks)
        projections += len(truth.projections)
        roles: dict[str, int] = defaultdict(int)
        for role in truth.projections.values():
            roles[role] += 1
        print(f"{case.name}: {len(truth.blocks)} blocks, {dict(roles)}")
        for text in problems(model, call):
            bad += 1
            print("   ", text)
    print(f"{blocks} blocks, {projections} projections, {bad} problems")


if __name__ == "__main__":
    main()
