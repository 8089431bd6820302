"""A coarse look at the keys: which blocks of neighbouring keys may hold what a group of rows wants.

Each block of `BLOCK` keys is summarised by its mean and its variance per component, so that looking at all blocks
costs 2 / BLOCK of looking at all keys. Means alone lose the one key that a copying head is after: with a spread on
top, half as many blocks lose less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_sparse.selection import AttentionInputs
from hf_sparse.selectors.votes import votes
from hf_sparse.summaries import BLOCK

OVERSAMPLING = 4
"""Keys that survive the coarse look, for each key that is wanted."""

# Standard deviations above its mean at which a block's best key is expected: that of 16 normal variables is 1.77.
_SPREAD = 1.5


def surviving_columns(
    members: Tensor, inputs: AttentionInputs, certain: Tensor, oldest: Tensor, low: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """The columns of the most promising blocks of keys, for each group by itself.

    Args:
        members: Scaled queries `(batch, kv_heads, groups, members, head_dim)`.
        inputs: For the keys and their summaries, and the column at which the first block of each sequence begins.
        certain: `(batch, kv_heads, groups, members)`: log of the summed exponentials of the scores of the keys that
            a member attends to anyway; inf for a member without a vote.
        oldest: int64 `(batch, groups)`: first column looked for.
        low: int64 `(batch, groups)`: column before which columns are looked for.
        wanted: int64 `(batch, kv_heads, groups)`: columns that the group has use for.

    Returns:
        Columns, int64 `(batch, kv_heads, groups, width)`, rising, and which of them are survivors that lie in
        `[oldest, low)`: at least `wanted`, if there are as many.
    """
    kv_len, origin = inputs.last_visible, inputs.text_start
    count = -(-kv_len // BLOCK)
    start = origin[:, None] + torch.arange(count, device=members.device) * BLOCK
    start, oldest, low = start[:, None, None], oldest[:, None, :, None], low[:, None, :, None]
    # Of blocks on either edge only a part is looked for, so that their summaries mislead: they survive anyway.
    inside = (start >= oldest) & (start + BLOCK <= low)
    edge = (start < low) & (start + BLOCK > oldest) & ~inside
    take = -(-OVERSAMPLING * wanted // BLOCK)
    if bool((take >= inside.sum(-1)).all()):
        shares = torch.zeros(inside.shape, device=members.device)
    else:
        mean, variance = inputs.own_summaries.blocks(inputs.key, origin.tolist(), kv_len, count)
        nobody = torch.zeros(inside.shape, dtype=members.dtype, device=members.device)
        bias = nobody.masked_fill_(~inside, -torch.inf) + math.log(BLOCK)
        shares = votes(members, mean.unsqueeze(2), certain, bias, variance=variance.unsqueeze(2) * _SPREAD**2)
    shares = shares.masked_fill(~inside, -torch.inf).masked_fill(edge, torch.inf)
    take = take + edge.sum(-1)
    order = shares.expand(*take.shape, -1).sort(dim=-1, descending=True, stable=True).indices
    order = order[..., : max(1, int(take.max()))]
    survives = (torch.arange(order.shape[-1], device=members.device) < take[..., None]) & (inside | edge).expand(
        *take.shape, -1
    ).gather(-1, order)
    blocks, place = order.sort(dim=-1)
    survives = survives.gather(-1, place)
    columns = origin[:, None, None, None] + blocks * BLOCK
    columns = (columns.unsqueeze(-1) + torch.arange(BLOCK, device=members.device)).flatten(3)
    valid = survives.repeat_interleave(BLOCK, dim=-1) & (columns >= oldest) & (columns < low)
    return columns.clamp(max=kv_len - 1), valid


def expected_scores(
    members: Tensor, mean: Tensor, variance: Tensor, size: int = BLOCK, spread: float = _SPREAD
) -> Tensor:
    """Log of the summed exponentials of the scores that a block's keys are expected to have.

    Args:
        members: Scaled queries `(..., members, head_dim)`.
        mean: Of the keys of each block, `(..., blocks, head_dim)`.
        variance: Of the same, per component.
        size: Keys in a block.
        spread: Standard deviations above its mean at which a block's best key is expected.

    Returns:
        `(..., members, blocks)`.
    """
    scores = (members.square() @ variance.transpose(-1, -2)).sqrt_().mul_(spread)
    return scores.add_(members @ mean.transpose(-1, -2)).add_(math.log(size))
