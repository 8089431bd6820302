"""The grouped selector by compiled kernels for CPUs."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.call import AlwaysKept, AttentionCall, Selection
from hf_sparse.kernels import cpu
from hf_sparse.selectors.layout import OVERSAMPLING
from hf_sparse.visibility import VisibleRanges


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why the kernels cannot select for this call; `None` if they can."""
    if call.key.shape[3] % 4:
        return f"the compiled kernels take heads of a multiple of 4 components, not {call.key.shape[3]}"
    return cpu.unsupported_reason(call.key)


def select_compiled(call: AttentionCall, budgets: Tensor, always: AlwaysKept, size: int) -> Selection:
    """What `hf_sparse.selectors.grouped.select_by` gives, by one call of a kernel.

    Args:
        call: A whole number of groups of queries.
        budgets: int64 `(batch, heads or 1, q_len)`.
        always: Sinks and recent window.
        size: Queries in a group.
    """
    batch, heads, queries, _ = call.query.shape
    ranges = call.ranges
    positions, allowed, kept, scores = cpu.select(
        call.scaled_query,
        call.key,
        call.own_quantised.up_to(call.key, ranges.last_visible, cpu.LAYOUT),
        (ranges.first, ranges.stop),
        budgets.expand(batch, heads, queries),
        size=size,
        width=_width(ranges, int(budgets.max()), always, size),
        sink_keys=always.sink_keys,
        recent_keys=always.recent_keys,
        oversampling=OVERSAMPLING,
        softcap=call.softcap,
        want_scores=queries == 1,
    )
    return Selection(positions, allowed, size, per_head=False, scores=scores, number=kept)


def _width(ranges: VisibleRanges, most: int, always: AlwaysKept, size: int) -> int:
    """Keys that any group may come to: sinks and local keys, and its candidates. `most`: the largest budget."""
    skew, ahead = ranges.spread(size)
    certain = min(skew + always.sink_keys + ahead + max(1, always.recent_keys), ranges.last_visible)
    candidates = min(OVERSAMPLING * (most + skew), ranges.most_visible + skew)
    return sum(-(-x // cpu.TILE) * cpu.TILE for x in (certain, candidates))
