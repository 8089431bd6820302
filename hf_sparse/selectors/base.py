"""`Selector` and `ScoreSelector`: what a rule that chooses keys must offer, and most of what such a rule needs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_sparse.call import AlwaysKept, AttentionCall, Selection, accurate
from hf_sparse.errors import UserError
from hf_sparse.visibility import interval_to_mask


class Selector:
    """A rule that gives every query the keys it attends to: subclass it, and pass an instance to `hf_sparse.patch`.

    Most rules only rank keys: `ScoreSelector` is the shorter way then. Make a subclass a frozen dataclass, so that its
    fields are its settings and equal settings are equal selectors.

    Attributes:
        name: What records, tables and plots call it.
        group_queries: Neighbouring query positions that choose together; 1 if each chooses for itself. Blocks of
            queries begin at multiples of it, counted from the first token of each sequence's text, so that padding and
            the other sequences of a batch change nothing.
        ranks_quantised: Whether it reads `call.own_quantised`, the keys in few bits that a cache keeps.
    """

    name: str = ""
    group_queries: int = 1
    ranks_quantised: bool = False

    def select(self, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
        """The keys that each query keeps.

        Args:
            call: A block of queries, at most as many as `scored_keys` lets fit into memory.
            budgets: int64 `(batch, heads or 1, q_len)`, on the CPU: keys that each query keeps, at most those it sees.
            always: Sink and recent keys, which are part of every budget.

        Returns:
            A selection in which every query has its budget of keys, all of them visible to it; any other is refused.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(call, budgets, always)")

    def decode(self, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Tensor | None:
        """Attention of single queries to the keys that `select` would keep, for a rule whose kernels do both at once.

        Args:
            call: A query of each sequence.
            budgets: As for `select`.
            always: As for `select`.

        Returns:
            As `Engine.attend`; `None` where `select` and an engine are to do it.
        """
        return None

    def scored_keys(self, call: AttentionCall, most: int) -> int:
        """Scores that `select` forms for each query and head, which decides how many queries a block has.

        Args:
            call: The whole call.
            most: The largest budget in it.
        """
        return call.key.shape[2]

    def uncompiled_reason(self, call: AttentionCall) -> str | None:
        """Why a rule that has compiled kernels cannot use them in this call, which a report mentions."""
        return None


class ScoreSelector(Selector):
    """A rule that ranks keys: subclass it and define `score`.

    Every query keeps its recent keys and its sinks, and spends the rest of its budget on the keys with the highest
    scores. Keys that it does not see are left out, and of equal scores the more recent key wins, on every device.
    """

    def score(self, query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
        """How much each query wants each key.

        Args:
            query: `(batch, heads, q_len, head_dim)`, rotated.
            key: `(batch, kv_heads, kv_len, head_dim)`, rotated, not repeated over the GQA group.
            call: The call that they belong to; `call.group_size` query heads share one key head.

        Returns:
            Floating point, broadcastable to `(batch, heads, q_len, kv_len)`. NaN ranks last.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(query, key, call)")

    @torch.no_grad()
    def select(self, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
        """The keys of highest score: see `Selector.select`. Each query and head has a list of its own."""
        batch, heads, queries, _ = call.query.shape
        kv_heads, kv_len = call.key.shape[1], call.last_visible
        scores = self._scores(call, (batch, heads, queries, kv_len))
        budgets = budgets.to(scores.device)
        scores += _bias(call.intervals, budgets, kv_len, always)
        share = heads // kv_heads
        positions, allowed = largest(
            scores.reshape(batch, kv_heads, share * queries, kv_len),
            budgets.expand(batch, heads, queries).reshape(batch, kv_heads, share * queries),
            int(budgets.max()),
        )
        return Selection(positions, allowed.unsqueeze(3), queries_per_group=1, per_head=True)

    def _scores(self, call: AttentionCall, shape: tuple[int, int, int, int]) -> Tensor:
        """Finite scores of `shape`, in float32 or better, in memory of their own."""
        scores = self.score(call.query, call.key[:, :, : shape[3]], call)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            raise UserError(f"selector {self.name!r}: score must return a floating-point tensor; got {_kind(scores)}")
        try:
            scores = scores.to(accurate(scores.dtype)).expand(shape)
        except RuntimeError:
            raise UserError(
                f"selector {self.name!r}: score must be broadcastable to (batch, heads, q_len, kv_len) = {shape}; got "
                f"{tuple(scores.shape)}"
            ) from None
        limit = torch.finfo(scores.dtype)
        return scores.nan_to_num(nan=limit.min, posinf=limit.max, neginf=limit.min)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _bias(intervals: Tensor, budgets: Tensor, kv_len: int, always: AlwaysKept) -> Tensor:
    """What to add to scores: inf for keys that are always kept, -inf for invisible ones, 0 for the others.

    Shape `(batch, heads or 1, q_len, kv_len)`.
    """
    first, stop = intervals.unbind(-1)
    sinks, recent = always.split(budgets)
    window = torch.stack([stop - recent, stop.expand_as(recent)], dim=-1)
    start = torch.stack([first.expand_as(sinks), first + sinks], dim=-1)
    forced = interval_to_mask(window, kv_len) | interval_to_mask(start, kv_len)
    bias = torch.zeros(forced.shape, device=forced.device).masked_fill_(forced, torch.inf)
    return bias.masked_fill_(~interval_to_mask(intervals, kv_len), -torch.inf)


def largest(scores: Tensor, budgets: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `budgets` largest entries of each vector of scores; of equal ones, those further right.

    Args:
        scores: `(..., length)`; -inf entries are never taken.
        budgets: int64 `(...)`, each at most the number of entries above -inf.
        most: The largest budget.

    Returns:
        Their positions, int64 `(..., width)`, in no particular order, and which of them are taken, bool `(..., width)`,
        where `width` is one more than `most`, or `length` if that is less.
    """
    length = scores.shape[-1]
    width = min(most + 1, length)
    if scores.device.type == "cpu":
        # numpy selects and sorts with vector instructions: three times faster than torch.topk.
        array = scores.numpy()
        positions = torch.from_numpy(np.argpartition(array, length - width, axis=-1)[..., length - width :].copy())
        values = scores.gather(-1, positions)
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    else:
        values, positions = scores.topk(width, dim=-1)
        ordered = values
    last = ordered.gather(-1, (budgets - 1).clamp(min=0).unsqueeze(-1))
    after = ordered.gather(-1, budgets.clamp(max=width - 1).unsqueeze(-1))
    taken = (values >= last) & (budgets > 0).unsqueeze(-1)
    tied = ((last == after) & (budgets.unsqueeze(-1) < length) & (budgets > 0).unsqueeze(-1)).squeeze(-1)
    if bool(tied.any()):
        # Which of the equal scores came out is up to the backend: decide these again, by a stable sort.
        order = scores[tied].flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :width]
        positions[tied] = length - 1 - order
        taken[tied] = torch.arange(width, device=scores.device) < budgets[tied].unsqueeze(-1)
    return positions, taken
