"""Rotary position embeddings of a model: the frequencies of a layer, and running it with others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.errors import UserError
from hf_sparse.lab.bounds import FloatArray
from hf_sparse.lab.subject import Layer


def frequencies_of(model: PreTrainedModel, layer: Layer) -> FloatArray:
    """Radians per token of each pair of dimensions of `layer`, `(head_dim / 2,)`; zeros without RoPE.

    Raises:
        UserError: if only a part of the dimensions is rotated.
    """
    buffers = {name.rpartition(".")[2]: buffer for _, name, buffer in _buffers(model)}
    kind = getattr(layer.attention, "layer_type", None)
    buffer = buffers.get(f"{kind}_inv_freq", buffers.get("inv_freq"))
    half = layer.attention.head_dim // 2
    if buffer is None:
        return torch.zeros(half, dtype=torch.float64).numpy()
    if len(buffer) != half:
        raise UserError(
            f"{type(layer.attention).__name__} rotates {2 * len(buffer)} of {2 * half} dimensions; only full RoPE "
            "is known here"
        )
    frequencies: FloatArray = buffer.double().cpu().numpy()
    return frequencies


def with_base(frequencies: FloatArray, factor: float | None) -> FloatArray:
    """The frequencies after multiplying the base of RoPE by `factor`; zeros for `None`: no position embedding."""
    if factor is None:
        return frequencies * 0
    exponents = torch.arange(len(frequencies), dtype=torch.float64).numpy() / len(frequencies)
    scaled: FloatArray = frequencies * factor**-exponents
    return scaled


@contextmanager
def rope_base(model: PreTrainedModel, factor: float | None) -> Iterator[PreTrainedModel]:
    """Run `model` with the base of its RoPE multiplied by `factor`; `None` removes positions: all are alike.

    The weights were trained with the model's own base: what such a pass gives says what the rotation does to this
    model, not how a model trained with another base would attend.
    """
    originals: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for module, name, buffer in _buffers(model):
            changed = with_base(buffer.double().cpu().numpy(), factor)
            originals.append((module, name, buffer))
            setattr(module, name, torch.from_numpy(changed).to(buffer))
        yield model
    finally:
        for module, name, buffer in originals:
            setattr(module, name, buffer)


def _buffers(model: PreTrainedModel) -> list[tuple[nn.Module, str, Tensor]]:
    """The tensors of inverse frequencies that `model` reads: module, attribute, value."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]
