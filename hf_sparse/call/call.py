"""One attention call of one layer, the keys that are always kept, and a selection of keys for some of its queries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hf_sparse.kernels.int8 import Int8States
from hf_sparse.kernels.layout import Layout
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.visibility import VisibleRanges


@dataclass(frozen=True)
class AlwaysKept:
    """Keys that every query keeps within its budget: attention sinks (arXiv 2309.17453) and a recent window.

    Attributes:
        sink_keys: First visible keys.
        recent_keys: Most recent visible keys. Where a budget is smaller than both together, these go first.
    """

    sink_keys: int = 0
    recent_keys: int = 0

    def split(self, budgets: Tensor) -> tuple[Tensor, Tensor]:
        """How many sinks and how many recent keys a query keeps, of the shape of `budgets`."""
        recent = budgets.clamp(max=self.recent_keys)
        return (budgets - recent).clamp(max=self.sink_keys), recent


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of one layer, as the model made it, or a block of its queries.

    Attributes:
        query: `(batch, heads, q_len, head_dim)`, rotated.
        key: `(batch, kv_heads, kv_len, head_dim)`, rotated, from the cache, not repeated over the GQA group.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        intervals: int32 `(batch, 1, q_len, 2)`: query i sees the keys `first <= j < stop`; empty for a pad token.
        scaling: Factor of the scores.
        softcap: If set, scores become `softcap * tanh(scores / softcap)` (Gemma-2).
        sinks: If set, `(heads,)` logits that take part in the softmax without a value (gpt-oss `s_aux`).
        dropout: Probability with which attention weights are dropped; 0 outside training.
        origin: If set, int64 `(batch,)` on the CPU: the key position where each sequence's text begins, as far as the
            whole call can see. A block of queries may see less of it.
        end: If set, int64 `(batch,)` on the CPU: the key position after the last that the whole call can see of each.
        quantised: If set, `key` in few bits, which the blocks of a call share.
        known_ranges: What `ranges` gives as long as they are those of `intervals`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    intervals: Tensor
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    origin: Tensor | None = None
    end: Tensor | None = None
    quantised: QuantisedKeys | None = None
    known_ranges: VisibleRanges | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share one key head (GQA)."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def learns(self) -> bool:
        """Whether a gradient is to flow back through this call: to queries, keys, values or attention sinks."""
        states = (self.query, self.key, self.value, self.sinks)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in states)

    @cached_property
    def scaled_query(self) -> Tensor:
        """Queries times `scaling`, in float32 and contiguous, for kernels."""
        return (self.query.float() * self.scaling).contiguous()

    @property
    def visible(self) -> Tensor:
        """Visible keys of each query: int64 `(batch, q_len)`."""
        return (self.intervals[:, 0, :, 1] - self.intervals[:, 0, :, 0]).long()

    @cached_property
    def ranges(self) -> VisibleRanges:
        """The visible ranges on the CPU, with what follows from them."""
        known = self.known_ranges
        return known if known is not None and known.intervals is self.intervals else VisibleRanges(self.intervals)

    @cached_property
    def own_quantised(self) -> QuantisedKeys:
        """`quantised`, or none yet."""
        return QuantisedKeys() if self.quantised is None else self.quantised

    def quantised_up_to(self, stop: int, layout: Layout, *, left: int = 0) -> tuple[Tensor, Tensor]:
        """The keys before `stop` in few bits: see `QuantisedKeys.up_to`.

        What they have in common is subtracted where scores are products, which a soft cap ends.
        """
        texts = None if self.softcap is not None else self._texts
        return self.own_quantised.up_to(self.key, stop, layout, texts=texts, left=left)

    def _texts(self) -> list[tuple[int, int]]:
        return list(zip(self.text_start.tolist(), self.text_stop.tolist(), strict=True))

    @property
    def last_visible(self) -> int:
        """No query sees keys from this position on; at least 1."""
        return self.ranges.last_visible

    @property
    def text_start(self) -> Tensor:
        """Key position where each sequence's text begins, int64 `(batch,)` on the CPU: `origin`, or the first seen."""
        if self.origin is not None:
            return self.origin
        first, stop = self.ranges.first, self.ranges.stop
        return torch.where(stop > first, first, self.key.shape[2] - 1).amin(-1)

    @property
    def text_stop(self) -> Tensor:
        """Key position after each sequence's last key, int64 `(batch,)` on the CPU: `end`, or after the last seen."""
        return self.ranges.stop.amax(-1) if self.end is None else self.end

    def with_keys(self, positions: Tensor) -> AttentionCall:
        """The same call with copies of the keys and values at `positions`, int64 `(batch, number)`, alone.

        The intervals stay as they are: they count those keys.
        """
        index = positions[:, None].expand(-1, self.key.shape[1], -1)
        return replace(
            self, key=take_keys(self.key, index), value=take_keys(self.value, index), quantised=QuantisedKeys()
        )

    def dequantized(self) -> AttentionCall:
        """The same call with plain keys and values, where they are stored in 8 bits."""
        key, value = (x.dequantize() if isinstance(x, Int8States) else x for x in (self.key, self.value))
        return replace(self, key=key, value=value)

    def queries(self, start: int, stop: int) -> AttentionCall:
        """The same call for the queries `start` to `stop` alone; nothing is copied."""
        intervals = self.intervals[:, :, start:stop]
        return replace(
            self,
            query=self.query[:, :, start:stop],
            intervals=intervals,
            origin=self.text_start,
            end=self.text_stop,
            known_ranges=self.ranges.part(start, stop, intervals),
        )

    def visible_part(self) -> AttentionCall:
        """The same queries with the keys alone that some query sees, and at least one key; nothing is copied."""
        first, stop = self.ranges.first, self.ranges.stop
        alive = stop > first
        low = int(first[alive].min()) if bool(alive.any()) else 0
        keys = slice(low, self.last_visible)
        intervals = (self.intervals - low) * (self.intervals[..., 1:] > self.intervals[..., :1])
        return replace(
            self,
            key=self.key[:, :, keys],
            value=self.value[:, :, keys],
            intervals=intervals,
            origin=None,
            end=None,
            quantised=None,
            known_ranges=VisibleRanges(intervals, (first - low) * alive, (stop - low) * alive),
        )


def pairs_of(queries: Tensor, kv_heads: int, size: int) -> Tensor:
    """`(batch, heads, q_len, ...)` -> `(batch, kv_heads, groups, pairs, ...)` for groups of `size` query positions.

    The pairs of a group are its queries for the first head of the GQA group, then those for the second, and so on.
    """
    batch, heads, length, *rest = queries.shape
    x = queries.reshape(batch, kv_heads, heads // kv_heads, length // size, size, *rest)
    return x.transpose(2, 3).flatten(3, 4)


def take_keys(states: Tensor, positions: Tensor) -> Tensor:
    """`(batch, kv_heads, kv_len, dim)` at `(batch, kv_heads, ...)` -> `(batch, kv_heads, ..., dim)`.

    Copies nothing else, also where `states` is a part of longer storage, as that of a cache. What is stored in 8 bits
    stays so.
    """
    if isinstance(states, Int8States):
        return states.map(lambda x: take_keys(x, positions))
    vectors, index = as_vectors(states, positions)
    return vectors.index_select(0, index.flatten()).view(*positions.shape, states.shape[3])


def as_vectors(states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`states` as vectors `(number, dim)`, without a copy, and where those at `positions` are among them."""
    batch, kv_heads, kv_len, dim = states.shape
    sizes = states.shape[:3]
    strides = [stride if size > 1 else 0 for size, stride in zip(sizes, states.stride(), strict=False)]
    unit = math.gcd(*strides)
    if unit == 0 or states.stride(3) != 1 or (states.requires_grad and torch.is_grad_enabled()):
        vectors, steps = states.reshape(-1, dim), [kv_heads * kv_len, kv_len, 1]
    else:
        # All vectors of length `dim` that begin at a multiple of `unit`: every key is one of them.
        steps = [stride // unit for stride in strides]
        count = 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        vectors = states.as_strided((count, dim), (unit, 1))
    sequence = torch.arange(batch, device=positions.device).view(-1, 1) * steps[0]
    base = sequence + torch.arange(kv_heads, device=positions.device) * steps[1]
    return vectors, positions * steps[2] + base.view(batch, kv_heads, *[1] * (positions.dim() - 2))


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the CPU as one on `device`. From other memory than pinned, a GPU would have to finish all else."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute weights in for inputs of `dtype`: float32, or `dtype` itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)
