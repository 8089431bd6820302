"""Groups of neighbouring queries, which begin at each sequence's own first token wherever padding or a cache put it.

A group is then the same queries whether a text is alone, padded, in a batch or split over calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse.call.call import AttentionCall, sent
from hf_sparse.laws import BudgetPlan
from hf_sparse.visibility import VisibleRanges


@dataclass(frozen=True)
class Aligned:
    """A call whose groups of queries begin where they should.

    Attributes:
        call: The call, with empty queries around and after those of sequences that had to be moved.
        budgets: Kept keys of its queries, int64 `(batch, heads or 1, q_len)`, on the CPU; 0 for empty ones.
        place: Where each original query is now, int64 `(batch, queries)` on the CPU, -1 for one that sees nothing;
            `None` if all are where they were.
    """

    call: AttentionCall
    budgets: Tensor
    place: Tensor | None = None

    def restored(self, x: Tensor) -> Tensor:
        """`(batch, heads, q_len, ...)` of the aligned call as `(batch, heads, queries, ...)` of the original one."""
        if self.place is None:
            return x
        place = sent(self.place, x.device)[:, None, :, None]
        found = x.gather(2, place.clamp(min=0).expand(-1, x.shape[1], -1, x.shape[3]))
        return found.masked_fill(place < 0, 0)


def align(call: AttentionCall, budgets: Tensor, size: int) -> Aligned:
    """Move sequences so that groups of `size` queries begin at multiples of `size` tokens of each text.

    Args:
        call: The call.
        budgets: int64 `(batch, heads or 1, q_len)`, on the CPU.
        size: Queries of a group.

    Returns:
        The aligned call: a whole number of groups if more than one.
    """
    queries = call.query.shape[2]
    if size == 1 or queries == 1:
        return Aligned(call, budgets)
    start = call.text_start
    call = replace(call, origin=start, known_ranges=call.ranges)
    first, stop = call.ranges.first, call.ranges.stop
    alive = stop > first
    index = torch.arange(queries, device="cpu")
    # A query's position in its text is its last visible key, counted from the text's first visible key. Those that see
    # nothing are padding, before, after or inside a text: they have no part in its groups.
    head = torch.where(alive, index, queries).amin(-1).clamp(max=queries - 1)
    position = stop.gather(1, head[:, None]) - 1 - start[:, None]
    place = torch.where(alive, position % size + alive.cumsum(-1) - 1, -1)
    if (queries <= size or queries % size == 0) and bool(((place == index) | ~alive).all()):
        return Aligned(call, budgets)
    length = max(1, int(place.max()) + 1)
    if length > size:
        length = -(-length // size) * size
    # One place more than there are takes the queries that go nowhere.
    source = torch.full((len(place), length + 1), -1, device="cpu")
    source = source.scatter_(1, torch.where(alive, place, length), index.expand_as(place))[:, :length]
    inside = source >= 0
    source = source.clamp(min=0)
    first, stop = (x.gather(1, source) * inside for x in (first, stop))
    device = call.query.device
    index = sent(source, device)[:, None, :, None].expand(-1, call.query.shape[1], -1, call.query.shape[3])
    intervals = sent(torch.stack([first, stop], dim=-1).to(torch.int32)[:, None], device)
    moved = replace(
        call,
        query=call.query.gather(2, index),
        intervals=intervals,
        known_ranges=VisibleRanges(intervals, first, stop),
    )
    budgets = budgets.gather(2, source[:, None].expand(-1, budgets.shape[1], -1)) * inside[:, None]
    return Aligned(moved, budgets, place)


def leading_dense(call: AttentionCall, plan: BudgetPlan, size: int) -> int:
    """Queries at the start of a call that keep all they see, in whole groups: dense attention is faster for them."""
    first, stop = call.ranges.first, call.ranges.stop
    if (first != first[:1]).any() or (stop != stop[:1]).any():
        return 0  # The groups of sequences that are padded differently do not end at the same query.
    position = int(stop[0, 0] - 1 - call.text_start[0])
    return max(0, (position + plan.leading_dense()) // size * size - position)
