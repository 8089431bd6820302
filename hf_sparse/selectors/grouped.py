"""The grouped selector: the pairs of a group rank the past keys together, and each picks its own of the best.

A group is 64 neighbouring queries, or the one query of a decoding step, over the heads of a GQA group. One set of keys
for all its (query, head) pairs is a dense matrix product, which is what hardware is good at. Each pair keeps its own
sinks and recent window. The past keys with the highest aggregated scores, `OVERSAMPLING` times as many as any pair has
room for, are the group's candidates; with its remaining budget, a pair keeps the candidates, and the other local keys,
that have its own highest exact scores. In one pass over a whole text, the keys of a query so depend a little on the
other queries of its group.

Compiled kernels do all of this on CPUs; everything else runs on PyTorch, from the same 8-bit
numbers, and is slower than dense attention. Sums are rounded in other places: of two keys whose aggregated scores agree
to less than a percent, another may become a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AlwaysKept, AttentionCall, Selection, accurate, pairs_of, take_keys
from hf_sparse.selectors import aggregation, compiled
from hf_sparse.selectors.base import Selector, largest
from hf_sparse.selectors.layout import OVERSAMPLING, GroupLayout

GROUP_QUERIES = 64
"""Queries in a group of a prefill."""

# Engines read keys this many at a time.
_TILE = 16


@dataclass(frozen=True)
class Grouped(Selector):
    """Keep what the queries of a group and their heads attend to most: near top-k, at a fraction of its cost."""

    name: str = "grouped"
    group_queries: int = GROUP_QUERIES
    ranks_quantised: bool = True

    def select(self, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
        """The keys of whole groups, or of fewer queries than one as a group: see `Selector.select`."""
        if self.uncompiled_reason(call) is not None:
            return select_by(aggregation.by_pytorch, call, budgets, always)
        return compiled.select_compiled(call, budgets, always, min(GROUP_QUERIES, call.query.shape[2]))

    def scored_keys(self, call: AttentionCall, most: int) -> int:
        """Exact scores are those of candidates: see `Selector.scored_keys`. Aggregation bounds what it forms itself."""
        return max(1024, min(call.key.shape[2], OVERSAMPLING * most))

    def uncompiled_reason(self, call: AttentionCall) -> str | None:
        """Why PyTorch looks for the keys of this call, and no compiled kernel; `None` if one does."""
        return compiled.unsupported_reason(call)


@torch.no_grad()
def select_by(aggregate: aggregation.Aggregate, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
    """Give each query its recent window and its sinks, and each of its heads the best of its candidates.

    Args:
        aggregate: Ranks past keys.
        call: A whole number of groups of `GROUP_QUERIES` queries, or fewer queries than that as one group.
        budgets: int64 `(batch, heads or 1, q_len)`.
        always: Sinks and recent window.
    """
    layout = GroupLayout.of(call, budgets, always, min(GROUP_QUERIES, call.query.shape[2]))
    kv_heads, last = call.key.shape[1], call.key.shape[2] - 1
    pairs = pairs_of(call.query, kv_heads, layout.size).to(accurate(call.query.dtype)) * call.scaling
    near = _Near.of(layout)
    positions = near.positions.clamp(max=last).expand(-1, kv_heads, -1, -1)
    if layout.ranked:
        kept_lse = aggregation.capped(_scores(pairs, call.key, positions), call.softcap)
        kept_lse = kept_lse.masked_fill(~near.counted, -torch.inf).logsumexp(-1)
        kept_lse = kept_lse.masked_fill(layout.stop <= layout.first, torch.inf)
        past, is_candidate = _best_past(aggregate(pairs, call, kept_lse, layout), layout)
    else:
        past, is_candidate = _all_past(layout)
    width = past.shape[-1] + positions.shape[-1]
    missing = -width % _TILE if width else _TILE
    past, is_candidate = F.pad(past.clamp(max=last), (missing, 0)), F.pad(is_candidate, (missing, 0))

    # From the oldest offered key to the most recent: of equal scores the last one wins.
    positions = torch.cat([past, positions], dim=-1)
    offered = is_candidate.unsqueeze(3) & (past.unsqueeze(3) >= layout.start.unsqueeze(-1))
    offered = torch.cat([offered, near.offered], dim=-1)
    scores = _scores(pairs, call.key, positions)
    best, taken = largest(scores.masked_fill(~offered, -torch.inf), layout.free, layout.most_free)
    allowed = torch.zeros_like(offered).scatter_(-1, best, taken)
    allowed[..., past.shape[-1] :] |= near.kept
    return Selection(positions, allowed, layout.size, per_head=False, scores=scores, number=layout.budget)


@dataclass(frozen=True)
class _Near:
    """Sinks and local keys of each group.

    Attributes:
        positions: int64 `(batch, 1, groups, width)`, padded with positions that may not exist.
        kept: bool `(batch, kv_heads, groups, pairs, width)`: what a pair keeps in any case.
        offered: What it may keep, of the same shape.
        counted: What it sees and is not ranked, of the same shape.
    """

    positions: Tensor
    kept: Tensor
    offered: Tensor
    counted: Tensor

    @classmethod
    def of(cls, layout: GroupLayout) -> _Near:
        positions = torch.cat([_from(layout.oldest, layout.sinks), _from(layout.low, layout.local)], dim=-1)
        is_local = torch.arange(positions.shape[-1], device=positions.device) >= layout.sinks
        begin, low, place = (x.unsqueeze(3) for x in (layout.begin, layout.low, positions))
        first, stop, start, recent = (x.unsqueeze(-1) for x in (layout.first, layout.stop, layout.start, layout.recent))
        seen = (place >= first) & (place < stop) & (is_local == (place >= low))
        return cls(
            positions,
            seen & ((place < start) | (is_local & (place >= recent))),
            seen & is_local & (place >= start) & (place < recent),
            seen & (is_local | (place < begin)),
        )


def _all_past(layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """All past keys of each group, int64 `(batch, kv_heads, groups, width)`, and which of them there are."""
    past = _from(layout.begin, layout.most_candidates).expand(-1, layout.candidates.shape[1], -1, -1)
    return past, past - layout.begin < layout.candidates.unsqueeze(-1)


def _best_past(scores: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """The candidates of each group by aggregated scores: as `_all_past`, rising."""
    position = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill((position < layout.begin) | (position >= layout.low), -torch.inf)
    past, taken = largest(scores, layout.candidates, layout.most_candidates)
    past, order = past.sort(dim=-1)
    return past, taken.gather(-1, order)


def _from(start: Tensor, width: int) -> Tensor:
    """`width` positions from `start` `(..., 1)` on."""
    return start + torch.arange(width, device=start.device)


def _scores(pairs: Tensor, key: Tensor, positions: Tensor) -> Tensor:
    """Scores of the pairs of each group for the keys at `positions`, before any soft cap."""
    return pairs @ take_keys(key, positions).to(pairs.dtype).transpose(-1, -2)
