"""What the visible intervals of a call's rows say, worked out once for all layers that are called with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_sparse.budget import Budget

# The attribute of a tensor of intervals that holds its facts.
_ATTRIBUTE = "_hf_sparse_facts"


@dataclass(frozen=True)
class Plan:
    """How many keys the rows of a call keep under one law.

    Attributes:
        budgets: Kept keys, int64 `(batch, heads or 1, rows)`, on the device of the call.
        host: The same on the CPU.
        dense: Whether every row keeps all the keys that it sees.
        dense_rows: Reason -> rows that keep all keys for it. Pad rows do not count.
    """

    budgets: Tensor
    host: Tensor
    dense: bool
    dense_rows: dict[str, int]

    @cached_property
    def most(self) -> int:
        """The largest budget."""
        return int(self.host.max())


class RowFacts:
    """Facts about the rows of one call, on the CPU unless said otherwise: `facts_of` makes and keeps them.

    On a GPU, reading a tensor waits for all work before it: here that happens once for all layers.

    Attributes:
        first: int64 `(batch, rows)`: the first key that a row sees.
        stop: int64 `(batch, rows)`: the key after the last one that it sees.
        visible: int64 `(batch, rows)`: keys that a row sees, on the device of the call.
        rows: Rows that see a key.
        total: Visible keys, summed over the rows.
        most_visible: Keys that the row with the most of them sees.
    """

    def __init__(self, intervals: Tensor) -> None:
        # NumPy takes a third of PyTorch's time for few numbers, and a decoded token has no time to spare.
        first, stop = intervals[:, 0].cpu().numpy().astype(np.int64).transpose(2, 0, 1).copy()
        seen = stop - first
        self.first, self.stop, self._seen = (torch.from_numpy(x) for x in (first, stop, seen))
        self.visible = self._seen.to(intervals.device)
        self.rows = int(np.count_nonzero(seen > 0))
        self.total = int(seen.sum())
        self.most_visible = int(seen.max())
        self._plans: dict[int, tuple[Budget, Plan]] = {}
        self._causal: dict[int, bool] = {}

    @cached_property
    def last_visible(self) -> int:
        """Columns from this one on are seen by no row; at least 1."""
        return max(1, int(self.stop.max()))

    def causal(self, kv_len: int) -> bool:
        """Whether every row sees exactly the keys up to its own, the last row being that of the last key."""
        if kv_len not in self._causal:
            rows = self.stop.shape[1]
            stop = np.arange(kv_len - rows + 1, kv_len + 1)
            self._causal[kv_len] = not self.first.numpy().any() and bool((self.stop.numpy() == stop).all())
        return self._causal[kv_len]

    def plan(self, law: Budget, table: Callable[[int], Tensor]) -> Plan:
        """The plan under `law`, whose `table(longest)` is `(heads or 1, at least longest + 1)`.

        It is kept for the very object `law`: comparing laws would take as long as a small layer's attention.
        """
        known = self._plans.get(id(law))
        if known is None:
            known = self._plans[id(law)] = (law, self._make_plan(law, table(self.last_visible)))
        return known[1]

    def _make_plan(self, law: Budget, table: Tensor) -> Plan:
        seen = self._seen
        if self.most_visible < law.dense_below:
            return Plan(self.visible[:, None], seen[:, None], dense=True, dense_rows=_short(law, self.rows))
        host = table[:, seen].transpose(0, 1)
        whole = (host >= seen[:, None]).all(1) & (seen > 0)
        short = whole & (seen < law.dense_below)
        covered = int((whole & ~short).sum())
        return Plan(
            budgets=host.to(self.visible.device),
            host=host,
            dense=int(whole.sum()) == self.rows,
            dense_rows=_short(law, int(short.sum()))
            | ({"the budget covers all visible keys": covered} if covered else {}),
        )


def _short(law: Budget, rows: int) -> dict[str, int]:
    return {f"fewer than {law.dense_below} visible keys": rows} if rows else {}


def facts_of(intervals: Tensor) -> RowFacts:
    """The facts about `intervals`, int32 `(batch, 1, rows, 2)`, which are not to be changed in place afterwards."""
    facts = getattr(intervals, _ATTRIBUTE, None)
    if not isinstance(facts, RowFacts):
        facts = RowFacts(intervals)
        setattr(intervals, _ATTRIBUTE, facts)
    return facts
