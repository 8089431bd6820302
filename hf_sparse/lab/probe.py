"""A model under test: its layers, sampled queries of its attention, and its rotation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_sparse.call import AttentionCall
from hf_sparse.diagnostics import DenseBlock, observed
from hf_sparse.errors import UserError
from hf_sparse.lab.experiment import Cell, Setting
from hf_sparse.lab.fits import shortened
from hf_sparse.measure.statistics import FloatArray
from hf_sparse.measure.windows import Window
from hf_sparse.patching import attention_modules, base_model
from hf_sparse.results import Record

QUERIES = {"small": 4, "full": 16}
"""Queries sampled at each n."""

NEAR = 0.9
"""Queries that stand for n visible keys see between this share of n and n."""

SINKS = 4
"""First keys that may be attention sinks."""

_LEAST_LAYERS = 3


@dataclass(frozen=True)
class Layer:
    """A decoder layer: its index, its attention module, and the block that maps hidden states to hidden states."""

    index: int
    attention: Any
    block: Any

    def heads(self, side: str) -> int:
        """Number of heads of the queries (`"q"`) or the keys (`"k"`)."""
        return len(getattr(self.attention, f"{side}_proj").weight) // int(self.attention.head_dim)


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """The decoder layers of `model`, in order.

    Raises:
        UserError: if its attention modules lack an index or the projections `q_proj`, `k_proj` and `o_proj`.
    """
    layers = []
    for name, module in attention_modules(model):
        attention: Any = module
        if not all(hasattr(module, part) for part in ("q_proj", "k_proj", "o_proj", "layer_idx")):
            raise UserError(
                f"{type(module).__name__} has no separate q_proj, k_proj and o_proj, which the theory experiments read"
            )
        layers.append(Layer(attention.layer_idx, module, model.get_submodule(name.rpartition(".")[0])))
    return sorted(layers, key=lambda layer: layer.index)


def check_layers(config: PreTrainedConfig) -> None:
    """Refuse a model that the experiments cannot read, before it is loaded.

    Raises:
        UserError: as `layers_of`, or if there are too few layers for errors to travel through.
    """
    with torch.device("meta"):
        layers = layers_of(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
    if len(layers) < _LEAST_LAYERS:
        raise UserError(f"the theory experiments need a model of {_LEAST_LAYERS} layers or more; it has {len(layers)}")


def token_axis(x: Tensor, heads: int) -> int:
    """The axis of tokens in queries or keys: `(batch, tokens, heads * dim)`, or 4-D with heads before or after them."""
    return 2 if x.dim() == 4 and x.shape[1] == heads else 1


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Queries or keys of the first sequence, in any layout of `token_axis`, as `(heads, tokens, dim)`."""
    return x[0] if token_axis(x, heads) == 2 else x[0].reshape(x.shape[1], heads, -1).transpose(0, 1)


def longest_windows(setting: Setting, at_most: float = math.inf) -> list[Window]:
    """The longest window of each document, of `at_most` tokens if there is one that short."""
    lengths = sorted({window.length for window in setting.windows})
    longest = max((length for length in lengths if length <= at_most), default=lengths[0])
    return [window for window in setting.windows if window.length == longest]


def window_cell(window: Window, **more: Any) -> Cell:
    """The entries of a cell that say which tokens it reads."""
    return {"document": window.document, "window": window.sha256, "length": window.length, **more}


def find_window(cell: Cell, setting: Setting) -> Window:
    """The window that a cell names."""
    return next(window for window in setting.windows if window.sha256 == cell["window"])


def row_lengths(length: int, least: int = 128) -> list[int]:
    """Two or more n at which queries are sampled: `least` times powers of 2, and at last `length`."""
    powers = [least << i for i in range(32) if least << i < length]
    return [*(powers or [length // 2]), length]


@dataclass(frozen=True)
class Sample:
    """Some queries of a layer, by its index, that see `length` = n keys or a few less, from the first key on.

    Attributes:
        dense: Attention of the queries, for all heads, on the CPU in float32.
        logits: `(heads, queries, length)`: what the softmax takes; -inf for keys that a query does not see.
        weights: `(heads, queries, length)`.
        visible: Number of keys a query sees, int64 `(queries,)`.
        values: `(heads, length, value_dim)`, repeated over the GQA groups.
    """

    layer: int
    length: int
    dense: DenseBlock
    logits: Tensor
    weights: Tensor
    visible: Tensor
    values: Tensor

    @classmethod
    def of(cls, layer: int, length: int, inputs: AttentionCall, queries: Tensor) -> Sample:
        """The sample of the `queries` of a call, int64 `(queries,)`."""
        place = queries.to(inputs.query.device)
        inputs = replace(
            inputs,
            query=inputs.query[:, :, place].float().cpu(),
            key=inputs.key[:, :, :length].float().cpu(),
            value=inputs.value[:, :, :length].float().cpu(),
            intervals=inputs.intervals[:, :, place].cpu(),
            sinks=None if inputs.sinks is None else inputs.sinks.float().cpu(),
            dropout=0.0,
            origin=inputs.text_start.cpu(),
        )
        dense, visible = DenseBlock.of(inputs), inputs.visible[0]
        logits = dense.scores[0] * inputs.scaling
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        seen = torch.arange(length) < visible[:, None]
        values = inputs.value[0].repeat_interleave(inputs.group_size, 0)
        return cls(layer, length, dense, logits.masked_fill(~seen, -torch.inf), dense.weights[0], visible, values)


def visit_samples(
    cell: Cell, setting: Setting, look: Callable[[Sample], Mapping[str, ArrayLike]], lengths: Sequence[int]
) -> list[Record]:
    """Look at some queries of every layer, at each n of the rising `lengths`, while the model reads a window dense.

    The cell names the window (see `window_cell`) and gives `rows`, the number of queries at each n: they are spread
    evenly between `NEAR` n and n. Attention is causal, so one pass serves all n. Layers whose sliding window hides keys
    at the largest n are left out: to them n does not grow with the text.

    Returns:
        For each `layer` and `n` the means over the queries of what `look` returns, `(heads, queries, ...)` by name.
    """
    found: list[Record] = []

    def observer(layer: int, inputs: AttentionCall) -> None:
        if int(inputs.intervals[0, 0, lengths[-1] - 1, 0]) > 0:
            return
        for n in lengths:
            sample = Sample.of(layer, n, inputs, torch.linspace(NEAR * n, n, cell["rows"]).long() - 1)
            means = {name: np.asarray(values, np.float64).mean(1) for name, values in look(sample).items()}
            found.append({"layer": layer, "n": n, **shortened(means)})

    with observed(setting.model, observer):
        read(setting.model, find_window(cell, setting).input_ids)
    return found


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor) -> None:
    """Run `model` over the tokens `(length,)`, without its head: logits of a long text would take the most memory."""
    base_model(model).base_model(input_ids=ids[None].to(model.device), use_cache=False)


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    """A `with` block in which modules have these forward hooks."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def frequencies_of(model: PreTrainedModel, layer: Layer) -> FloatArray:
    """Radians per token of each pair of dimensions of `layer` under RoPE, `(head_dim / 2,)`; zeros without RoPE.

    Raises:
        UserError: if only a part of the dimensions is rotated.
    """
    buffers = {name: buffer for _, name, buffer in _frequencies(model)}
    kind = getattr(layer.attention, "layer_type", None)
    half = layer.attention.head_dim // 2
    buffer = buffers.get(f"{kind}_inv_freq", buffers.get("inv_freq", torch.zeros(half)))
    if len(buffer) != half:
        raise UserError(
            f"{type(layer.attention).__name__} rotates {2 * len(buffer)} of {2 * half} dimensions; the theory "
            "experiments read full RoPE only"
        )
    return np.asarray(buffer.double().cpu())


@contextmanager
def rope_base(model: PreTrainedModel, factor: float | None) -> Iterator[None]:
    """Run `model` with the base of its RoPE multiplied by `factor`; `None` removes positions: all are alike.

    The weights were trained with the model's own base: such a pass shows the effect of the rotation on this model, not
    how a model trained with another base would attend.
    """
    originals = _frequencies(model)
    try:
        for module, name, buffer in originals:
            share = torch.arange(len(buffer), dtype=torch.float64, device=buffer.device) / len(buffer)
            setattr(module, name, buffer * 0 if factor is None else (buffer.double() * factor**-share).to(buffer))
        yield
    finally:
        for module, name, buffer in originals:
            setattr(module, name, buffer)


def _frequencies(model: PreTrainedModel) -> list[tuple[nn.Module, str, Tensor]]:
    """The tensors of inverse frequencies that `model` reads: module, attribute, value."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]
