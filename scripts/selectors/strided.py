"""Keep a fixed pattern: sinks, a recent window, and every n-th key before it, as far as the budget goes.

hf-sparse perplexity MODEL --methods topk,scripts/selectors/strided.py:Strided
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import hf_sparse


@dataclass(frozen=True)
class Strided(hf_sparse.Selector):
    """Spread what is left of a budget evenly over the keys between the sinks and the recent window.

    It has whole control: it says itself which keys each query keeps, as a mask.
    """

    name: str = "strided"

    @torch.no_grad()
    def select(
        self, call: hf_sparse.AttentionCall, budgets: Tensor, always: hf_sparse.AlwaysKept
    ) -> hf_sparse.Selection:
        """Exactly `budgets` keys of each query, the same for all heads with the same budget."""
        first, stop = call.intervals.long().unbind(-1)  # (batch, 1, q_len)
        budgets = budgets.to(first.device)  # (batch, heads or 1, q_len)
        sinks, recent = always.split(budgets)
        free = budgets - sinks - recent
        middle = stop - recent - first - sinks  # keys that a budget may be spread over
        position = torch.arange(call.key.shape[2], device=first.device)
        place = position - (first + sinks)[..., None]
        # Key i of the middle is kept where i * free / middle passes a whole number: `free` of them, evenly apart.
        steps = torch.stack([place, place + 1]) * free[..., None] // middle.clamp(min=1)[..., None]
        spread = (place >= 0) & (place < middle[..., None]) & (steps[1] > steps[0])
        kept = spread | (place < 0) | (place >= middle[..., None])
        visible = (position >= first[..., None]) & (position < stop[..., None])
        mask = (kept & visible).expand(-1, call.query.shape[1], -1, -1)
        return hf_sparse.Selection.from_mask(mask, kv_heads=call.key.shape[1])
