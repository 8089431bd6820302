"""What passes between the parts of a patched layer: the inputs of one attention call, and a selection of keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hf_sparse.kernels.quantised import QuantisedKeys, quantised_of
from hf_sparse.rows import RowFacts, facts_of


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of one layer, as the model made it.

    Attributes:
        query: `(batch, heads, q_len, head_dim)`, rotated.
        key: `(batch, kv_heads, kv_len, head_dim)`, rotated, from the cache, not repeated over the GQA group.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        intervals: int32 `(batch, 1, q_len, 2)`: row i sees the keys `first <= j < stop`; empty for a pad row.
        scaling: Factor of the scores.
        softcap: If set, scores become `softcap * tanh(scores / softcap)` (Gemma-2).
        sinks: If set, `(heads,)` logits that take part in the softmax without a value (gpt-oss `s_aux`).
        dropout: Probability with which attention weights are dropped; 0 outside training.
        origin: If set, int64 `(batch,)`: the column where each sequence's text begins, as far as this call can see.
            A block of rows may see less of it.
        quantised: If set, `key` in 8 bits, which the blocks of rows of a call share.
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
        """Visible keys of each row: int64 `(batch, q_len)`."""
        return (self.intervals[:, 0, :, 1] - self.intervals[:, 0, :, 0]).long()

    @property
    def facts(self) -> RowFacts:
        """What is known about the rows; worked out once for all calls with the same intervals."""
        return facts_of(self.intervals)

    @property
    def own_quantised(self) -> QuantisedKeys:
        """`quantised`, or what a cache keeps of `key`, or nothing yet."""
        return quantised_of(self.key) if self.quantised is None else self.quantised

    @property
    def last_visible(self) -> int:
        """Columns from this one on are seen by no row; at least 1."""
        return max(1, int(self.intervals[..., 1].max()))

    @property
    def text_start(self) -> Tensor:
        """Column where each sequence's text begins: `origin`, or the first column that a row of it sees."""
        if self.origin is not None:
            return self.origin
        first, stop = self.intervals[:, 0].long().unbind(-1)
        return torch.where(stop > first, first, self.key.shape[2] - 1).amin(-1)

    def rows(self, start: int, stop: int) -> AttentionCall:
        """The same call for query rows `start` to `stop` alone; nothing is copied."""
        return replace(
            self, query=self.query[:, :, start:stop], intervals=self.intervals[:, :, start:stop], origin=self.text_start
        )

    def visible_part(self) -> AttentionCall:
        """The same rows with the keys alone that some row sees, and at least one key; nothing is copied."""
        first, stop = self.intervals.unbind(-1)
        alive = stop > first
        low = int(torch.where(alive, first, stop.amax() - 1).min()) if bool(alive.any()) else 0
        keys = slice(low, self.last_visible)
        return replace(
            self,
            key=self.key[:, :, keys],
            value=self.value[:, :, keys],
            intervals=(self.intervals - low) * alive.unsqueeze(-1),
            origin=None,
            quantised=None,
        )


@dataclass(frozen=True)
class Selection:
    """The keys that a block of query rows keeps.

    The rows of one GQA group are cut into `groups`, and the `members` of a group draw on the same candidate keys.
    A (row, head) pair is found at `(kv_head, group, member)` through `members_of` and back through `rows_of`.

    Attributes:
        columns: int64 `(batch, kv_heads, groups, width)`: candidate keys, each named at most once where allowed.
        allowed: bool `(batch, kv_heads, groups, members, width)`: which candidates a member attends to; what is
            False pads a group to the common width.
        rows_per_group: Query rows in one group. `members = rows_per_group * heads` where heads is the GQA group
            size, or 1 if `per_head`.
        per_head: Whether each query head has groups of its own, ordered by (head in the GQA group, row).
        scores: If the selector knows them, `(batch, kv_heads, groups, members, width)`: products of the members'
            queries and the candidate keys, times the scaling. They carry no gradient.
        number: If the selector knows it, int64 `(batch, kv_heads, groups, members)`: keys that a member attends to.
    """

    columns: Tensor
    allowed: Tensor
    rows_per_group: int
    per_head: bool
    scores: Tensor | None = None
    number: Tensor | None = None

    def members_of(self, rows: Tensor, kv_heads: int) -> Tensor:
        """`(batch, heads, rows, ...)` -> `(batch, kv_heads, groups, members, ...)`."""
        members = members_of(rows, kv_heads, self.rows_per_group)
        if not self.per_head:
            return members
        batch, _, groups, _, *rest = members.shape
        x = members.view(batch, kv_heads, groups, -1, self.rows_per_group, *rest)
        return x.transpose(2, 3).flatten(2, 3)

    def rows_of(self, members: Tensor, heads: int) -> Tensor:
        """The inverse of `members_of`."""
        batch, kv_heads, groups, _, *rest = members.shape
        if groups == 1:
            return members.reshape(batch, heads, -1, *rest)
        share = heads // kv_heads
        size = self.rows_per_group
        if self.per_head:
            x = members.reshape(batch, kv_heads, share, groups // share, size, *rest)
        else:
            x = members.reshape(batch, kv_heads, groups, share, size, *rest).transpose(2, 3)
        return x.reshape(batch, heads, -1, *rest)

    def mask(self, heads: int, kv_len: int) -> Tensor:
        """The selection as a bool mask `(batch, heads, rows, kv_len)`, for engines and measures that are dense."""
        batch, kv_heads, groups, members, _ = self.allowed.shape
        # A padded candidate may name a key that is allowed elsewhere in the row: send it to a column of its own.
        columns = torch.where(self.allowed, self.columns.unsqueeze(3), kv_len)
        out = torch.zeros(batch, kv_heads, groups, members, kv_len + 1, dtype=torch.bool, device=columns.device)
        return self.rows_of(out.scatter_(-1, columns, True)[..., :kv_len], heads)

    def kept(self, heads: int) -> Tensor:
        """Kept keys of each row: int64 `(batch, heads, rows)`."""
        if self.number is not None:
            return self.rows_of(self.number, heads)
        # Bytes are summed many times faster than truth values.
        return self.rows_of(self.allowed.view(torch.uint8).sum(-1, dtype=torch.int32).long(), heads)


def members_of(rows: Tensor, kv_heads: int, size: int) -> Tensor:
    """`(batch, heads, rows, ...)` -> `(batch, kv_heads, groups, members, ...)` for groups of `size` rows.

    The members of a group are its rows for the first head of the GQA group, then those for the second, and so on.
    """
    batch, heads, length, *rest = rows.shape
    x = rows.reshape(batch, kv_heads, heads // kv_heads, length // size, size, *rest)
    return x.transpose(2, 3).flatten(3, 4)


def take_rows(states: Tensor, columns: Tensor) -> Tensor:
    """`(batch, kv_heads, kv_len, dim)` at `(batch, kv_heads, ...)` -> `(batch, kv_heads, ..., dim)`.

    Copies nothing else, also where `states` is a part of longer storage, as that of a cache.
    """
    vectors, index = as_vectors(states, columns)
    return vectors.index_select(0, index.flatten()).view(*columns.shape, states.shape[3])


def as_vectors(states: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`states` as vectors `(number, dim)`, without a copy, and where those at `columns` are among them."""
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
    sequence = torch.arange(batch, device=columns.device).view(-1, 1) * steps[0]
    base = sequence + torch.arange(kv_heads, device=columns.device) * steps[1]
    return vectors, columns * steps[2] + base.view(batch, kv_heads, *[1] * (columns.dim() - 2))


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute weights in for inputs of `dtype`: float32, or `dtype` itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)
