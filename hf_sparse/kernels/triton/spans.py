"""What the (query, head) pairs of a group keep but for which keys of the past, worked out where it is needed.

The rules are those of `hf_sparse.selectors.layout`. None of these numbers comes from the host, or is read by it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def seen_by(intervals, strides, batch, query, real):
    """The first key that each query sees, and the key after its last one; 0 and 0 for what is not `real`."""
    at = intervals + batch * strides[0] + query * strides[2]
    return tl.load(at, mask=real, other=0), tl.load(at + 1, mask=real, other=0)


@triton.jit
def ranges_of(intervals, strides, batch, group, size, sink_keys, recent_keys, SIZE: tl.constexpr):
    """Where the first keys of a group begin, the past, the local keys, and where those end; 0 if it sees none.

    `SIZE`: `size`, the queries of a group, or the next power of two.
    """
    query = tl.arange(0, SIZE)
    first, stop = seen_by(intervals, strides, batch, group * size + query, query < size)
    alive = stop > first
    last_stop = tl.max(tl.where(alive, stop, 0), 0)
    oldest = tl.min(tl.where(alive, first, last_stop), 0)
    past_start = tl.minimum(tl.max(tl.where(alive, first, 0), 0) + sink_keys, last_stop)
    least_stop = tl.min(tl.where(alive, stop, last_stop), 0)
    past_stop = tl.maximum(least_stop - tl.maximum(recent_keys, 1), past_start)
    return oldest, past_start, past_stop, last_stop


@triton.jit
def spend(first, stop, budget, past_start, past_stop, sink_keys, recent_keys):
    """What pairs spend their budgets on.

    Returns the key after those that a pair keeps from its first on, the first of those that it keeps up to its last,
    and how many keys of the past it keeps.
    """
    recent = tl.minimum(budget, recent_keys)
    sinks = tl.minimum(budget - recent, sink_keys)
    left = budget - recent - sinks
    local = tl.maximum(stop - recent - tl.maximum(past_stop, first + sinks), 0)
    more = tl.minimum(left, local)
    ranked = tl.where(stop > first, tl.minimum(left - more, past_stop - past_start), 0)
    return first + sinks + left - more - ranked, stop - recent - more, ranked
