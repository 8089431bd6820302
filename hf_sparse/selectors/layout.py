"""Where the (query, head) pairs of each group look for keys, and how many they keep: all that is known before scores.

A group is `size` queries over the heads of a GQA group. Three ranges of keys are the same for all its pairs: sinks up
to `begin`, past keys from `begin` to `low`, and local keys from `low` on. A pair keeps its own sinks and its own recent
window in any case. The remaining budget goes to its highest-scoring candidates: local keys that are neither, and the
group's candidates among the past keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.call import AlwaysKept, AttentionCall, pairs_of

OVERSAMPLING = 2
"""Candidates of a group for each key that any of its pairs has room for at most."""


@dataclass(frozen=True)
class GroupLayout:
    """Key positions and numbers of keys of the groups of a call.

    Tensors are int64, on the device of the call: of groups `(batch, 1, groups, 1)`, of their pairs
    `(batch, kv_heads, groups, pairs)`.

    Attributes:
        size: Queries in a group.
        sinks: Most keys from `oldest` on that are sinks of pairs of a group, and not local.
        local: Most local keys of a group.
        past: For each group the first of its past keys, and the position after the last one, of any sequence.
        most_candidates: Most candidates of a group.
        most_free: Most of what is left of a budget.
        ranked: Whether any group has fewer candidates than past keys, which then must be ranked.
        all_see_past: Whether each pair sees all past keys of its group, but for pad tokens.
        oldest: Of groups: the first key that a query sees.
        begin: The first of the past keys.
        low: The first of the local keys.
        candidates: How many past keys become candidates, `(batch, kv_heads, groups)`.
        first: Of pairs: the first key that it sees.
        stop: The key after the last one that it sees.
        start: The key after its own sinks.
        recent: The first key of its own recent window.
        budget: Keys that it keeps.
        free: Keys that it keeps besides its own sinks and recent window.
    """

    size: int
    sinks: int
    local: int
    past: list[tuple[int, int]]
    most_candidates: int
    most_free: int
    ranked: bool
    all_see_past: bool
    oldest: Tensor
    begin: Tensor
    low: Tensor
    candidates: Tensor
    first: Tensor
    stop: Tensor
    start: Tensor
    recent: Tensor
    budget: Tensor
    free: Tensor

    @classmethod
    def of(cls, call: AttentionCall, budgets: Tensor, always: AlwaysKept, size: int) -> GroupLayout:
        """The layout of a whole number of groups, for budgets int64 `(batch, heads or 1, q_len)` on the CPU."""
        batch, heads, queries, _ = call.query.shape
        kv_heads, device = call.key.shape[1], call.query.device
        ranges = call.ranges
        # On the CPU, and moved at the end: so many small steps, and reading their results, would keep a GPU waiting.
        begins, ends = (x.reshape(batch, 1, -1, size) for x in (ranges.first, ranges.stop))
        alive = ends > begins
        oldest = torch.where(alive, begins, ranges.last_visible).amin(-1, keepdim=True)
        latest = torch.where(alive, ends, ranges.last_visible).amin(-1, keepdim=True)
        low = torch.maximum(latest - max(1, always.recent_keys), oldest)
        begin = torch.minimum(oldest + always.sink_keys, low)
        sinks_stop = torch.minimum(torch.where(alive, begins, 0).amax(-1, keepdim=True) + always.sink_keys, low)
        local_stop = torch.where(alive, ends, 0).amax(-1, keepdim=True)

        first, stop, budget = (
            pairs_of(x.expand(batch, heads, queries), kv_heads, size)
            for x in (ranges.first[:, None], ranges.stop[:, None], budgets.cpu())
        )
        own_sinks, recent = always.split(budget)
        start = first + own_sinks
        free = budget - recent - own_sinks
        # Pairs that do not see a group's oldest keys (sliding windows) may find candidates that they cannot take: there
        # is room for those as well.
        wanted = torch.where(free > 0, free + (start - begin).clamp(min=0), 0).amax(-1)
        candidates = torch.minimum(OVERSAMPLING * wanted, (low - begin)[..., 0])
        sinks, local = sinks_stop - oldest, local_stop - low
        groups = torch.stack([oldest, begin, low]).to(device)
        pairs = torch.stack([first, stop, start, stop - recent, budget, free]).to(device)
        return cls(
            size=size,
            sinks=max(0, int(sinks.max())),
            local=max(0, int(local.max())),
            past=list(zip(begin.amin((0, 1, 3)).tolist(), low.amax((0, 1, 3)).tolist(), strict=True)),
            most_candidates=int(candidates.max()),
            most_free=int(free.max()),
            ranked=bool((candidates < (low - begin)[..., 0]).any()),
            all_see_past=bool(((first <= begin) | (stop <= first)).all()),
            candidates=candidates.to(device),
            **dict(zip(("oldest", "begin", "low"), groups, strict=True)),
            **dict(zip(("first", "stop", "start", "recent", "budget", "free"), pairs, strict=True)),
        )
