"""`inspect`: can a model be patched, which of its layers, and if not, why. Found by looking, not from a list."""

from __future__ import annotations

import ast
import functools
import inspect as python_inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_sparse.attention import HARMLESS, HONOURED
from hf_sparse.errors import UserError, first_line

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Its fifth argument is the mask: after the module, queries, keys and values.
_MASK = 4
_MASKS = ("create_causal_mask", "create_masks_for_generate", "create_sliding_window_causal_mask")


@dataclass(frozen=True)
class LayerSupport:
    """An attention layer that can be patched.

    Attributes:
        layer: Index of the layer.
        name: Name of the attention module in the model.
        heads: Query heads.
        kv_heads: Key heads.
        sliding_window: Keys that a query sees at most, or `None` for full attention.
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
            try:
                model = AutoModelForCausalLM.from_config(model)  # type: ignore[no-untyped-call]
            except ValueError:
                model = AutoModel.from_config(model)  # type: ignore[no-untyped-call]
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, a configuration or a name; got {type(model).__name__}")
    return _inspect_model(model)


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
    """The modules of `model` that call transformers' attention interface, with their names."""
    for name, module in model.named_modules():
        kind: Any = type(module)
        if _interface_call(kind) is not None:
            yield name, module


def _inspect_model(model: PreTrainedModel) -> SupportReport:
    architecture = type(model).__name__
    config = model.config
    found = list(attention_modules(model))
    reasons: list[str] = []
    if config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder model; only decoder-only causal language models can be patched")
    elif not found or not model._can_set_attn_implementation():
        reasons.append(
            "its attention does not go through transformers' AttentionInterface; keep it dense, or use a model whose "
            "modelling code does (Llama, Mistral, Qwen, Gemma, Phi, OLMo, gpt-oss, GPT-NeoX, GPT-2 and most others)"
        )
    elif not all(_is_causal(module) for _, module in found):
        reasons.append(
            "it has attention that is not causal (an encoder, or cross-attention); only decoder-only causal language "
            "models can be patched"
        )
    elif not _builds_masks(model):
        reasons.append("it does not build its masks through transformers' mask interface, so visibility is not known")
    if not reasons:
        kinds: dict[Any, None] = dict.fromkeys(type(module) for _, module in found)
        for kind in kinds:
            call = _interface_call(kind)
            unknown = sorted(call.arguments - HONOURED - HARMLESS) if call else []
            if unknown:
                reasons.append(f"{kind.__name__} passes {', '.join(unknown)} to its attention, which is not understood")
            elif call and call.changes_mask:
                reasons.append(
                    f"{kind.__name__} changes the mask that it is given, as sparse attention of its own does"
                )
    layers = [] if reasons else [_layer(name, module, i) for i, (name, module) in enumerate(found)]
    if len({layer.layer for layer in layers}) < len(layers):
        layers, reasons = [], ["several of its attention modules share a layer index"]
    return SupportReport(architecture, not reasons, tuple(reasons), tuple(layers))


def _layer(name: str, module: nn.Module, position: int) -> LayerSupport:
    config: Any = module.config
    layer = getattr(module, "layer_idx", None)
    layer = position if layer is None else layer
    heads = config.num_attention_heads
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    types = getattr(config, "layer_types", None)
    if types is not None and layer < len(types) and "sliding" not in types[layer] and "chunked" not in types[layer]:
        window = None
    if isinstance(window, bool) or not isinstance(window, int):
        window = None
    # Layers may differ in their key heads, which the configuration then does not say for all of them.
    groups = getattr(module, "num_key_value_groups", None)
    kv_heads = heads // groups if groups else getattr(config, "num_key_value_heads", None) or heads
    return LayerSupport(layer, name, heads, kv_heads, window)


def _is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False)) and not getattr(module, "is_cross_attention", False)


def _builds_masks(model: PreTrainedModel) -> bool:
    # A class may only inherit the forward that builds the masks, and wrappers leave it to the model inside.
    classes = {
        base for module in model.modules() if isinstance(module, PreTrainedModel) for base in type(module).__mro__
    }
    sources = {
        base.__module__
        for base in classes
        if base.__module__.startswith(("transformers.models", "transformers_modules"))
    }
    sources |= {type(model).__module__}
    return any(name in _source(source) for source in sources for name in _MASKS)


@functools.cache
def _source(module: str) -> str:
    try:
        return python_inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return ""


@dataclass(frozen=True)
class _InterfaceCall:
    """How a `forward` calls the attention interface.

    Attributes:
        arguments: Keyword arguments that it passes.
        changes_mask: Whether it makes another mask of the mask that it was given, and passes that.
    """

    arguments: frozenset[str]
    changes_mask: bool


@functools.cache
def _interface_call(kind: Any) -> _InterfaceCall | None:
    """How `kind.forward` calls the attention interface; `None` if it does not call it."""
    try:
        tree = ast.parse(textwrap.dedent(python_inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    functions = {name for name, value in _assignments(tree) if _INTERFACE in ast.dump(value)}
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions
    ]
    if not calls:
        return None
    masks = set().union(*(_names(argument) for call in calls for argument in call.args[_MASK : _MASK + 1]))
    changed = any(name in masks and name in _names(value) for name, value in _assignments(tree))
    arguments = frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None)
    return _InterfaceCall(arguments, changed)


def _assignments(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Each name that a value is given to, with the value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield target.id, node.value


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
