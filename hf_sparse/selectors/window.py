"""The window selector: sinks and the most recent keys, in a window that widens with what a query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.call import AlwaysKept, AttentionCall, Selection
from hf_sparse.selectors.base import Selector


@dataclass(frozen=True)
class Window(Selector):
    """Keep the first visible keys (attention sinks, arXiv 2309.17453) and spend the rest of the budget on recent ones.

    No score is formed. Where the budget is smaller than sinks and recent keys together, the recent keys go first.
    """

    name: str = "window"

    @torch.no_grad()
    def select(self, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
        """Sinks and window of each query, all queries in one group: see `Selector.select`."""
        batch, heads, queries, _ = call.query.shape
        kv_heads, kv_len = call.key.shape[1:3]
        first, stop = call.intervals.long().unbind(-1)
        budgets = budgets.to(first.device)
        sinks, _ = always.split(budgets)
        start = torch.maximum(stop - (budgets - sinks), first + sinks)

        # Queries differ in where their sinks and windows lie: the candidates span them all, and `allowed` tells them
        # apart.
        alive = (stop > first).expand_as(start)
        sink_positions = _span(first.expand_as(start), (first + sinks), alive, kv_len)
        window_positions = _span(start, stop.expand_as(start), alive, kv_len)
        first, stop, sinks, start = (x[..., None] for x in (first, stop, sinks, start))
        in_sinks = (sink_positions >= first) & (sink_positions < first + sinks)
        in_window = (window_positions >= start) & (window_positions < stop)

        positions = torch.cat([sink_positions, window_positions], dim=-1)[:, 0].clamp(max=kv_len - 1)
        allowed = torch.cat([in_sinks, in_window], dim=-1).expand(batch, heads, -1, -1)
        share = heads // kv_heads
        return Selection(
            positions[:, None].expand(-1, kv_heads, 1, -1),
            allowed.reshape(batch, kv_heads, 1, share * queries, -1),
            queries_per_group=queries,
            per_head=False,
        )

    def scored_keys(self, call: AttentionCall, most: int) -> int:
        """No score is formed, but a mask of twice the window or so: see `Selector.scored_keys`."""
        return max(1024, min(call.key.shape[2], 2 * most))


def _span(start: Tensor, stop: Tensor, alive: Tensor, kv_len: int) -> Tensor:
    """Positions of the smallest range that holds `[start, stop)` of all live queries: `(batch, 1, 1, width)`."""
    low = torch.where(alive, start, kv_len).amin((1, 2))
    high = torch.where(alive, stop, 0).amax((1, 2))
    width = max(1, int((high - low).max()))
    return (low[:, None] + torch.arange(width, device=low.device))[:, None, None].clamp(max=kv_len)
