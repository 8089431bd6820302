"""What the (query, head) pairs of each group keep, but for which keys of the past: all that is known before scores.

A group is `size` queries over the heads of a GQA group. The keys that they see lie in three ranges: first keys, which
are attention sinks of some pair, up to `edge_stop`; local keys from `local_start` on, which are recent to some pair;
and the past between them, which all pairs see. A pair spends its budget on its recent keys, its sinks, other local keys
from the latest on, keys of the past, and what is left on further first keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.call import AlwaysKept, AttentionCall, pairs_of


@dataclass(frozen=True)
class GroupLayout:
    """Key positions and numbers of keys of the groups of a call.

    Tensors are int64, on the device of the call: of groups `(batch, 1, groups, 1)`, of their pairs
    `(batch, kv_heads, groups, pairs)`. Ranges lack their last position.

    Attributes:
        size: Queries in a group.
        near: Most first and local keys of a group.
        past: For each group the range of its past, of any sequence.
        most_ranked: Most keys of the past that a pair keeps.
        oldest: Of groups: the first key that a query sees.
        edge_stop: The key after the first keys, where the past begins.
        local_start: The first of the local keys, where the past ends.
        last_stop: The key after the last one that a query sees.
        first: Of pairs: the first key that it sees, and keeps.
        first_stop: The key after those that it keeps from there on.
        last_start: The first of those that it keeps up to the last that it sees.
        stop: The key after that.
        ranked: How many keys of the past it keeps.
    """

    size: int
    near: int
    past: list[tuple[int, int]]
    most_ranked: int
    oldest: Tensor
    edge_stop: Tensor
    local_start: Tensor
    last_stop: Tensor
    first: Tensor
    first_stop: Tensor
    last_start: Tensor
    stop: Tensor
    ranked: Tensor

    @classmethod
    def of(cls, call: AttentionCall, budgets: Tensor, always: AlwaysKept, size: int) -> GroupLayout:
        """The layout of a whole number of groups, for budgets int64 `(batch, heads or 1, q_len)` on the CPU."""
        batch, heads, queries, _ = call.query.shape
        kv_heads, device = call.key.shape[1], call.query.device
        ranges = call.ranges
        # On the CPU, and moved at the end: so many small steps, and reading their results, would keep a GPU waiting.
        begins, ends = (x.reshape(batch, 1, -1, size) for x in (ranges.first, ranges.stop))
        alive = ends > begins
        last_stop = torch.where(alive, ends, 0).amax(-1, keepdim=True)
        oldest = torch.minimum(torch.where(alive, begins, ranges.last_visible).amin(-1, keepdim=True), last_stop)
        edge_stop = torch.where(alive, begins, 0).amax(-1, keepdim=True) + always.sink_keys
        edge_stop = torch.minimum(edge_stop, last_stop)
        least_stop = torch.where(alive, ends, ranges.last_visible).amin(-1, keepdim=True)
        local_start = torch.maximum(least_stop - max(1, always.recent_keys), edge_stop)

        first, stop, budget = (
            pairs_of(x.expand(batch, heads, queries), kv_heads, size)
            for x in (ranges.first[:, None], ranges.stop[:, None], budgets.cpu())
        )
        sinks, recent = always.split(budget)
        left = budget - recent - sinks
        local = (stop - recent - torch.maximum(local_start, first + sinks)).clamp(min=0)
        more = torch.minimum(left, local)
        ranked = torch.minimum(left - more, local_start - edge_stop)
        ranked = torch.where(stop > first, ranked, 0)
        first_stop = first + sinks + left - more - ranked
        groups = torch.stack([oldest, edge_stop, local_start, last_stop]).to(device)
        pairs = torch.stack([first, first_stop, stop - recent - more, stop, ranked]).to(device)
        return cls(
            size=size,
            near=int((edge_stop - oldest + last_stop - local_start).max()),
            past=list(zip(edge_stop.amin((0, 1, 3)).tolist(), local_start.amax((0, 1, 3)).tolist(), strict=True)),
            most_ranked=int(ranked.max()),
            **dict(zip(("oldest", "edge_stop", "local_start", "last_stop"), groups, strict=True)),
            **dict(zip(("first", "first_stop", "last_start", "stop", "ranked"), pairs, strict=True)),
        )

    @property
    def past_size(self) -> Tensor:
        """Keys of the past, of groups."""
        return self.local_start - self.edge_stop

    def near_positions(self) -> Tensor:
        """First and local keys of each group, `(batch, 1, groups, near)`; where there are fewer, any others follow."""
        positions = torch.arange(self.near, device=self.oldest.device) + self.oldest
        return torch.where(positions < self.edge_stop, positions, positions + self.past_size)

    def place_of(self, position: Tensor) -> Tensor:
        """The places of first or local keys of pairs in the list of `near_positions`."""
        return position - self.oldest - torch.where(position >= self.local_start, self.past_size, 0)
