"""Tiny random causal models of every architecture under test, with attention peaky enough for errors to show.

A freshly initialised model attends almost uniformly and its layers hardly move the residual stream, so that a wrong
mask changes the logits by rounding error alone. Here every matrix keeps the variance of its input, and queries are
scaled until attention scores have a standard deviation of about 2.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB = 97
PAD = 0
LAYERS = 2
WINDOW = 12  # of the sliding-window layers
LONGEST = 256

_SHARPNESS = 2.0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

# name -> (configuration class, arguments beyond the common ones)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": WINDOW}),
    "qwen3": ("Qwen3Config", _GROUPED),
    "gemma2": (
        "Gemma2Config",
        {**_GROUPED, **_HYBRID, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, **_HYBRID, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2}),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_GROUPED,
            **_HYBRID,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 2}),
}

# Models whose attention does not go through the attention interface, or is not causal self-attention alone.
_UNSUPPORTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 32, "n_layers": 1, "n_heads": 2}),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16},
    ),
}

ARCHITECTURES = tuple(_CONFIGS)
UNSUPPORTED = tuple(_UNSUPPORTED)
HYBRID = ("gemma2", "gemma3", "gpt_oss")
SLIDING = ("mistral", *HYBRID)


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """A new configuration of the architecture `name`."""
    kind, extra = _CONFIGS[name]
    out: PreTrainedConfig = getattr(transformers, kind)(**{**_COMMON, **extra, **overrides})
    return out


def model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A new model of the architecture `name`, the same weights for the same seed, in evaluation mode."""
    torch.manual_seed(seed)
    built = transformers.AutoModelForCausalLM.from_config(config(name, **overrides), **attention(name))
    with torch.no_grad():
        for module in built.modules():
            _spread(module)
        for module in built.modules():
            _sharpen(module)
    return built.to(dtype).eval()


def attention(name: str) -> dict[str, str]:
    """What to make or load a model with: SDPA knows no soft cap, and transformers 5.17 takes it all the same."""
    return {"attn_implementation": "eager"} if name == "gemma2" else {}


def unsupported(name: str) -> PreTrainedModel:
    """A new model that cannot be patched."""
    kind, architecture, extra = _UNSUPPORTED[name]
    torch.manual_seed(0)
    built: PreTrainedModel = getattr(transformers, architecture)(getattr(transformers, kind)(vocab_size=VOCAB, **extra))
    return built.eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids `(batch, length)` without the pad token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def padded(lengths: list[int], side: str, extra: int = 0, seed: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A padded batch: `(input_ids, attention_mask, the sequences without padding)`.

    `extra` pads more than the longest sequence needs.
    """
    width = max(lengths) + extra
    rows = [tokens(1, length, seed + i)[0] for i, length in enumerate(lengths)]
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask, rows


def positions(mask: Tensor) -> Tensor:
    """Position ids that count real tokens alone, as `generate` makes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _spread(module: nn.Module) -> None:
    if isinstance(module, Conv1D):
        module.weight.normal_(std=module.weight.shape[0] ** -0.5)
        module.bias.normal_(std=0.1)
    elif isinstance(module, nn.Linear):
        module.weight.normal_(std=module.weight.shape[1] ** -0.5)
        if module.bias is not None:
            module.bias.normal_(std=0.1)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_()
    elif type(module).__name__ == "GptOssExperts":
        for parameter in module.parameters(recurse=False):
            parameter.normal_(std=parameter.shape[-2] ** -0.5 if parameter.dim() == 3 else 0.1)
    elif type(module).__name__ == "GptOssTopKRouter":
        for parameter in module.parameters(recurse=False):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _sharpen(module: Any) -> None:
    """Scale the queries, wherever the architecture makes them; give attention sinks something to do."""
    if (sinks := getattr(module, "sinks", None)) is not None:
        sinks.normal_(mean=1.0)
    if (norm := getattr(module, "q_norm", None)) is not None:
        offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0  # Gemma multiplies by 1 + weight
        norm.weight.copy_((norm.weight + offset) * _SHARPNESS - offset)
    elif (projection := getattr(module, "q_proj", None)) is not None:
        projection.weight.mul_(_SHARPNESS)
    elif (projection := getattr(module, "qkv_proj", None)) is not None:
        projection.weight[: module.config.num_attention_heads * module.head_dim].mul_(_SHARPNESS)
    elif isinstance(projection := getattr(module, "c_attn", None), Conv1D):
        projection.weight[:, : module.embed_dim].mul_(_SHARPNESS)
    elif (projection := getattr(module, "query_key_value", None)) is not None:
        projection.weight.view(module.config.num_attention_heads, 3, -1, projection.in_features)[:, 0].mul_(_SHARPNESS)


@torch.no_grad()
def logits(built: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """One forward pass without a cache: logits `(batch, length, vocab)`, float32.

    `mask` is a padding mask `(batch, length)`, or a 4-D mask.
    """
    if mask is not None and mask.dim() == 2:
        kwargs.setdefault("position_ids", positions(mask))
    out: Any = built(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs)
    result: Tensor = out.logits.float()
    return result
