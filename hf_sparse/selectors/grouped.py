"""The grouped selector: members of a group vote on every older key, and each picks its own of the best.

A group is 64 neighbouring rows, or the one row of a decoding step, over the heads of a GQA group. One set of keys for
all its members is a dense matrix product, which is what hardware is good at. Each member keeps its own sinks and recent
keys. The older keys that the members want most together, `OVERSAMPLING` times as many as any of them has room for, are
the group's pool; with the rest of its budget, a member keeps the keys of the pool, and the other local ones, that have
its own highest scores. In one pass over a whole text, the keys of a row so depend a little on the other rows of its
group.

Compiled kernels do all of this on processors, and the votes on GPUs, with 8-bit scores for the votes. Everything else
runs on PyTorch, with exact scores for the votes: the same choice but for votes that are nearly equal, and slower than
dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall, Selection, accurate, members_of, take_rows
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.selectors import compiled, voting
from hf_sparse.selectors.spans import Spans
from hf_sparse.selectors.topk import largest

ROWS = 64
"""Query rows in a group. A block of rows given to the selector is cut into groups of this many from its start."""

# Engines read columns this many at a time.
_TILE = 16


def uncompiled(inputs: AttentionCall, config: SparseAttentionConfig) -> str | None:
    """Why PyTorch looks for the keys of this call, and no compiled kernel; `None` if one does."""
    return voting.refusal(inputs) if voting.for_gpus(inputs, config) else compiled.refusal(inputs)


@torch.no_grad()
def select_grouped(inputs: AttentionCall, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """Give each row its recent keys and its sinks, and each of its heads the best of the other keys it is offered.

    Args:
        inputs: Query rows: a whole number of groups of `ROWS` rows, or fewer rows than that as one group.
        budgets: int64 `(batch, heads or 1, rows)`, on the device of the call or on the CPU.
        config: For `sink_keys`, `recent_keys` and `engine`.
    """
    size = min(ROWS, inputs.query.shape[2])
    kernels = uncompiled(inputs, config) is None
    if kernels and not voting.for_gpus(inputs, config):
        return compiled.select_compiled(inputs, budgets, config, size)
    spans = Spans.of(inputs, budgets, config, size)
    return _select(inputs, spans, voting.votes_in_8_bits if kernels else voting.exact_votes)


def _select(inputs: AttentionCall, spans: Spans, vote: voting.Vote) -> Selection:
    kv_heads, last = inputs.key.shape[1], inputs.key.shape[2] - 1
    members = members_of(inputs.query, kv_heads, spans.size).to(accurate(inputs.query.dtype)) * inputs.scaling
    near = _Near.of(spans)
    columns = near.columns.clamp(max=last).expand(-1, kv_heads, -1, -1)
    if spans.votes_wanted:
        certain = voting.capped(_scores(members, inputs.key, columns), inputs.softcap)
        certain = certain.masked_fill(~near.counted, -torch.inf).logsumexp(-1)
        certain = certain.masked_fill(spans.stop <= spans.first, torch.inf)
        pool, in_pool = _best_older(vote(members, inputs, certain, spans), spans)
    else:
        pool, in_pool = _all_older(spans)
    width = pool.shape[-1] + columns.shape[-1]
    missing = -width % _TILE if width else _TILE
    pool, in_pool = F.pad(pool.clamp(max=last), (missing, 0)), F.pad(in_pool, (missing, 0))

    # From the oldest offered key to the most recent: of equal scores the last one wins.
    columns = torch.cat([pool, columns], dim=-1)
    offered = in_pool.unsqueeze(3) & (pool.unsqueeze(3) >= spans.start.unsqueeze(-1))
    offered = torch.cat([offered, near.offered], dim=-1)
    scores = _scores(members, inputs.key, columns)
    best, taken = largest(scores.masked_fill(~offered, -torch.inf), spans.rest, spans.most_rest)
    allowed = torch.zeros_like(offered).scatter_(-1, best, taken)
    allowed[..., pool.shape[-1] :] |= near.kept
    return Selection(columns, allowed, spans.size, per_head=False, scores=scores, number=spans.budget)


@dataclass(frozen=True)
class _Near:
    """Sinks and local keys of each group.

    Attributes:
        columns: int64 `(batch, 1, groups, width)`, padded with columns that may not exist.
        kept: bool `(batch, kv_heads, groups, members, width)`: what a member keeps in any case.
        offered: What it may keep, of the same shape.
        counted: What it sees and no vote is about, of the same shape.
    """

    columns: Tensor
    kept: Tensor
    offered: Tensor
    counted: Tensor

    @classmethod
    def of(cls, spans: Spans) -> _Near:
        columns = torch.cat([_from(spans.oldest, spans.sinks), _from(spans.low, spans.local)], dim=-1)
        is_local = torch.arange(columns.shape[-1], device=columns.device) >= spans.sinks
        begin, low, place = (x.unsqueeze(3) for x in (spans.begin, spans.low, columns))
        first, stop, start, recent = (x.unsqueeze(-1) for x in (spans.first, spans.stop, spans.start, spans.recent))
        seen = (place >= first) & (place < stop) & (is_local == (place >= low))
        return cls(
            columns,
            seen & ((place < start) | (is_local & (place >= recent))),
            seen & is_local & (place >= start) & (place < recent),
            seen & (is_local | (place < begin)),
        )


def _all_older(spans: Spans) -> tuple[Tensor, Tensor]:
    """All older keys of each group, int64 `(batch, kv_heads, groups, width)`, and which of them there are."""
    pool = _from(spans.begin, spans.most_in_pool).expand(-1, spans.pool.shape[1], -1, -1)
    return pool, pool - spans.begin < spans.pool.unsqueeze(-1)


def _best_older(votes: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """The pool of each group by the votes on its older keys: as `_all_older`, rising."""
    column = torch.arange(votes.shape[-1], device=votes.device)
    votes = votes.masked_fill((column < spans.begin) | (column >= spans.low), -torch.inf)
    pool, taken = largest(votes, spans.pool, spans.most_in_pool)
    pool, order = pool.sort(dim=-1)
    return pool, taken.gather(-1, order)


def _from(start: Tensor, width: int) -> Tensor:
    """`width` columns from `start` `(..., 1)` on."""
    return start + torch.arange(width, device=start.device)


def _scores(members: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """Scores of the members of each group for the keys at `columns`, before any soft cap."""
    return members @ take_rows(key, columns).to(members.dtype).transpose(-1, -2)
