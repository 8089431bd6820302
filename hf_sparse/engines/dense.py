"""Dense attention, for layers and calls that are not sparse: PyTorch's SDPA, or the compiled kernels for few queries.

SDPA reads keys and values anew for every query head. Few queries, as in decoding or in the check of a draft, are made
one: the heads of a GQA group and their queries become the rows of one matrix, which reads them once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall
from hf_sparse.engines.common import masked_weights, weighted_values
from hf_sparse.kernels import cpu
from hf_sparse.kernels.int8 import Int8States
from hf_sparse.visibility import as_bool, interval_to_mask

# Elements of a mask, or of scores where SDPA cannot be used, that are alive at a time.
_BLOCK_ELEMENTS = 1 << 22

# Up to this many queries are made one.
_FEW_QUERIES = 32

# For short texts, SDPA has more tasks for its threads if the heads of a single query stay apart. These are the sizes
# from which they do not, in bytes of one component of all keys of a head times the heads that read them: for the
# compiled kernels, and packed for SDPA.
_LEAST_IN_KERNELS, _LEAST_PACKED = 6_000, 40_000

# Products of 16 bits are SDPA's on a matrix unit (AMX), but for as many rows as the kernels give to it themselves.
_LEAST_ROWS = 16

# Without a matrix unit (AMX), SDPA reads keys of 16 bits far more slowly than of 32. Not all versions of PyTorch know.
_HAS_MATRIX_UNIT = not hasattr(torch.cpu, "get_capabilities") or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def attend(call: AttentionCall) -> Tensor:
    """Attend to every visible key: `(batch, heads, q_len, value_dim)`; zeros for a query that sees none.

    Nothing of size q_len x kv_len is formed: queries are taken a block at a time where a mask is needed.
    """
    batch, heads, queries, _ = call.query.shape
    plain = call.softcap is None and call.sinks is None
    if queries <= _FEW_QUERIES and queries < call.key.shape[2]:
        if _is_better_by_kernel(call, plain):
            return _by_kernel(call)
        if plain and call.group_size * queries > 1 and not _is_better_apart(call, _LEAST_PACKED):
            return _packed(call.dequantized())
    call = call.dequantized()
    if plain and _is_causal(call):
        return _sdpa(call, mask=None, causal=queries > 1)
    if plain:  # Once, and not for each block.
        key, value, _ = for_sdpa(call.key, call.value, call.group_size, flash=False)
        call = replace(call, key=key, value=value)
    step = max(1, _BLOCK_ELEMENTS // (call.key.shape[2] * batch * (1 if plain else heads)))
    parts = []
    for start in range(0, queries, step):
        block = call.queries(start, min(queries, start + step)).visible_part()
        mask = interval_to_mask(block.intervals, block.last_visible)
        if plain:
            # SDPA gives NaN for a query that sees nothing: let it see the first key, and drop the result.
            alive = mask.any(-1, keepdim=True)
            first = torch.arange(mask.shape[-1], device=mask.device) == 0
            parts.append(_sdpa(block, mask | (alive.logical_not() & first), causal=False) * alive)
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
    visible, call = as_bool(mask), call.dequantized()
    if call.softcap is None and call.sinks is None:
        return _sdpa(call, mask.to(call.query.dtype) if visible is None else visible, causal=False)
    if visible is None:
        raise ValueError("an attention_mask that is a bias cannot be combined with softcap or attention sinks")
    return weighted_values(call, masked_weights(call, visible))


def _by_kernel(call: AttentionCall) -> Tensor:
    """Attention of few queries as the heads of one, whose keys the kernels share out among threads."""
    batch, heads, queries, _ = call.query.shape
    kv_heads, kv_len = call.key.shape[1:3]
    length = -(-call.last_visible // cpu.TILE) * cpu.TILE
    plans, place = call.ranges.plans, ("every position", kv_heads, call.group_size, length, kv_len)
    if place not in plans:  # For all layers of a forward pass.
        positions = torch.arange(length, device="cpu").clamp(max=kv_len - 1).repeat(batch, kv_heads, 1, 1)
        runs = positions.new_zeros(batch, kv_heads, 1, call.group_size, queries, 3, 2)
        runs[..., -1, :] = torch.stack([call.ranges.first, call.ranges.stop], dim=-1)[:, None, None, None]
        plans[place] = positions, runs
    positions, runs = plans[place]
    out = cpu.attend(
        call.scaled_query.view(batch, heads * queries, 1, -1),
        call.key,
        call.value,
        positions,
        allowed=None,
        runs=runs,
        size=1,
        per_head=False,
        sinks=None if call.sinks is None else call.sinks.float().repeat_interleave(queries),
        softcap=call.softcap,
    )
    return out.view(batch, heads, queries, -1).to(call.value.dtype)


def _is_better_by_kernel(call: AttentionCall, plain: bool) -> bool:
    """Whether the compiled kernels can do these few queries, and are not slower than SDPA, if it can (`plain`)."""
    if call.learns or call.dropout or cpu.unsupported_reason(call.key, call.value):
        return False
    if isinstance(call.key, Int8States):  # PyTorch would need them in the model's dtype first.
        return True
    queries = call.query.shape[2]
    if _has_matrix_unit_for(call.key.dtype):
        return queries > 1 and call.group_size * queries >= _LEAST_ROWS
    return not (plain and _is_better_apart(call, _LEAST_IN_KERNELS))


def _is_better_apart(call: AttentionCall, least: int) -> bool:
    """Whether the heads of a single query need no mask, and too few keys for one reading to be what counts."""
    dtype = call.key.dtype
    size = call.last_visible * dtype.itemsize * call.group_size
    if call.query.shape[2] > 1 or size >= least or call.key.is_cuda:
        return False
    return (dtype.itemsize > 2 or _has_matrix_unit_for(dtype)) and _is_causal(call)


def _has_matrix_unit_for(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and _HAS_MATRIX_UNIT


def _packed(call: AttentionCall) -> Tensor:
    """SDPA for few queries, under a mask that all layers of a forward pass share."""
    batch, heads, queries, dim = call.query.shape
    plans, kv_len, bias = call.ranges.plans, call.last_visible, None
    if queries > 1 or not call.ranges.causal(kv_len):
        place = "bias", call.group_size, kv_len, call.query.dtype
        if place not in plans:
            mask = interval_to_mask(call.intervals, kv_len).repeat(1, 1, call.group_size, 1)
            plans[place] = mask.new_zeros(mask.shape, dtype=call.query.dtype).masked_fill(
                ~mask, torch.finfo(call.query.dtype).min
            )
        bias = plans[place]
    key, value = (x[:, :, :kv_len] for x in (call.key, call.value))
    rows = call.query.reshape(batch, key.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=bias, dropout_p=call.dropout, scale=call.scaling
    ).view(batch, heads, queries, -1)
    # A query that sees nothing was given the mean of all values.
    return out if call.ranges.queries == batch * queries else out * (call.visible > 0)[:, None, :, None]


def _is_causal(call: AttentionCall) -> bool:
    """Whether SDPA's own causal mask, or none for a single query, is the mask of this call."""
    kv_len = call.key.shape[2]
    return call.query.shape[2] in (1, kv_len) and call.ranges.causal(kv_len)


def for_sdpa(key: Tensor, value: Tensor, share: int, *, flash: bool) -> tuple[Tensor, Tensor, bool]:
    """Keys and values for SDPA, repeated where it would else form all scores, and whether it is to share them.

    On CUDA, only flash attention shares them: in 16 bits, for heads of at most 256 components, and without a mask.

    Args:
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        share: Query heads of a key head.
        flash: Whether SDPA may use flash attention: it can't under a mask.
    """
    shared = flash and key.dtype.itemsize == 2 and key.shape[3] == value.shape[3] <= 256
    if share == 1 or shared or not key.is_cuda:
        return key, value, share > 1
    return key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1), False


def _sdpa(call: AttentionCall, mask: Tensor | None, *, causal: bool) -> Tensor:
    key, value = call.key, call.value
    if mask is not None:
        key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
    key, value, shared = for_sdpa(key, value, call.group_size, flash=mask is None)
    return F.scaled_dot_product_attention(
        call.query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=causal,
        scale=call.scaling,
        enable_gqa=shared,
    )
