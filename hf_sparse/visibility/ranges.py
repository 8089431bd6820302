"""The visible ranges of a call on the CPU: worked out once, and shared by all layers that are called with one mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from hf_sparse.visibility.intervals import Visible, is_packed, visible_in

# Up to this many queries are read as Python numbers: one operation on a tensor takes as long as a hundred of those,
# which counts for a decoded token.
_FEW = 64


class VisibleRanges:
    """The visible intervals of a call on the CPU, and what follows from them.

    On a GPU, reading a tensor waits for all work before it: here that happens once for all layers.

    Args:
        intervals: int32 `(batch, 1, q_len, 2)`, on the device of the call.
        first: The first key that each query sees: int64 `(batch, q_len)`, on the CPU; read from `intervals` if `None`.
        stop: The key after the last one.

    Attributes:
        queries: Queries that see a key.
        total: Visible keys, summed over the queries.
        few: Whether there are so few queries that Python's numbers are quicker than tensors.
        most_visible: Keys that the query with the most of them sees.
        last_visible: No query sees keys from this position on; at least 1.
        plans: What was worked out from these ranges, by what it was worked out for.
    """

    def __init__(self, intervals: Tensor, first: Tensor | None = None, stop: Tensor | None = None) -> None:
        if first is None or stop is None:
            first, stop = (x.contiguous() for x in intervals[:, 0].cpu().long().unbind(-1))
        self.intervals, self.first, self.stop = intervals, first, stop
        self.plans: dict[Any, Any] = {}
        self.few = first.numel() <= _FEW
        self._spans: list[tuple[int, int]] | None = None
        if self.few:
            self._spans = spans = list(zip(first.flatten().tolist(), stop.flatten().tolist(), strict=True))
            counts = [stop - first for first, stop in spans]
            self.queries = sum(count > 0 for count in counts)
            self.total = sum(counts)
            self.most_visible = max(counts, default=0)
            self.last_visible: int = max([1, *(stop for _, stop in spans)])
        else:
            self.queries = int((self.seen > 0).sum())
            self.total = int(self.seen.sum())
            self.most_visible = int(self.seen.max())
            self.last_visible = max(1, int(stop.max()))

    def part(self, start: int, stop: int, intervals: Tensor) -> VisibleRanges:
        """Those of the queries `start` to `stop` alone, which have these `intervals`."""
        first, after = (x[:, start:stop].contiguous() for x in (self.first, self.stop))
        return VisibleRanges(intervals, first, after)

    @cached_property
    def seen(self) -> Tensor:
        """Keys that a query sees: int64 `(batch, q_len)`."""
        return self.stop - self.first

    @cached_property
    def first_visible(self) -> int:
        """No query sees keys before this position."""
        if self._spans is not None:
            return min((first for first, stop in self._spans if stop > first), default=0)
        alive = self.stop > self.first
        return int(self.first[alive].min()) if self.queries else 0

    def spread(self, size: int) -> tuple[int, int]:
        """How far apart the first keys of `size` neighbouring queries lie at most, and how far their last ones.

        Args:
            size: Divides the number of queries. Queries that see nothing do not count.
        """
        if size == 1:
            return 0, 0
        begin, end = (x.view(len(x), -1, size) for x in (self.first, self.stop))
        alive = end > begin
        first, last = (
            int((x.masked_fill(~alive, 0).amax(-1) - x.masked_fill(~alive, self.last_visible).amin(-1)).max())
            for x in (begin, end)
        )
        return max(0, first), max(0, last)

    def causal(self, kv_len: int) -> bool:
        """Whether every query sees exactly the keys up to its own, the last query being that of the last key."""
        length = self.first.shape[1]
        if self._spans is not None:
            own = [(0, kv_len - length + 1 + query) for query in range(length)]
            return self._spans == own * len(self.first)
        if ("causal", kv_len) not in self.plans:
            stop = torch.arange(kv_len - length, kv_len, device="cpu") + 1
            self.plans["causal", kv_len] = bool(((self.first == 0) & (self.stop == stop)).all())
        return bool(self.plans["causal", kv_len])


@dataclass(frozen=True)
class Seen:
    """What the queries of a call see, and the same on the CPU."""

    visible: Visible
    ranges: VisibleRanges


_remembered: dict[int, tuple[ref[Tensor], int, tuple[int, ...], Seen | None]] = {}


def seen_through(mask: Tensor, batch: int, q_len: int, kv_len: int) -> Seen | None:
    """What a mask lets queries see, or `None` if it is not made of intervals; worked out once for all layers.

    It is remembered as long as the mask lives and is not written to. A user's own mask that was made in inference mode,
    where PyTorch does not count writes, is looked at in every call.

    Args:
        mask: From `interval_mask`, or a user's own 4-D mask.
        batch: Number of sequences.
        q_len: Number of queries.
        kv_len: Number of keys.
    """
    packed = is_packed(mask)
    version, sizes = 0 if mask.is_inference() else mask._version, (batch, q_len, kv_len)
    known = _remembered.get(id(mask))
    if known is not None and known[0]() is mask and known[1:3] == (version, sizes):
        return known[3]
    # Detached, for a view would keep the mask alive.
    visible = Visible.unpacked(mask.detach(), q_len) if packed else visible_in(mask[..., :kv_len])
    seen = None
    if visible is not None:
        visible = visible.expanded(batch)
        seen = Seen(visible, VisibleRanges(visible.intervals))
    if packed or not mask.is_inference():
        key = id(mask)
        _remembered[key] = ref(mask, lambda _: _remembered.pop(key, None)), version, sizes, seen
    return seen
