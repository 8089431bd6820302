"""One attention call of one layer, the keys that are always kept, and a selection of keys for some of its queries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

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
        quantised: If set, `key` in 8 bits, which the blocks of a call share.
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

    def with_keys(self, positions: Tensor) -> AttentionCall:
        """The same call with copies of the keys and values at `positions`, int64 `(batch, number)`, alone.

        The intervals stay as they are: they count those keys.
        """
        index = positions[:, None].expand(-1, self.key.shape[1], -1)
        return replace(
            self, key=take_keys(self.key, index), value=take_keys(self.value, index), quantised=QuantisedKeys()
        )

    def queries(self, start: int, stop: int) -> AttentionCall:
        """The same call for the queries `start` to `stop` alone; nothing is copied."""
        intervals = self.intervals[:, :, start:stop]
        return replace(
            self,
            query=self.query[:, :, start:stop],
            intervals=intervals,
            origin=self.text_start,
            known_ranges=self.ranges.part(start, stop, intervals),
        )

    def visible_part(self) -> AttentionCall:
        """The same queries with the keys alone that some query sees, and at least one key; nothing is copied."""
        first, stop = self.ranges.first, self.ranges.stop
        alive = stop > first
        low = int(first[alive].min()) if bool(alive.any()) else 0
        keys = slice(low, self.last_visible)
        seen = self.intervals[..., 1:] > self.intervals[..., :1]
        return replace(
            self,
            key=self.key[:, :, keys],
            value=self.value[:, :, keys],
            intervals=(self.intervals - low) * seen,
            origin=None,
            quantised=None,
        )


@dataclass(frozen=True)
class Selection:
    """The keys that a block of queries keeps.

    Queries are cut into `groups` for each key head, and the (query, head) pairs of a group draw on the same candidate
    keys. A pair is found at `(kv_head, group, pair)` through `pairs_of` and back through `queries_of`.

    Attributes:
        positions: int64 `(batch, kv_heads, groups, width)`: candidate key positions, each named at most once where
            allowed.
        allowed: bool `(batch, kv_heads, groups, pairs, width)`: which candidates a pair attends to; what is False pads
            a group to the common width.
        queries_per_group: Queries in one group. `pairs = queries_per_group * heads`, where heads is the GQA group
            size, or 1 if `per_head`.
        per_head: Whether each query head has groups of its own, ordered by (head in the GQA group, query).
        scores: If the selector knows them, `(batch, kv_heads, groups, pairs, width)`: products of the pairs' queries
            and the candidate keys, times the scaling. They carry no gradient.
        number: If the selector knows it, int64 `(batch, kv_heads, groups, pairs)`: keys that a pair attends to.
    """

    positions: Tensor
    allowed: Tensor
    queries_per_group: int
    per_head: bool
    scores: Tensor | None = None
    number: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, kv_heads: int) -> Selection:
        """The selection that a mask shows: the simple way to write a selector, with all keys as candidates.

        Args:
            mask: bool `(batch, heads, q_len, kv_len)`: the keys that each query keeps.
            kv_heads: Key heads of the call.
        """
        batch, heads, queries, kv_len = mask.shape
        positions = torch.arange(kv_len, device=mask.device).expand(batch, kv_heads, 1, -1)
        allowed = mask.reshape(batch, kv_heads, 1, heads // kv_heads * queries, kv_len)
        return cls(positions, allowed, queries_per_group=queries, per_head=False)

    @property
    def shares_nothing(self) -> bool:
        """Whether every query and head has candidates of its own."""
        return self.per_head and self.queries_per_group == 1

    def pairs_of(self, queries: Tensor, kv_heads: int) -> Tensor:
        """`(batch, heads, q_len, ...)` -> `(batch, kv_heads, groups, pairs, ...)`."""
        pairs = pairs_of(queries, kv_heads, self.queries_per_group)
        if not self.per_head:
            return pairs
        batch, _, groups, _, *rest = pairs.shape
        x = pairs.view(batch, kv_heads, groups, -1, self.queries_per_group, *rest)
        return x.transpose(2, 3).flatten(2, 3)

    def queries_of(self, pairs: Tensor, heads: int) -> Tensor:
        """The inverse of `pairs_of`."""
        batch, kv_heads, groups, _, *rest = pairs.shape
        if groups == 1:
            return pairs.reshape(batch, heads, -1, *rest)
        share = heads // kv_heads
        size = self.queries_per_group
        if self.per_head:
            x = pairs.reshape(batch, kv_heads, share, groups // share, size, *rest)
        else:
            x = pairs.reshape(batch, kv_heads, groups, share, size, *rest).transpose(2, 3)
        return x.reshape(batch, heads, -1, *rest)

    def mask(self, heads: int, kv_len: int) -> Tensor:
        """The selection as a bool mask `(batch, heads, q_len, kv_len)`, for engines and measures that are dense."""
        batch, kv_heads, groups, pairs, _ = self.allowed.shape
        # A padded candidate may name a key that is allowed elsewhere: send it to a position of its own.
        positions = torch.where(self.allowed, self.positions.unsqueeze(3), kv_len)
        out = torch.zeros(batch, kv_heads, groups, pairs, kv_len + 1, dtype=torch.bool, device=positions.device)
        return self.queries_of(out.scatter_(-1, positions, True)[..., :kv_len], heads)

    def kept(self, heads: int) -> Tensor:
        """Kept keys of each query: int64 `(batch, heads, q_len)`."""
        if self.number is not None:
            return self.queries_of(self.number, heads)
        # Bytes are summed many times faster than truth values.
        return self.queries_of(self.allowed.view(torch.uint8).sum(-1, dtype=torch.int32).long(), heads)


def pairs_of(queries: Tensor, kv_heads: int, size: int) -> Tensor:
    """`(batch, heads, q_len, ...)` -> `(batch, kv_heads, groups, pairs, ...)` for groups of `size` query positions.

    The pairs of a group are its queries for the first head of the GQA group, then those for the second, and so on.
    """
    batch, heads, length, *rest = queries.shape
    x = queries.reshape(batch, kv_heads, heads // kv_heads, length // size, size, *rest)
    return x.transpose(2, 3).flatten(3, 4)


def take_keys(states: Tensor, positions: Tensor) -> Tensor:
    """`(batch, kv_heads, kv_len, dim)` at `(batch, kv_heads, ...)` -> `(batch, kv_heads, ..., dim)`.

    Copies nothing else, also where `states` is a part of longer storage, as that of a cache.
    """
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


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute weights in for inputs of `dtype`: float32, or `dtype` itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)
