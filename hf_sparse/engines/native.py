"""The engine for processors: compiled kernels gather kept keys and values by tiles that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.kernels import cpu
from hf_sparse.selection import AttentionInputs, Selection


def supports(inputs: AttentionInputs, selection: Selection) -> bool:
    """Whether the kernels can attend in this call: on a processor, without gradients or dropout."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (inputs.query, inputs.key, inputs.value))
    return (
        not learns and not inputs.dropout and not selection.per_head and cpu.supports(inputs.key, inputs.value)
    )


def attend(inputs: AttentionInputs, selection: Selection) -> Tensor:
    """Attend to the kept keys alone: `(batch, heads, rows, value_dim)`."""
    out = cpu.attend(
        (inputs.query.float() * inputs.scaling).contiguous(),
        inputs.key,
        inputs.value,
        selection.columns.contiguous(),
        selection.allowed.contiguous(),
        size=selection.rows_per_group,
        scores=None if selection.scores is None else selection.scores.float().contiguous(),
        sinks=None if inputs.sinks is None else inputs.sinks.float().contiguous(),
        softcap=inputs.softcap,
    )
    return out.to(inputs.value.dtype)
