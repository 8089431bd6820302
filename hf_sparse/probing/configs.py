"""Small configurations of any architecture, made from a large one by the names of its fields."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, SiglipVisionConfig

VOCAB = 128
"""Tokens of a small model. Those from `SPECIAL` on stand for images, ends of texts and the like."""

SPECIAL = 96

WINDOW = 12
"""Keys that a query of a sliding or chunked layer sees at most."""

_HEADS, _KV_HEADS, _HEAD_DIM, _HIDDEN = 4, 2, 16, 64

# Numbers of layers to try, until a small model has every kind of layer that the large one has.
_LAYERS = (2, 3, 4, 6, 8)
_LAYER_COUNT = re.compile(r"num_((hidden|decoder|encoder)_)?layers|n_layers?|(en|de)coder_layers|depth|num_blocks")

# Name of a field -> its value, if that is smaller: the first pattern that matches the whole name.
_SIZES = tuple(
    (re.compile(names), size)
    for names, size in (
        (r".*vocab_size.*|.*_vocab", VOCAB),
        (r"max_position_embeddings|n_positions|n_ctx|max_(seq_len|target_positions)|model_max_length", 1024),
        (r".*sliding_window(_size)?|(local_)?attention(_chunk|_window)?(_size)?|window_size|keep_window_size", WINDOW),
        (r".*num_(key_value|kv)_heads.*|num_query_groups|linear_num_key_heads", _KV_HEADS),
        (r".*num_(attention_)?heads.*|n_heads?|.*attention_heads|linear_num_value_heads", _HEADS),
        (r"n_group|num_expert_group", 2),
        (r"n_groups|topk_group|first_k_dense_replace|mamba_n_groups", 1),
        (r"index_topk", 8),
        (r".*num_experts_per_tok(en)?|moe_topk|moe_k|.*top_?k.*", 2),
        (r".*num(_local|_routed)?_experts|n_routed_experts|zero_expert_num|index_n_heads|num_codebooks", 4),
        (r"qk_(rope|nope)_head_dim|rotary_dim|.*rank|d_rel|.*chunk_size|rel_extent|.*state_size|mamba_d_state", 8),
        (r"hidden_size_per_layer_input|.*moe_.*intermediate_size|expert_ffn_hidden_size", 32),
        (r".*head_dim|.*head_size|d_head|d_kv|kv_channels|dim_head|mamba_d_head|mamba_headdim", _HEAD_DIM),
        (r".*hidden_size.*|.*(d_model|embd|emb_dim|embedding_size|embedding_dim|embed_dim|_width)", _HIDDEN),
        (r".*(intermediate_size|ffn_dim|d_ff|dff|dim_ff|n_inner|d_inner|mlp_dim|feed_forward_size).*", _HIDDEN),
    )
)
_TOKEN = re.compile(r".*token_(ids?|index)")

_MAMBA = {"mamba_n_heads": 8}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_ASSISTANT_TEXT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_ZAMBA = {
    "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    "num_hidden_layers": 6,
    "attention_hidden_size": 2 * _HIDDEN,
    "attention_head_dim": 2 * _HIDDEN // _HEADS,
    "num_key_value_heads": _HEADS,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Text towers that rotate by three positions, of time, height and width.
_THREE_AXES = (
    "cosmos3_edge_text",
    "ernie4_5_vl_moe_text",
    "glm4v_text",
    "glm_ocr_text",
    "hunyuan_vl_text",
    "paddleocr_vl_text",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
)

# What cannot be told from the names of fields: model type -> fields.
_EXTRA: dict[str, dict[str, Any]] = {
    # The tokens of images and sounds are the last ones of the vocabulary.
    "apertus1p5": {"image_token_offset": VOCAB - 16, "audio_token_offset": VOCAB - 8},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": SPECIAL}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    # Without these two, its attention raises an error.
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": _KV_HEADS, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    # Its layers in the middle run twice.
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": _SHARED | {"activation_sparsity_pattern": None},
    "gemma4_assistant": {
        "text_config": {
            **_ASSISTANT_TEXT,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _KV_HEADS,
            "head_dim": _HEAD_DIM,
            "global_head_dim": _HEAD_DIM,
            "hidden_size": _HIDDEN,
            "intermediate_size": _HIDDEN,
            "sliding_window": WINDOW,
            "vocab_size": VOCAB,
        }
    },
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {"index_kpool": 4, "index_topk": 8},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "hy_v4_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "num_hidden_layers": 2},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    # Its cache forgets what is outside of a window that its masks do not have.
    "moshi": {"sliding_window": 1024},
    "mistral4": {"head_dim": _HEAD_DIM},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": _KV_HEADS},
    "radio": {"video_temporal_patch_size": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": _HEAD_DIM,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 16), "max_position_embeddings": 256},
    "step3p5": {"sliding_window": WINDOW},
    "unlimited_ocr_text": {"num_key_value_heads": _HEADS},
    "wavtokenizer_encoder": {"codebook_dim": _HIDDEN, "codebook_size": 8},
    "xlstm": {"chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    **{name: {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}} for name in _THREE_AXES},
}

# Model type -> arguments without which its class makes no configuration.
_NEEDED: dict[str, dict[str, Any]] = {"gemma4_assistant": {"text_config": _ASSISTANT_TEXT}}


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the same class with a few small layers, every kind of layer of `config` among them.

    What is no size is as the class has it, whatever `config` says.

    Raises:
        Exception: whatever the class raises if its fields do not go together.
    """
    small = failed = None
    for layers in _LAYERS:
        try:
            small = type(config)(**_small_fields(config, layers))
        except Exception as error:
            failed = error
            continue
        if _kinds(small) >= _kinds(config):
            break
    if small is None:
        assert failed is not None
        raise failed
    # Some vision towers need a package of their own, timm: here, any will do.
    if type(getattr(small, "vision_config", None)).__name__ in ("Gemma3nVisionConfig", "TimmWrapperConfig"):
        vars(small)["vision_config"] = SiglipVisionConfig(
            hidden_size=_HIDDEN, intermediate_size=_HIDDEN, num_hidden_layers=1, num_attention_heads=_HEADS
        )
        vars(small.vision_config).update(
            vocab_size=8, vocab_offset=VOCAB - 8, rms_norm_eps=1e-6, model_args={"embed_dim": _HIDDEN}
        )
    return small


def default_config(architecture: str) -> PreTrainedConfig:
    """The configuration of a `model_type` as its class makes it, with no arguments but those that it needs."""
    kind: type[PreTrainedConfig] = CONFIG_MAPPING[architecture]
    return kind(**_NEEDED.get(architecture, {}))


def _kinds(config: PreTrainedConfig) -> set[str]:
    lists = (getattr(config, name, None) or [] for name in ("layer_types", "mlp_layer_types", "layers_block_type"))
    return {str(kind) for kinds in lists for kind in kinds}


def _small_fields(config: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """The fields that a configuration with so many layers is made of; all others are as its class has them."""
    found: dict[str, Any] = {}
    special = VOCAB
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = shrink(value)
        elif name == "pad_token_id":
            found[name] = 0
        elif _TOKEN.fullmatch(name) and value is not None:
            special -= 1
            found[name] = [special] if isinstance(value, list | tuple) else special
        elif name == "head_dim" and value is None:
            found[name] = _HEAD_DIM
        elif name == "attn_logit_softcapping" and value is not None:
            found[name] = 0.5  # about as large as scores are, so that it matters
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif _LAYER_COUNT.fullmatch(name):
            found[name] = layers
        else:
            size = next((size for pattern, size in _SIZES if pattern.fullmatch(name)), value)
            if size < value:
                found[name] = size
    if "kv_lora_rank" in vars(config):  # multi-head latent attention: every head has keys of its own
        found["num_key_value_heads"] = _HEADS
        found["head_dim"] = found.get("qk_rope_head_dim", 0)
    if "is_decoder" in vars(config):
        found["is_decoder"] = True
    return found | _EXTRA.get(config.model_type, {})
