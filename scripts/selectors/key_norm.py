"""Keep the keys of smallest norm: no query is looked at.

hf-sparse perplexity MODEL --methods topk,scripts/selectors/key_norm.py:KeyNorm
"""

from dataclasses import dataclass

from torch import Tensor

import hf_sparse


@dataclass(frozen=True)
class KeyNorm(hf_sparse.ScoreSelector):
    """Keep the keys of smallest L2 norm (arXiv 2406.11430)."""

    name: str = "key-norm"

    def score(self, query: Tensor, key: Tensor, call: hf_sparse.AttentionCall) -> Tensor:
        """The negative norm of each key, the same for all queries: `(batch, heads, 1, kv_len)`."""
        return -key.float().norm(dim=-1)[:, :, None].repeat_interleave(call.group_size, dim=1)
