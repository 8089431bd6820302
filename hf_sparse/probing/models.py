"""Small random models whose attention matters enough for a mistake in it to show in the logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from hf_sparse.patching.support import text_part
from hf_sparse.probing.configs import SPECIAL, shrink


def small_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The causal language model of the class of `config`, shrunk, with random weights, in evaluation mode.

    It attends eagerly, which honours everything that a model asks of its attention; SDPA leaves out soft caps.
    """
    torch.manual_seed(seed)
    kind = class_of(config)
    model: PreTrainedModel = kind._from_config(shrink(text_part(config, kind)), attn_implementation="eager")
    with torch.no_grad():
        for name, module in model.named_modules():
            _spread(name, module)
    model = _reads_text(model)
    model.train(False)
    return model


def class_of(config: PreTrainedConfig) -> Any:
    """The class of the causal language model, or of the model of images and text, that a configuration is for."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if (kind := mapping.get(type(config), None)) is not None:
            return kind
    raise ValueError(f"{type(config).__name__} is not the configuration of a causal language model")


def _reads_text(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or the language model inside of one that takes no text without an image."""
    pixels = inspect.signature(type(model).forward).parameters.get("pixel_values")
    inner = getattr(model, "language_model", None)
    if pixels is not None and pixels.default is pixels.empty and isinstance(inner, PreTrainedModel):
        return inner
    return model


def _spread(name: str, module: nn.Module) -> None:
    """Weights that keep the variance of what they are given: as they come, layers hardly change anything."""
    if isinstance(module, nn.Linear):
        module.weight.normal_(std=module.weight.shape[1] ** -0.5)
    elif isinstance(module, Conv1D):
        module.weight.normal_(std=module.weight.shape[0] ** -0.5)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_()
    elif "experts" in name:
        for weights in module.parameters(recurse=False):
            if weights.dim() == 3:
                weights.normal_(std=max(weights.shape[1:]) ** -0.5)


def text(length: int, seed: int = 1) -> Tensor:
    """Random tokens `(length,)`, none of them special."""
    return torch.randint(1, SPECIAL, (length,), generator=torch.Generator().manual_seed(seed))


def positions(mask: Tensor) -> Tensor:
    """Position ids `(batch, length)` that count what a mask shows alone, as `generate` makes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
