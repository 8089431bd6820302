"""Dense attention through PyTorch's SDPA, for layers and calls that are not sparse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall
from hf_sparse.engines.common import masked_weights, weighted_values
from hf_sparse.visibility import as_bool, interval_to_mask

# Elements of a mask, or of scores where SDPA cannot be used, that are alive at a time.
_BLOCK_ELEMENTS = 1 << 22


def attend(call: AttentionCall) -> Tensor:
    """Attend to every visible key: `(batch, heads, q_len, value_dim)`; zeros for a query that sees none.

    Nothing of size q_len x kv_len is formed: queries are taken a block at a time where a mask is needed.
    """
    batch, heads, queries, _ = call.query.shape
    plain = call.softcap is None and call.sinks is None
    if plain and _is_causal(call):
        return _sdpa(call, mask=None, causal=queries > 1)
    step = max(1, _BLOCK_ELEMENTS // (call.key.shape[2] * batch * (1 if plain else heads)))
    parts = []
    for start in range(0, queries, step):
        block = call.queries(start, min(queries, start + step)).visible_part()
        mask = interval_to_mask(block.intervals, block.last_visible)
        if plain:
            # SDPA gives NaN for a query that sees nothing: let it see the first key, and drop the result.
            alive = mask.any(-1, keepdim=True)
            first = torch.arange(mask.shape[-1], device=mask.device) == 0
            parts.append(_sdpa(block, mask | (~alive & first), causal=False) * alive)
        else:
            parts.append(weighted_values(block, masked_weights(block, mask)))
    return torch.cat(parts, dim=2)


def attend_masked(call: AttentionCall, mask: Tensor) -> Tensor:
    """Attend under a mask that is not made of intervals; `call.intervals` is not read.

    Args:
        call: The whole call.
        mask: `(batch, heads or 1, q_len, kv_len)`: a mask as `as_bool` takes it, or a bias.

    Raises:
        ValueError: For a bias together with softcap or attention sinks.
    """
    visible = as_bool(mask)
    if call.softcap is None and call.sinks is None:
        return _sdpa(call, mask.to(call.query.dtype) if visible is None else visible, causal=False)
    if visible is None:
        raise ValueError("an attention_mask that is a bias cannot be combined with softcap or attention sinks")
    return weighted_values(call, masked_weights(call, visible))


def _is_causal(call: AttentionCall) -> bool:
    """Whether SDPA's own causal mask, or none for a single query, is the mask of this call."""
    kv_len = call.key.shape[2]
    return call.query.shape[2] in (1, kv_len) and call.ranges.causal(kv_len)


def _sdpa(call: AttentionCall, mask: Tensor | None, *, causal: bool) -> Tensor:
    key, value = call.key, call.value
    if mask is not None:
        key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
    return F.scaled_dot_product_attention(
        call.query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=causal,
        scale=call.scaling,
        enable_gqa=call.group_size > 1,
    )
