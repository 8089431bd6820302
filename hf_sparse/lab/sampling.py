"""Rows of attention of a model on a text, a few at each number of visible keys, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.call import AttentionCall
from hf_sparse.diagnostics import DenseBlock, observed
from hf_sparse.measure.windows import Window
from hf_sparse.patching import base_model

NEAR = 0.9
"""Rows that stand for n visible keys see between this share of n and n."""


@dataclass(frozen=True)
class LayerRows:
    """Some rows of one layer that see about `length` keys, all of them from the first key on.

    Attributes:
        layer: Index of the layer.
        length: n, the number of keys of the row that sees the most.
        dense: Inputs and weights of the rows, for all heads.
        logits: float32 `(heads, rows, length)`: what the softmax takes; -inf for keys that a row does not see.
        weights: float32 `(heads, rows, length)`.
        visible: int64 `(rows,)`.
    """

    layer: int
    length: int
    dense: DenseBlock
    logits: Tensor
    weights: Tensor
    visible: Tensor

    @property
    def seen(self) -> Tensor:
        """Which keys a row sees: bool `(rows, length)`."""
        return torch.arange(self.length) < self.visible[:, None]

    @property
    def values(self) -> Tensor:
        """float32 `(heads, length, value_dim)`, repeated over the GQA groups."""
        inputs = self.dense.call
        return inputs.value[0].float().repeat_interleave(inputs.group_size, 0)


def visit_rows(
    model: PreTrainedModel,
    window: Window,
    lengths: Sequence[int],
    rows: int,
    visit: Callable[[LayerRows], None],
) -> None:
    """Run `model` dense over a window and show some rows of every layer at every number of visible keys.

    Layers whose sliding window hides keys at the largest n are left out: to them n does not grow with the text.

    Args:
        model: An unpatched model.
        window: The text; attention is causal, so one pass over it serves all `lengths`.
        lengths: n, at most the length of the window.
        rows: Rows at each n, spread evenly between `NEAR` n and n; few enough to be different ones.
        visit: Called for every layer and n.
    """

    @torch.no_grad()
    def observer(layer: int, inputs: AttentionCall) -> None:
        if int(inputs.intervals[0, 0, max(lengths) - 1, 0]) > 0:
            return
        for length in lengths:
            index = torch.linspace(NEAR * length, length, rows).long() - 1
            visit(_layer_rows(layer, length, _take(inputs, index, length)))

    with observed(model, observer), torch.no_grad():
        # Without the head: the logits of a long text take more memory than all the rest.
        base_model(model).base_model(input_ids=window.input_ids[None].to(model.device), use_cache=False)


def _take(inputs: AttentionCall, index: Tensor, length: int) -> AttentionCall:
    index = index.to(inputs.query.device)
    return replace(
        inputs,
        query=inputs.query[:, :, index].float().cpu(),
        key=inputs.key[:, :, :length].float().cpu(),
        value=inputs.value[:, :, :length].float().cpu(),
        intervals=inputs.intervals[:, :, index].cpu(),
        sinks=None if inputs.sinks is None else inputs.sinks.float().cpu(),
        dropout=0.0,
        origin=inputs.text_start.cpu(),
    )


def _layer_rows(layer: int, length: int, inputs: AttentionCall) -> LayerRows:
    dense = DenseBlock.of(inputs)
    logits = dense.scores[0] * inputs.scaling
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    visible = inputs.visible[0]
    seen = torch.arange(length) < visible[:, None]
    return LayerRows(layer, length, dense, logits.masked_fill(~seen, -torch.inf), dense.weights[0], visible)
