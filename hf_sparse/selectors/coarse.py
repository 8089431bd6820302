"""A coarse look at the keys: which blocks of neighbouring keys may hold what a group of rows wants.

Each block of `BLOCK` keys is summarised by its mean and its variance per component, so that looking at all blocks
costs 2 / BLOCK of looking at all keys. Means alone lose the one key that a copying head is after: with a spread on
top, half as many blocks lose less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 16
"""Neighbouring keys that are summarised together."""

OVERSAMPLING = 4
"""Keys that survive the coarse look, for each key that is wanted."""

# Standard deviations above its mean at which a block's best key is expected: that of 16 normal variables is 1.77.
_SPREAD = 1.5


def surviving_columns(
    members: Tensor, keys: Tensor, certain: Tensor, origin: Tensor, oldest: Tensor, low: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """The columns of the most promising blocks of keys, for each group by itself.

    Args:
        members: Scaled queries `(batch, kv_heads, groups, members, head_dim)`.
        keys: `(batch, kv_heads, kv_len, head_dim)`, in the dtype of `members`.
        certain: `(batch, kv_heads, groups, members)`: log of the summed exponentials of the scores of the keys that
            a member attends to anyway; inf for a member without a vote.
        origin: int64 `(batch,)`: column at which the first block of each sequence begins.
        oldest: int64 `(batch, groups)`: first column looked for.
        low: int64 `(batch, groups)`: column before which columns are looked for.
        wanted: int64 `(batch, kv_heads, groups)`: columns that the group has use for.

    Returns:
        Columns, int64 `(batch, kv_heads, groups, width)`, rising, and which of them are survivors that lie in
        `[oldest, low)`: at least `wanted`, if there are as many.
    """
    kv_len = keys.shape[2]
    count = -(-kv_len // BLOCK)
    start = origin[:, None] + torch.arange(count, device=keys.device) * BLOCK
    start, oldest, low = start[:, None, None], oldest[:, None, :, None], low[:, None, :, None]
    # Of blocks on either edge only a part is looked for, so that their summaries mislead: they survive anyway.
    inside = (start >= oldest) & (start + BLOCK <= low)
    edge = (start < low) & (start + BLOCK > oldest) & ~inside
    take = -(-OVERSAMPLING * wanted // BLOCK)
    if bool((take >= inside.sum(-1)).all()):
        votes = torch.zeros(inside.shape, device=keys.device)
    else:
        votes = _votes(members, keys, certain, origin, inside)
    votes = votes.masked_fill(~inside, -torch.inf).masked_fill(edge, torch.inf)
    take = take + edge.sum(-1)
    order = votes.expand(*take.shape, -1).sort(dim=-1, descending=True, stable=True).indices
    order = order[..., : max(1, int(take.max()))]
    survives = (torch.arange(order.shape[-1], device=keys.device) < take[..., None]) & (inside | edge).expand(
        *take.shape, -1
    ).gather(-1, order)
    blocks, place = order.sort(dim=-1)
    survives = survives.gather(-1, place)
    columns = origin[:, None, None, None] + blocks * BLOCK
    columns = (columns.unsqueeze(-1) + torch.arange(BLOCK, device=keys.device)).flatten(3)
    valid = survives.repeat_interleave(BLOCK, dim=-1) & (columns >= oldest) & (columns < low)
    return columns.clamp(max=kv_len - 1), valid


def _votes(members: Tensor, keys: Tensor, certain: Tensor, origin: Tensor, inside: Tensor) -> Tensor:
    """Log of the attention weight that a group's members are expected to give to each block, summed over them.

    A weight is relative to all that a member attends to: the blocks `inside`, and what is `certain`.
    """
    batch, kv_heads, kv_len, dim = keys.shape
    count = inside.shape[-1]
    if bool((origin > 0).any()):
        index = (origin[:, None] + torch.arange(kv_len, device=keys.device)).clamp(max=kv_len - 1)
        keys = keys.gather(2, index[:, None, :, None].expand(-1, kv_heads, -1, dim))
    blocks = F.pad(keys, (0, 0, 0, count * BLOCK - kv_len)).view(batch, kv_heads, 1, count, BLOCK, dim)
    mean = blocks.mean(4)
    variance = (blocks.square().mean(4) - mean.square()).clamp(min=0)
    scores = members @ mean.transpose(-1, -2) + math.log(BLOCK)
    scores += _SPREAD * (members.square() @ variance.transpose(-1, -2)).sqrt()
    scores += torch.zeros(inside.shape, device=keys.device).masked_fill_(~inside, -torch.inf).unsqueeze(3)
    total = torch.logaddexp(scores.logsumexp(-1), certain)
    return (scores - total.unsqueeze(-1)).logsumexp(3)
