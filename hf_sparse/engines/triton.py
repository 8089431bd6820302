"""The engine for GPUs: one fused Triton kernel gathers the kept keys and values and attends to them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.kernels import gpu

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attend(inputs: AttentionCall, selection: Selection) -> Tensor:
    """Attend inside tiles of members x columns: `(batch, heads, rows, value_dim)`.

    Nothing is copied or formed in memory but the result, and a partial result for each part of the columns where few
    members share many of them. `selection.scores` are not read: the tensor cores form them as fast. Only where there is
    no `refusal`.
    """
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


def refusal(inputs: AttentionCall) -> str | None:
    """Why this engine cannot take a call, or `None` if it can: another engine must take it, or the user be told."""
    states = (inputs.query, inputs.key, inputs.value)
    if (reason := gpu.refusal(inputs.query.device)) is not None:
        return reason
    if inputs.query.dtype not in _DTYPES or any(x.dtype != inputs.query.dtype for x in states):
        found = ", ".join(sorted({str(x.dtype) for x in states}))
        return f"the Triton kernels take float32, float16 or bfloat16, the same for all, not {found}"
    if max(inputs.query.shape[-1], inputs.value.shape[-1]) > gpu.WIDEST:
        return f"a head_dim of {max(inputs.query.shape[-1], inputs.value.shape[-1])} is more than {gpu.WIDEST}"
    if inputs.dropout:
        return "the Triton kernels drop no weights"
    if inputs.learns:
        return "the Triton kernels have no backward pass"
    return None
