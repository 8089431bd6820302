"""The window selector: sinks and the most recent keys, in a window that widens with what the row sees."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.config import SparseAttentionConfig


@torch.no_grad()
def select_window(inputs: AttentionCall, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """Keep the first `sink_keys` visible keys of each row and spend the rest of its budget on the most recent.

    No score is formed. Where the budget is smaller than `sink_keys + recent_keys`, the recent keys go first.

    Args:
        inputs: `rows` query rows, which become one group.
        budgets: int64 `(batch, heads or 1, rows)`.
        config: For `sink_keys` and `recent_keys`.
    """
    batch, heads, rows, _ = inputs.query.shape
    kv_heads, kv_len = inputs.key.shape[1:3]
    first, stop = inputs.intervals.long().unbind(-1)
    sinks = (budgets - budgets.clamp(max=config.recent_keys)).clamp(max=config.sink_keys)
    start = torch.maximum(stop - (budgets - sinks), first + sinks)

    # Rows differ in where their sinks and windows lie: the candidates span them all, and `allowed` tells them apart.
    alive = (stop > first).expand_as(start)
    sink_columns = _span(first.expand_as(start), (first + sinks), alive, kv_len)
    window_columns = _span(start, stop.expand_as(start), alive, kv_len)
    first, stop, sinks, start = (x[..., None] for x in (first, stop, sinks, start))
    in_sinks = (sink_columns >= first) & (sink_columns < first + sinks)
    in_window = (window_columns >= start) & (window_columns < stop)

    columns = torch.cat([sink_columns, window_columns], dim=-1)[:, 0].clamp(max=kv_len - 1)
    allowed = torch.cat([in_sinks, in_window], dim=-1).expand(batch, heads, -1, -1)
    share = heads // kv_heads
    return Selection(
        columns[:, None].expand(-1, kv_heads, 1, -1),
        allowed.reshape(batch, kv_heads, 1, share * rows, -1),
        rows_per_group=rows,
        per_head=False,
    )


def _span(start: Tensor, stop: Tensor, alive: Tensor, kv_len: int) -> Tensor:
    """Columns of the smallest range that holds `[start, stop)` of all live rows: `(batch, 1, 1, width)`."""
    low = torch.where(alive, start, kv_len).amin((1, 2))
    high = torch.where(alive, stop, 0).amax((1, 2))
    width = max(1, int((high - low).max()))
    return (low[:, None] + torch.arange(width, device=low.device))[:, None, None].clamp(max=kv_len)
