"""The exact selector: each query and head keeps the keys with its own highest scores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_sparse.call import AttentionCall, accurate
from hf_sparse.selectors.base import ScoreSelector


@dataclass(frozen=True)
class TopK(ScoreSelector):
    """Keep the keys of highest attention score.

    All scores are formed, q_len x kv_len at a time: this selector measures quality, it does not save work.
    """

    name: str = "topk"

    def score(self, query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
        """Scaled products of queries and keys, `(batch, heads, q_len, kv_len)`; a soft cap leaves their order."""
        batch, heads, queries, dim = query.shape
        kv_heads, kv_len = key.shape[1:3]
        dtype = accurate(query.dtype)
        folded = query.reshape(batch, kv_heads, -1, dim).to(dtype)
        scores = (folded @ key.to(dtype).transpose(-1, -2)).mul_(call.scaling)
        return scores.view(batch, heads, queries, kv_len)
