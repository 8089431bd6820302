"""How much attention a group of rows gives to each of many keys together, in few passes over the scores."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores that are alive at a time: they should stay in a processor's cache between the passes over them.
_CHUNK_ELEMENTS = 1 << 19

# e^60 keys of weight 1 and their sums stay far below the largest float32.
_HIGHEST = 60.0
_NEVER = -1e30


def votes(
    members: Tensor,
    keys: Tensor,
    certain: Tensor,
    column_bias: Tensor,
    visible: Tensor | None = None,
    variance: Tensor | None = None,
) -> Tensor:
    """Attention weights of the members of each group, summed over the members.

    A member's weights are relative to all that it attends to: these keys, and what is `certain`.

    Args:
        members: Scaled queries `(batch, kv_heads, groups, members, head_dim)`.
        keys: `(batch, kv_heads, groups or 1, keys, head_dim)`, in the dtype of `members`.
        certain: `(batch, kv_heads, groups, members)`: log of the summed exponentials of the scores of the keys that a
            member attends to anyway; inf for a member without a vote.
        column_bias: `(batch, kv_heads or 1, groups, keys)`: what to add to the scores of a key; -inf for one that no
            member sees.
        visible: bool `(batch, kv_heads, groups, members, keys)`, or `None` where members differ in nothing that
            `column_bias` does not say.
        variance: Of the shape of `keys`: sqrt(sum of variance * member^2) is added to a score; or `None`.

    Returns:
        `(batch, kv_heads, groups, keys)`; 0 for what nobody sees.
    """
    batch, kv_heads, groups, size, _ = members.shape
    width = keys.shape[3]
    # One more component carries what is to be added to a score by row: that saves a pass over the scores.
    base = certain.clamp(max=-_NEVER).unsqueeze(-1)
    rows = torch.cat([members, -base], dim=-1)
    columns = torch.cat([keys, torch.ones_like(keys[..., :1])], dim=-1).transpose(-1, -2)
    bias = column_bias.clamp(min=_NEVER).unsqueeze(-2)
    out = members.new_empty(batch, kv_heads, groups, width)
    step = max(1, _CHUNK_ELEMENTS // (size * width))
    for b in range(batch):
        for h in range(kv_heads):
            for start in range(0, groups, step):
                part = slice(start, start + step)
                own = slice(None) if keys.shape[2] == 1 else part
                spread = None
                if variance is not None:
                    spread = (members[b, h, part].square() @ variance[b, h, own].transpose(-1, -2)).sqrt_()
                out[b, h, part] = _votes(
                    rows[b, h, part],
                    columns[b, h, own],
                    bias[b, h if bias.shape[1] > 1 else 0, part],
                    None if visible is None else visible[b, h, part],
                    spread,
                )
    return out


def _votes(rows: Tensor, columns: Tensor, bias: Tensor, visible: Tensor | None, spread: Tensor | None) -> Tensor:
    """Shares of exp(score) in 1 + its sum over the columns, summed over the rows."""
    scores = rows @ columns if spread is None else spread.add_(rows @ columns)
    scores += bias
    weights = scores.clamp(max=_HIGHEST).exp_()
    if visible is not None:
        weights *= visible
    total = weights.sum(-1).add_(1)
    if bool((total > torch.tensor(_HIGHEST).exp()).any()):
        # A key outweighs what is certain by more than numbers hold: measure from the best key instead.
        best = scores.amax(-1, keepdim=True).clamp_(min=0)
        weights = scores.sub_(best).exp_()
        if visible is not None:
            weights *= visible
        total = weights.sum(-1).add_(best.squeeze(-1).neg().exp())
    return (total.reciprocal().unsqueeze(-2) @ weights).squeeze(-2)
