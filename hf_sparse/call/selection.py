"""The keys that the queries of a block keep, as a selector gives them to an engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_sparse.call.call import pairs_of


@dataclass(frozen=True)
class Selection:
    """The keys that a block of queries keeps.

    Queries are cut into `groups` for each key head, and the (query, head) pairs of a group draw on the same candidate
    keys. A pair is found at `(kv_head, group, pair)` through `pairs_of` and back through `queries_of`.

    Attributes:
        positions: int64 `(batch, kv_heads, groups, width)`: candidate key positions, each named at most once where
            allowed.
        allowed: bool `(batch, kv_heads, groups, pairs, width)`: which candidates a pair attends to; what is False pads
            a group to the common width.
        queries_per_group: Queries in one group. `pairs = queries_per_group * heads`, where heads is the GQA group
            size, or 1 if `per_head`.
        per_head: Whether each query head has groups of its own, ordered by (head in the GQA group, query).
        scores: If the selector knows them, `(batch, kv_heads, groups, pairs, width)`: products of the pairs' queries
            and the candidate keys, times the scaling. They carry no gradient.
        number: If the selector knows it, int64 `(batch, kv_heads, groups, pairs)`: keys that a pair attends to.
    """

    positions: Tensor
    allowed: Tensor
    queries_per_group: int
    per_head: bool
    scores: Tensor | None = None
    number: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, kv_heads: int) -> Selection:
        """The selection that a mask shows: the simple way to write a selector, with all keys as candidates.

        Args:
            mask: bool `(batch, heads, q_len, kv_len)`: the keys that each query keeps.
            kv_heads: Key heads of the call.
        """
        batch, heads, queries, kv_len = mask.shape
        positions = torch.arange(kv_len, device=mask.device).expand(batch, kv_heads, 1, -1)
        allowed = mask.reshape(batch, kv_heads, 1, heads // kv_heads * queries, kv_len)
        return cls(positions, allowed, queries_per_group=queries, per_head=False)

    @property
    def shares_nothing(self) -> bool:
        """Whether every query and head has candidates of its own."""
        return self.per_head and self.queries_per_group == 1

    def pairs_of(self, queries: Tensor, kv_heads: int) -> Tensor:
        """`(batch, heads, q_len, ...)` -> `(batch, kv_heads, groups, pairs, ...)`."""
        pairs = pairs_of(queries, kv_heads, self.queries_per_group)
        if not self.per_head:
            return pairs
        batch, _, groups, _, *rest = pairs.shape
        x = pairs.view(batch, kv_heads, groups, -1, self.queries_per_group, *rest)
        return x.transpose(2, 3).flatten(2, 3)

    def queries_of(self, pairs: Tensor, heads: int) -> Tensor:
        """The inverse of `pairs_of`."""
        batch, kv_heads, groups, _, *rest = pairs.shape
        if groups == 1:
            return pairs.reshape(batch, heads, -1, *rest)
        share = heads // kv_heads
        size = self.queries_per_group
        if self.per_head:
            x = pairs.reshape(batch, kv_heads, share, groups // share, size, *rest)
        else:
            x = pairs.reshape(batch, kv_heads, groups, share, size, *rest).transpose(2, 3)
        return x.reshape(batch, heads, -1, *rest)

    def mask(self, heads: int, kv_len: int) -> Tensor:
        """The selection as a bool mask `(batch, heads, q_len, kv_len)`, for engines and measures that are dense."""
        batch, kv_heads, groups, pairs, _ = self.allowed.shape
        # A padded candidate may name a key that is allowed elsewhere: send it to a position of its own.
        positions = torch.where(self.allowed, self.positions.unsqueeze(3), kv_len)
        out = torch.zeros(batch, kv_heads, groups, pairs, kv_len + 1, dtype=torch.bool, device=positions.device)
        return self.queries_of(out.scatter_(-1, positions, True)[..., :kv_len], heads)

    def kept(self, heads: int) -> Tensor:
        """Kept keys of each query: int64 `(batch, heads, q_len)`."""
        if self.number is not None:
            return self.queries_of(self.number, heads)
        # Bytes are summed many times faster than truth values.
        return self.queries_of(self.allowed.view(torch.uint8).sum(-1, dtype=torch.int32).long(), heads)


class SharedSelection(Selection):
    """A selection in which each pair keeps a few runs of the list of its group: little to store, and no mask to read.

    Attributes:
        runs: int64 `(batch, kv_heads, groups, pairs, runs, 2)`: place in the list of the first key of each run, and the
            place after its last. Runs do not overlap; an empty one has no keys.
        budgets: If known, int64 `(batch, heads, q_len)` on any device: the keys in the runs of each query.
    """

    runs: Tensor
    budgets: Tensor | None

    def __init__(self, positions: Tensor, runs: Tensor, queries_per_group: int, budgets: Tensor | None = None) -> None:
        for name, value in (
            ("positions", positions),
            ("runs", runs),
            ("queries_per_group", queries_per_group),
            ("per_head", False),
            ("scores", None),
            ("budgets", budgets),
        ):
            object.__setattr__(self, name, value)

    @cached_property
    def number(self) -> Tensor:
        """Keys that a pair attends to, int64 `(batch, kv_heads, groups, pairs)`."""
        return (self.runs[..., 1] - self.runs[..., 0]).sum(-1)

    def kept(self, heads: int) -> Tensor:
        """Kept keys of each query: see `Selection.kept`."""
        return super().kept(heads) if self.budgets is None else self.budgets

    @cached_property
    def allowed(self) -> Tensor:
        """Which keys of its list a pair attends to: bool `(batch, kv_heads, groups, pairs, width)`."""
        place = torch.arange(self.positions.shape[-1], device=self.positions.device)
        out = torch.zeros((*self.runs.shape[:4], len(place)), dtype=torch.bool, device=place.device)
        for run in self.runs.unbind(-2):
            out |= (place >= run[..., :1]) & (place < run[..., 1:])
        return out
