"""The grouped selector by Triton's kernels: nothing is read from the GPU, so that nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.call import AlwaysKept, AttentionCall, SharedSelection, sent
from hf_sparse.kernels import gpu
from hf_sparse.kernels.layout import adjacent
from hf_sparse.selectors.importance import PERIOD, WINDOW


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why the kernels cannot select for this call; `None` if they can."""
    if call.key.shape[3] > gpu.WIDEST:
        return f"a head_dim of {call.key.shape[3]} is more than {gpu.WIDEST}"
    return gpu.unsupported_reason(call.key.device)


@torch.no_grad()
def by_triton(
    call: AttentionCall, budgets: Tensor, always: AlwaysKept, size: int, widths: tuple[int, int]
) -> SharedSelection:
    """What `hf_sparse.selectors.grouped` keeps.

    What queries see is read from `call.intervals` on the GPU. Of `call.ranges`, only bounds are used, which sizes and
    grids follow from: those of a cache's room, and `widths` of a query that sees all of it, do for any text in there.
    With budgets on the GPU besides, the same launches decode every token, as a CUDA graph wants it.

    Args:
        call: A whole number of groups of queries.
        budgets: Integers `(batch, heads or 1, q_len)`, on the CPU, or on the device of the call.
        always: Sinks and recent keys.
        size: Queries in a group.
        widths: At least as many first and local keys as any group has, and keys of the past as any keeps.
    """
    from hf_sparse.kernels.triton.best import best
    from hf_sparse.kernels.triton.codes import LAYOUT
    from hf_sparse.kernels.triton.importance import Groups, importance

    ranges = call.ranges
    stop = ranges.last_visible
    is_new = _ends_with_what_all_see(call)
    codes, scales = call.quantised_up_to(stop, LAYOUT, left=int(is_new))
    near, past = widths
    groups = Groups(
        query=call.query,
        scaling=call.scaling,
        softcap=call.softcap,
        intervals=adjacent(call.intervals),
        codes=codes,
        scales=scales,
        size=size,
        sink_keys=min(always.sink_keys, stop),
        recent_keys=min(always.recent_keys, stop),
        base=ranges.first_visible,
        stop=stop,
        near=near,
        fresh=call.key if is_new else None,
        center=call.own_quantised.center,
    )
    try:
        values, counts, arrived = importance(call.query, groups, WINDOW, PERIOD)
    except BaseException:
        call.own_quantised.crop(stop - 1)  # The newest key may not be among them.
        raise
    moved, differ = _moved(call, budgets)
    positions, runs = best(values, counts, arrived, groups, moved, past, differ=size > 1 or differ)
    return SharedSelection(positions, runs, size, budgets.expand(call.query.shape[:3]))


def _ends_with_what_all_see(call: AttentionCall) -> bool:
    """Whether one query of each sequence sees all keys up to the last, as in decoding: the kernels write that key."""
    if call.query.shape[2] > 1 or call.key.stride(3) > 1:
        return False
    ranges, name = call.ranges, "all see the last key"
    if name not in ranges.plans:  # for all layers
        ranges.plans[name] = bool((ranges.stop == ranges.last_visible).all())
    return bool(ranges.plans[name])


def _moved(call: AttentionCall, budgets: Tensor) -> tuple[Tensor, bool]:
    """Budgets as int32 `(batch, heads, q_len)` on a call's device, and whether those of a query's heads may differ.

    They are moved once for all layers that share a law, and with it the memory of the budgets.
    """
    batch, heads, queries, _ = call.query.shape
    device = call.query.device
    if budgets.device == device and device.type != "cpu":
        return budgets.to(torch.int32).expand(batch, heads, queries), budgets.shape[1] > 1
    key = ("budgets", budgets.data_ptr(), budgets.shape, budgets.stride(), heads, device)
    known = call.ranges.plans.get(key)
    if known is None:
        moved = sent(budgets.to(torch.int32), device)
        differ = bool((budgets != budgets[:, :1]).any())
        # The budgets are held, too, so that no others come to lie where they do.
        known = call.ranges.plans[key] = (moved.expand(batch, heads, queries), differ, budgets)
    return known[0], known[1]
