"""Queries, keys and values of one attention layer, at any length: Gaussian, or those of a real model, repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.bench.shapes import Shape
from hf_sparse.call import AttentionCall
from hf_sparse.diagnostics import observed
from hf_sparse.errors import UserError
from hf_sparse.patching import base_model, inspect

SCORE_STD = 2.5
"""Standard deviation of the scores of Gaussian inputs, about that of the middle layers of SmolLM2-135M, of which the
median layer has 2.8. With 1, attention would be almost uniform, and no selection of keys close to it."""


@dataclass(frozen=True)
class LayerInputs:
    """The source of a layer's attention inputs.

    Attributes:
        name: Its name in results.
        shape: Query heads, key heads and head dimension.
        dtype: Of the tensors.
        device: Of the tensors.
        seed: Of Gaussian inputs.
        captured: One call of a real model's layer; `None` for Gaussian inputs.
        layer: Index of that layer, whose laws are used; 0 for Gaussian inputs.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    seed: int
    captured: AttentionCall | None = None
    layer: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of one key and its value, over all key heads."""
        return 2 * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def describe(self) -> dict[str, Any]:
        """What a record says about the inputs."""
        heads, kv_heads, head_dim = self.shape
        return {"inputs": self.name, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}

    def prefill(self, length: int, index: int = 0) -> AttentionCall:
        """Causal attention of `length` queries to as many keys. Each `index` gives other numbers."""
        return self._make(length, length, offset=index)

    def decode(self, length: int, index: int) -> AttentionCall:
        """One query that sees `length` keys, its own last. Each `index` gives other numbers."""
        return self._make(1, length, offset=index)

    def _make(self, queries: int, length: int, offset: int) -> AttentionCall:
        stop = torch.arange(length - queries + 1, length + 1, dtype=torch.int32, device=self.device)
        intervals = torch.stack([torch.zeros_like(stop), stop], dim=-1)[None, None]
        if self.captured is None:
            heads, kv_heads, dim = self.shape
            generator = torch.Generator(self.device).manual_seed(self.seed + offset)
            query, key, value = (
                torch.randn(1, h, n, dim, generator=generator, device=self.device, dtype=self.dtype)
                for h, n in ((heads, queries), (kv_heads, length), (kv_heads, length))
            )
            return AttentionCall(query * SCORE_STD, key, value, intervals, dim**-0.5)
        # Both ends of the repeated tensors are aligned on the right, so that the last query sees its own key last.
        place = (torch.arange(-length, 0, device=self.device) - offset) % self.captured.key.shape[2]
        return replace(
            self.captured,
            query=self.captured.query[:, :, place[-queries:]],
            key=self.captured.key[:, :, place],
            value=self.captured.value[:, :, place],
            intervals=intervals,
        )


def gaussian(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> LayerInputs:
    """Independent normal numbers.

    Neighbouring queries and keys are unrelated, unlike those of a text, so sparse attention has far larger errors than
    on real inputs. Times hardly depend on the numbers.
    """
    name = f"gaussian, scores of standard deviation {SCORE_STD}"
    return LayerInputs(name, (shape.heads, shape.kv_heads, shape.head_dim), dtype, device, seed)


def capture(model: PreTrainedModel, input_ids: Tensor, seed: int) -> LayerInputs:
    """The inputs of the middle one of a model's full-attention layers on a text, int64 `(tokens,)`.

    Raises:
        UserError: if the layer does more than softmax attention, which the dense baselines could not do.
    """
    layers = [layer.layer for layer in inspect(model).layers if layer.sliding_window is None]
    wanted = layers[len(layers) // 2]
    found: list[AttentionCall] = []

    def observer(layer: int, inputs: AttentionCall) -> None:
        if layer == wanted:
            found.append(inputs)

    with torch.no_grad(), observed(model, observer):
        base_model(model).base_model(input_ids=input_ids[None].to(model.device), use_cache=False)
    [call] = found
    if call.softcap is not None or call.sinks is not None:
        raise UserError(
            f"{type(model).__name__} caps its scores or has attention sinks, which dense SDPA does not do: its layers "
            "cannot be measured alone; pass --decode none --prefill none"
        )
    shape = (call.query.shape[1], call.key.shape[1], call.query.shape[3])
    name = f"layer {wanted} on {len(input_ids)} tokens of text, repeated"
    return LayerInputs(name, shape, call.query.dtype, call.query.device, seed, call, wanted)
