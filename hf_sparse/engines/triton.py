"""The engine for GPUs: one fused Triton kernel gathers the kept keys and values and attends to them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.errors import UserError
from hf_sparse.kernels import gpu
from hf_sparse.selection import AttentionInputs, Selection

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 256


def attend(inputs: AttentionInputs, selection: Selection) -> Tensor:
    """Attend inside tiles of members x columns: `(batch, heads, rows, value_dim)`.

    Nothing is copied or formed in memory but the result, and a partial result for each part of the columns where few
    members share many of them. `selection.scores` are not read: the tensor cores form them as fast.

    Raises:
        UserError: If `unsupported` has something against it.
    """
    reason = unsupported(inputs)
    if reason is not None:
        raise UserError(f"engine='triton' cannot run: {reason}")
    from hf_sparse.kernels.triton.attend import attend as attend_to_columns

    return attend_to_columns(
        inputs.query,
        inputs.key,
        inputs.value,
        selection.columns,
        selection.allowed,
        selection.rows_per_group,
        scaling=inputs.scaling,
        softcap=inputs.softcap,
        sinks=inputs.sinks,
    )


def unsupported(inputs: AttentionInputs) -> str | None:
    """Why this engine cannot take a call, or `None` if it can: another engine must take it, or the user be told."""
    states = (inputs.query, inputs.key, inputs.value)
    if (reason := gpu.refusal(inputs.query.device)) is not None:
        return reason
    if inputs.query.dtype not in _DTYPES or any(x.dtype != inputs.query.dtype for x in states):
        return f"it takes float32, float16 or bfloat16, not {', '.join(sorted({str(x.dtype) for x in states}))}"
    if max(inputs.query.shape[-1], inputs.value.shape[-1]) > _WIDEST:
        return f"a head_dim of {max(inputs.query.shape[-1], inputs.value.shape[-1])} is more than {_WIDEST}"
    if inputs.dropout:
        return "it has no dropout"
    if inputs.learns:
        return "it computes no gradients"
    return None
