"""The grouped selector: neighbouring queries, and the heads that share keys, keep the same keys of the past.

A group is 64 neighbouring queries, or the one query of a decoding step, over the heads of a GQA group. Each of its
(query, head) pairs keeps its own sinks and recent keys. The rest of its budget goes to the past keys that are most
important to all pairs together (`hf_sparse.selectors.importance`): what one pair reads, all read, so that nothing is
gathered, or scored exactly, for one of them alone. In one pass over a whole text, the keys of a query so depend on the
other queries of its group.

Compiled kernels do this on CPUs, and Triton's on GPUs; elsewhere PyTorch does, with the same rounded numbers. Sums are
rounded in other places: of two keys that are almost equally important, another may be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AlwaysKept, AttentionCall, Selection, SharedSelection, accurate, pairs_of
from hf_sparse.kernels import cpu
from hf_sparse.selectors import on_gpus
from hf_sparse.selectors.base import Selector, largest
from hf_sparse.selectors.importance import importance
from hf_sparse.selectors.layout import GroupLayout
from hf_sparse.visibility import VisibleRanges

GROUP_QUERIES = 64
"""Queries in a group of a prefill."""

# Engines read keys this many at a time.
_TILE = 16


@dataclass(frozen=True)
class Grouped(Selector):
    """Keep the keys that the queries of a group, and their heads, attend to most together."""

    name: str = "grouped"
    group_queries: int = GROUP_QUERIES
    ranks_quantised: bool = True

    def select(self, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
        """The keys of whole groups, or of fewer queries than one as a group: see `Selector.select`."""
        size = min(GROUP_QUERIES, call.query.shape[2])
        if self.uncompiled_reason(call) is not None:
            return _by_pytorch(call, budgets, always, size)
        if call.key.is_cuda:
            return by_triton(call, budgets, always, size)
        return _compiled(call, budgets, always, size)

    def decode(self, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Tensor | None:
        """What compiled kernels for CPUs do in one call: see `Selector.decode`."""
        if type(self).select is not Grouped.select or call.key.is_cuda or call.learns or call.dropout:
            return None
        return None if self.uncompiled_reason(call, call.value) else _decoded(call, budgets, always)

    def scored_keys(self, call: AttentionCall, most: int) -> int:
        """Scores are formed a group at a time: see `Selector.scored_keys`. What grows are lists of kept keys.

        On a GPU, the importance of all keys is held for each group beside the list.
        """
        kept, on_gpu = min(call.key.shape[2], most), call.key.is_cuda
        if self.uncompiled_reason(call, call.value) is not None or (not on_gpu and (call.learns or call.dropout)):
            return max(1024, kept)
        return -(-(kept + on_gpu * call.key.shape[2]) // (GROUP_QUERIES * call.group_size))

    def uncompiled_reason(self, call: AttentionCall, *others: Tensor) -> str | None:
        """Why PyTorch looks for the keys of this call, and no compiled kernel; `None` if one does.

        `others` are what a kernel is to read besides.
        """
        if call.key.is_cuda:
            return on_gpus.unsupported_reason(call)
        if call.key.shape[3] % 8:
            return f"the compiled kernels take heads of a multiple of 8 components, not {call.key.shape[3]}"
        return cpu.unsupported_reason(call.key, *others)


def _compiled(call: AttentionCall, budgets: Tensor, always: AlwaysKept, size: int) -> SharedSelection:
    batch, heads, queries, _ = call.query.shape
    ranges, most = call.ranges, int(budgets.max())
    budgets = budgets.expand(batch, heads, queries)
    positions, runs = cpu.select(
        call.scaled_query,
        call.quantised_up_to(ranges.last_visible, cpu.LAYOUT),
        (ranges.first, ranges.stop),
        budgets,
        size=size,
        width=sum(_widths(ranges, most, always, size)),
        sink_keys=always.sink_keys,
        recent_keys=always.recent_keys,
        softcap=call.softcap,
    )
    return SharedSelection(positions, runs, size, budgets)


def _decoded(call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Tensor:
    ranges, keys = call.ranges, call.own_quantised
    codes = call.quantised_up_to(ranges.last_visible, cpu.LAYOUT, left=1)
    try:
        out = cpu.decode(
            call.query,
            call.key,
            call.value,
            codes,
            keys.center,
            ranges.last_visible - 1,
            (ranges.first, ranges.stop),
            budgets,
            scaling=call.scaling,
            sink_keys=always.sink_keys,
            recent_keys=always.recent_keys,
            sinks=None if call.sinks is None else call.sinks.float().contiguous(),
            softcap=call.softcap,
        )
    except BaseException:
        keys.crop(ranges.last_visible - 1)  # The newest key may not be among them.
        raise
    return out if out.dtype == call.value.dtype else out.to(call.value.dtype)


def by_triton(call: AttentionCall, budgets: Tensor, always: AlwaysKept, size: int) -> SharedSelection:
    """What Triton's kernels keep of a whole number of groups of `size` queries."""
    widths = _widths(call.ranges, int(budgets.max()), always, size)
    return on_gpus.by_triton(call, budgets, always, size, widths)


def _widths(ranges: VisibleRanges, most: int, always: AlwaysKept, size: int) -> tuple[int, int]:
    """Keys that any group may come to: first and local keys, and those of the past. `most`: the largest budget."""
    skew, ahead = ranges.spread(size)
    near = min(skew + always.sink_keys + ahead + max(1, always.recent_keys), ranges.last_visible)
    past = min(most, ranges.most_visible)
    near, past = (-(-x // _TILE) * _TILE for x in (near, past))
    return near, past


@torch.no_grad()
def _by_pytorch(call: AttentionCall, budgets: Tensor, always: AlwaysKept, size: int) -> SharedSelection:
    layout = GroupLayout.of(call, budgets, always, size)
    pairs = pairs_of(call.query, call.key.shape[1], size).to(accurate(call.query.dtype)) * call.scaling
    near = layout.near_positions()
    near = F.pad(near, (0, -near.shape[-1] % _TILE))
    past = _most_important(pairs, call, layout)
    past = F.pad(past, (0, -past.shape[-1] % _TILE))
    positions = torch.cat([near.expand(-1, past.shape[1], -1, -1), past], dim=-1).clamp(max=call.key.shape[2] - 1)
    first, last = (layout.place_of(x).clamp(min=0) for x in (layout.first, layout.last_start))
    runs = (
        (first, first + layout.first_stop - layout.first),
        (last, last + layout.stop - layout.last_start),
        (torch.full_like(first, near.shape[-1]), near.shape[-1] + layout.ranked),
    )
    return SharedSelection(positions, torch.stack([torch.stack(run, dim=-1) for run in runs], dim=-2), size)


def _most_important(pairs: Tensor, call: AttentionCall, layout: GroupLayout) -> Tensor:
    """The past keys that pairs of each group keep, int64 `(batch, kv_heads, groups, layout.most_ranked)`.

    The most important first, of equal ones the most recent. Where a group keeps fewer, any positions follow.
    """
    wanted = layout.ranked.amax(-1, keepdim=True)
    if not bool(((layout.ranked > 0) & (layout.ranked < layout.past_size)).any()):
        return layout.edge_stop + torch.arange(layout.most_ranked, device=wanted.device).expand(*wanted.shape[:3], -1)
    values = importance(pairs, call, layout)
    position = torch.arange(values.shape[-1], device=values.device)
    is_past = (position >= layout.edge_stop) & (position < layout.local_start)
    best, taken = largest(values.masked_fill(~is_past, -torch.inf), wanted.squeeze(-1), layout.most_ranked)
    # From the most recent to the oldest, and those that are not taken at the end.
    best = best.masked_fill(~taken, -1).sort(dim=-1, descending=True).values
    ranks = values.gather(-1, best.clamp(min=0)).masked_fill(best < 0, -torch.inf)
    best = best.gather(-1, ranks.sort(dim=-1, descending=True, stable=True).indices)
    return best[..., : layout.most_ranked].clamp(min=0)
