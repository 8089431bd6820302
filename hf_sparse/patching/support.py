"""`inspect`: can a model be patched, which of its layers, and if not, why. Found by looking, not from a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_sparse.attention import HARMLESS, HONOURED
from hf_sparse.errors import UserError, first_line
from hf_sparse.patching.source import interface_call, names_in, source_of

_MASKS = ("create_causal_mask", "create_masks_for_generate", "create_sliding_window_causal_mask")
_WINDOWS = ("create_masks_for_generate", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
_TWO_WAY = "create_bidirectional"
# By these, attention is told which keys to look at.
_CHOSEN_KEYS = {"indices", "block_indices"}


@dataclass(frozen=True)
class LayerSupport:
    """An attention layer that can be patched.

    Attributes:
        layer: Index of the layer.
        name: Name of the attention module in the model.
        heads: Query heads.
        kv_heads: Key heads.
        sliding_window: Keys that a query sees at most, those before it or in its chunk; `None` for full attention.
    """

    layer: int
    name: str
    heads: int
    kv_heads: int
    sliding_window: int | None


@dataclass(frozen=True)
class SupportReport:
    """Whether a model can be patched: `str()` says it in words.

    Attributes:
        architecture: Class of the model.
        supported: Whether `patch` takes it.
        reasons: Why not; empty if supported.
        layers: The attention layers found.
    """

    architecture: str
    supported: bool
    reasons: tuple[str, ...]
    layers: tuple[LayerSupport, ...]

    @property
    def hybrid(self) -> bool:
        """Whether some layers, but not all, have a sliding window."""
        return len({layer.sliding_window is None for layer in self.layers}) == 2

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """The layers of a hybrid model that have a sliding window; none of another model."""
        return tuple(layer.layer for layer in self.layers if self.hybrid and layer.sliding_window is not None)

    def default_dense_reasons(self) -> dict[int, str]:
        """Layer -> why it stays dense by default: it is the first one, or has a sliding window in a hybrid model."""
        reasons = {min(layer.layer for layer in self.layers): "first layer"}
        return reasons | dict.fromkeys(self.sliding_layers, "sliding window")

    def __str__(self) -> str:
        if not self.supported:
            return f"{self.architecture} cannot be patched: {'; '.join(self.reasons)}"
        windows = [layer.sliding_window for layer in self.layers if layer.sliding_window is not None]
        kinds = f"{len(self.layers) - len(windows)} full attention"
        if windows:
            kinds += f", {len(windows)} with a sliding window of {max(windows)}"
        heads = ", ".join(sorted({f"{layer.heads}/{layer.kv_heads}" for layer in self.layers}))
        return (
            f"{self.architecture} can be patched: {len(self.layers)} attention layers ({kinds}), "
            f"query/key heads {heads}"
        )


def inspect(model: PreTrainedModel | PreTrainedConfig | str) -> SupportReport:
    """Find out whether a model can be patched, without its weights.

    Args:
        model: A model, a configuration, or the name of one: a Hub id, a folder, or a `.gguf` file.

    Raises:
        UserError: (a `ValueError`) If `model` is a name under which no configuration can be found.
        TypeError: If `model` is none of these.
    """
    if isinstance(model, str):
        model = _config_of(model)
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            model = _without_weights(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, a configuration or a name; got {type(model).__name__}")
    return _inspect_model(model)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration, or the model without a head if it has none."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    part = config if kind is None else text_part(config, kind)
    if part is not config and not isinstance(config, kind.config_class):
        return kind._from_config(part)  # type: ignore[no-any-return]
    try:
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return, no-untyped-call]
    except ValueError:
        return AutoModel.from_config(config)  # type: ignore[no-any-return, no-untyped-call]


def text_part(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> PreTrainedConfig:
    """The configuration inside `config`, or itself, that models of the class `kind` take."""
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
    return next((part for part in parts if isinstance(part, kind.config_class)), config)  # type: ignore[arg-type]


def _config_of(name: str) -> PreTrainedConfig:
    path = Path(name)
    try:
        if path.suffix == ".gguf":
            config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name!r} is not a model: pass a Hub id, a folder that holds a config.json or a .gguf file "
            f"({first_line(error)})"
        ) from error
    return config


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` that call transformers' attention interface, with their names.

    Of a model that also sees or hears, those of its text tower alone: the others have configurations of another class.
    """
    config: Any = getattr(model, "config", None)
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)] if config else []
    text = type(config.get_text_config(decoder=True)) if parts else None
    inner = (module for module in model.modules() if not isinstance(module, PreTrainedModel))
    if text not in {type(getattr(module, "config", None)) for module in inner}:
        text = None
    for name, module in model.named_modules():
        kind: Any = type(module)
        if interface_call(kind) is not None and (text is None or type(module.config) is text):
            yield name, module


def _inspect_model(model: PreTrainedModel) -> SupportReport:
    found = list(attention_modules(model))
    reasons = _why_not(model, [module for _, module in found])
    windows = names_in(model, _WINDOWS)
    layers = [] if reasons else [_layer(name, module, i, windows) for i, (name, module) in enumerate(found)]
    indices = {layer.layer for layer in layers}
    if len(indices) < len(layers) or min(indices, default=0) < 0:  # Layers that share weights need not have one.
        layers = [replace(layer, layer=i) for i, layer in enumerate(layers)]
    return SupportReport(type(model).__name__, not reasons, tuple(reasons), tuple(layers))


def _why_not(model: PreTrainedModel, found: list[nn.Module]) -> list[str]:
    """Why a model with these attention modules cannot be patched."""
    if model.config.is_encoder_decoder:
        return ["it is an encoder-decoder model; only decoder-only causal language models can be patched"]
    if not found and not any("attention" in type(module).__name__.lower() for module in model.modules()):
        return ["it has no attention; only causal language models that attend to keys can be patched"]
    if not found or not all(
        _can_be_set(model, module) for module in {type(module): module for module in found}.values()
    ):
        return [
            "its attention does not go through transformers' AttentionInterface; keep it dense, or use a model whose "
            "modelling code does (Llama, Mistral, Qwen, Gemma, Phi, OLMo, gpt-oss, GPT-NeoX, GPT-2 and most others)"
        ]
    own: Any = type(model)
    kinds: dict[Any, None] = dict.fromkeys(type(module) for module in found)
    if reasons := [reason for kind in kinds for reason in _why_not_called_so(kind)]:
        return reasons
    if not all(_is_causal(module) for module in found) or _TWO_WAY in source_of(own):
        return [
            "it has attention that is not causal (an encoder, or cross-attention); only decoder-only causal language "
            "models can be patched"
        ]
    if not names_in(model, _MASKS):
        return ["it does not build its masks through transformers' mask interface, so visibility is not known"]
    return []


def _why_not_called_so(kind: Any) -> Iterator[str]:
    """What in the way that attention modules of a class call the interface is in the way."""
    call = interface_call(kind)
    if call is None:
        return
    if chosen := sorted(call.arguments & _CHOSEN_KEYS):
        yield f"{kind.__name__} chooses keys itself (it passes {', '.join(chosen)}): it is sparse without a patch"
    elif unknown := sorted(call.arguments - HONOURED - HARMLESS):
        yield f"{kind.__name__} passes {', '.join(unknown)} to its attention, which is not understood"
    elif call.changes_mask:
        yield f"{kind.__name__} changes the mask that it is given, as sparse attention of its own does"


def _can_be_set(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether the model that holds an attention module, as a part of `model` or itself, lets its attention be set."""
    around = (m for m in model.modules() if isinstance(m, PreTrainedModel) and any(x is module for x in m.modules()))
    return list(around)[-1]._can_set_attn_implementation()


def _layer(name: str, module: nn.Module, position: int, has_windows: bool) -> LayerSupport:
    config: Any = module.config
    layer = getattr(module, "layer_idx", None)
    layer = position if layer is None else layer
    heads = config.num_attention_heads
    # Layers may differ in their key heads, which the configuration then does not say for all of them.
    groups = getattr(module, "num_key_value_groups", None)
    kv_heads = heads // groups if groups else getattr(config, "num_key_value_heads", None) or heads
    return LayerSupport(layer, name, heads, kv_heads, _window(module, layer) if has_windows else None)


def _window(module: Any, layer: int) -> int | None:
    config = module.config
    types = getattr(config, "layer_types", None)
    kind = types[layer] if types is not None and 0 <= layer < len(types) else None
    if kind is not None and kind.startswith("chunked"):
        window = getattr(config, "attention_chunk_size", None)
    elif kind is not None and ("sliding" not in kind or kind.startswith("reference")):
        window = None
    else:
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return window if isinstance(window, int) and not isinstance(window, bool) else None


def _is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False)) and not getattr(module, "is_cross_attention", False)
