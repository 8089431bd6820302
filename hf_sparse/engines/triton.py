"""The engine for GPUs: one fused Triton kernel gathers the kept keys and values and attends to them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall, Selection, SharedSelection
from hf_sparse.engines.base import Engine
from hf_sparse.kernels import gpu

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Triton(Engine):
    """Attention inside tiles of (query, head) pairs x keys.

    Nothing is copied or formed in memory but the result, and a partial result for each part of the keys where few pairs
    share many of them. `selection.scores` are not read: the tensor cores form them as fast.
    """

    name = "triton"

    def unavailable_reason(self) -> str | None:
        """No GPU or no Triton: see `Engine.unavailable_reason`."""
        return gpu.unsupported_reason()

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Gradients, dropout, wide heads, other devices and dtypes: see `Engine.unsupported_reason`."""
        states = (call.query, call.key, call.value)
        if (reason := gpu.unsupported_reason(call.query.device)) is not None:
            return reason
        if call.query.dtype not in _DTYPES or any(x.dtype != call.query.dtype for x in states):
            found = ", ".join(sorted({str(x.dtype) for x in states}))
            return f"the Triton kernels take float32, float16 or bfloat16, the same for all, not {found}"
        if max(call.query.shape[-1], call.value.shape[-1]) > gpu.WIDEST:
            return f"a head_dim of {max(call.query.shape[-1], call.value.shape[-1])} is more than {gpu.WIDEST}"
        if call.dropout:
            return "attention dropout is not supported by the Triton kernels"
        if call.learns:
            return "the Triton kernels have no backward pass"
        return None

    def attend(self, call: AttentionCall, selection: Selection) -> Tensor:
        """Attention to the kept keys where they lie: see `Engine.attend`."""
        from hf_sparse.kernels.triton.attend import attend as attend_to_positions

        return attend_to_positions(
            call.query,
            call.key,
            call.value,
            selection.positions,
            selection.runs if isinstance(selection, SharedSelection) else selection.allowed,
            selection.queries_per_group,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
        )
