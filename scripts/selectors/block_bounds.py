"""Keep whole blocks of keys by an upper bound of their scores, in the manner of Quest (arXiv 2406.10774).

hf-sparse perplexity MODEL --methods topk,scripts/selectors/block_bounds.py:BlockBounds
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import hf_sparse


@dataclass(frozen=True)
class BlockBounds(hf_sparse.ScoreSelector):
    """Rank blocks of neighbouring keys by the largest score that any key within their bounds could have.

    Blocks are counted from the first token of each text, so that padding changes nothing. The last block that a budget
    reaches is kept in part, its more recent keys first. In a prefill, the bounds of a query's own block also cover the
    keys that come after it.
    """

    name: str = "block-bounds"
    block: int = 16

    def score(self, query: Tensor, key: Tensor, call: hf_sparse.AttentionCall) -> Tensor:
        """The bound of the block of each key: `(batch, heads, q_len, kv_len)`."""
        key = key.float().repeat_interleave(call.group_size, dim=1)
        place = torch.arange(key.shape[2], device=key.device) - call.text_start.to(key.device)[:, None]
        # Keys before the text have a block of their own, the first one.
        index = torch.where(place < 0, 0, place // self.block + 1)[:, None, :, None].expand_as(key)
        blocks = key.new_full((*key.shape[:2], int(index.max()) + 1, key.shape[3]), -torch.inf)
        highest, lowest = (blocks.scatter_reduce(2, index, sign * key, "amax") for sign in (1, -1))
        # Of each component of a query, the end of the range that makes the product larger.
        query = query.float()
        bounds = query.clamp(min=0) @ highest.transpose(-1, -2) - query.clamp(max=0) @ lowest.transpose(-1, -2)
        return bounds.gather(3, index[:, :, None, :, 0].expand(-1, -1, query.shape[2], -1))
