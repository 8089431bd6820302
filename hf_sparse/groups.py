"""Groups of neighbouring queries, which begin at each sequence's own first token wherever padding or a cache put it.

A group is then the same queries whether a text is alone, padded, in a batch or split over calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall
from hf_sparse.plan import BudgetPlan
from hf_sparse.ranges import VisibleRanges


@dataclass(frozen=True)
class Aligned:
    """A call whose groups of queries begin where they should.

    Attributes:
        call: The call, with empty queries around those of sequences that had to be moved.
        budgets: Kept keys of its queries, int64 `(batch, heads or 1, q_len)`, on the CPU; 0 for empty ones.
        shift: Places that each sequence was moved by, int64 `(batch,)`; `None` if none was.
    """

    call: AttentionCall
    budgets: Tensor
    shift: Tensor | None = None

    def restored(self, x: Tensor, queries: int) -> Tensor:
        """`(batch, heads, q_len, ...)` of the aligned call as `(batch, heads, queries, ...)` of the original one."""
        if self.shift is None:
            return x
        source = (torch.arange(queries) + self.shift[:, None]).to(x.device)
        return x.gather(2, source[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def align(call: AttentionCall, budgets: Tensor, size: int) -> Aligned:
    """Move sequences so that groups of `size` queries begin at multiples of `size` tokens of each text.

    Args:
        call: The call.
        budgets: int64 `(batch, heads or 1, q_len)`, on the CPU.
        size: Queries of a group.

    Returns:
        The aligned call: a whole number of groups if more than one.
    """
    start = call.text_start
    call = replace(call, origin=start, known_ranges=call.ranges)
    queries = call.query.shape[2]
    if size == 1 or queries == 1:
        return Aligned(call, budgets)
    first, stop = call.ranges.first, call.ranges.stop
    index = torch.arange(queries)
    # A query's position in its text is its last visible key, counted from the text's first visible key.
    head = torch.where(stop > first, index, queries).amin(-1).clamp(max=queries - 1)
    position = stop.gather(1, head[:, None])[:, 0] - 1 - start
    shift = (position - head) % size
    length = queries + int(shift.max())
    if length > size:
        length = -(-length // size) * size
    if length == queries and not bool(shift.any()):
        return Aligned(call, budgets)
    source = torch.arange(length) - shift[:, None]
    inside = (source >= 0) & (source < queries)
    source = source.clamp(0, queries - 1)
    first, stop = (x.gather(1, source) * inside for x in (first, stop))
    device = call.query.device
    index = source.to(device)[:, None, :, None].expand(-1, call.query.shape[1], -1, call.query.shape[3])
    intervals = torch.stack([first, stop], dim=-1).to(torch.int32)[:, None].to(device)
    moved = replace(
        call,
        query=call.query.gather(2, index),
        intervals=intervals,
        known_ranges=VisibleRanges(intervals, first, stop),
    )
    budgets = budgets.gather(2, source[:, None].expand(-1, budgets.shape[1], -1)) * inside[:, None]
    return Aligned(moved, budgets, shift)


def leading_dense(call: AttentionCall, plan: BudgetPlan, size: int) -> int:
    """Queries at the start of a call that keep all they see, in whole groups: dense attention is faster for them."""
    first, stop = call.ranges.first, call.ranges.stop
    if (first != first[:1]).any() or (stop != stop[:1]).any():
        return 0  # The groups of sequences that are padded differently do not end at the same query.
    position = int(stop[0, 0] - 1 - first[0].min())
    return max(0, (position + plan.leading_dense()) // size * size - position)
