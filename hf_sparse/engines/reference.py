"""The specification: dense attention with every key outside the selection masked."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.engines.base import Engine
from hf_sparse.engines.common import masked_weights, weighted_values


class Reference(Engine):
    """Dense masked attention: forms all q_len x kv_len scores."""

    name = "reference"

    def attend(self, call: AttentionCall, selection: Selection) -> Tensor:
        """Attention under the selection as a mask: see `Engine.attend`."""
        mask = selection.mask(call.query.shape[1], call.last_visible)
        return weighted_values(call, masked_weights(call, mask))
