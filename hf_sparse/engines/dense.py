"""Dense attention through PyTorch's SDPA, for layers and calls that are not sparse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall
from hf_sparse.engines.reference import masked_weights, weighted_values
from hf_sparse.visibility import as_bool, interval_to_mask

# Elements of a mask, or of scores where SDPA cannot be used, that are alive at a time.
_BLOCK_ELEMENTS = 1 << 22


def attend(inputs: AttentionCall) -> Tensor:
    """Attend to every visible key: `(batch, heads, rows, value_dim)`; zeros for a row that sees none.

    Nothing of size rows x kv_len is formed: the rows are taken a block at a time where a mask is needed.
    """
    batch, heads, rows, _ = inputs.query.shape
    plain = inputs.softcap is None and inputs.sinks is None
    if plain and _is_causal(inputs):
        return _sdpa(inputs, mask=None, causal=rows > 1)
    step = max(1, _BLOCK_ELEMENTS // (inputs.key.shape[2] * batch * (1 if plain else heads)))
    parts = []
    for start in range(0, rows, step):
        block = inputs.rows(start, min(rows, start + step)).visible_part()
        mask = interval_to_mask(block.intervals, block.last_visible)
        if plain:
            # SDPA gives NaN for a row that sees nothing: let it see the first key, and drop the result.
            alive = mask.any(-1, keepdim=True)
            first = torch.arange(mask.shape[-1], device=mask.device) == 0
            parts.append(_sdpa(block, mask | (~alive & first), causal=False) * alive)
        else:
            parts.append(weighted_values(block, masked_weights(block, mask)))
    return torch.cat(parts, dim=2)


def attend_masked(inputs: AttentionCall, mask: Tensor) -> Tensor:
    """Attend under a mask that is not made of intervals; `inputs.intervals` is not read.

    Args:
        inputs: The whole call.
        mask: `(batch, heads or 1, rows, kv_len)`: a mask as `as_bool` takes it, or a bias.

    Raises:
        ValueError: For a bias together with softcap or attention sinks.
    """
    visible = as_bool(mask)
    if inputs.softcap is None and inputs.sinks is None:
        return _sdpa(inputs, mask.to(inputs.query.dtype) if visible is None else visible, causal=False)
    if visible is None:
        raise ValueError("an attention_mask that is a bias cannot be combined with softcap or attention sinks")
    return weighted_values(inputs, masked_weights(inputs, visible))


def _is_causal(inputs: AttentionCall) -> bool:
    """Whether SDPA's own causal mask, or none for a single row, is the mask of this call."""
    kv_len = inputs.key.shape[2]
    return inputs.query.shape[2] in (1, kv_len) and inputs.facts.causal(kv_len)


def _sdpa(inputs: AttentionCall, mask: Tensor | None, *, causal: bool) -> Tensor:
    key, value = inputs.key, inputs.value
    if mask is not None:
        key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
    return F.scaled_dot_product_attention(
        inputs.query,
        key,
        value,
        attn_mask=mask,
        dropout_p=inputs.dropout,
        is_causal=causal,
        scale=inputs.scaling,
        enable_gqa=inputs.group_size > 1,
    )
