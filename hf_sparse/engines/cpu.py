"""The engine for processors: compiled kernels gather kept keys and values by tiles that stay in the cache."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.kernels import cpu


def refusal(inputs: AttentionCall) -> str | None:
    """Why the kernels cannot attend in this call; `None` if they can."""
    if inputs.learns:
        return "the compiled kernels have no backward pass"
    if inputs.dropout:
        return "the compiled kernels drop no weights"
    return cpu.refusal(inputs.key, inputs.value)


def attend(inputs: AttentionCall, selection: Selection) -> Tensor:
    """Attend to the kept keys alone: `(batch, heads, rows, value_dim)`. Only where there is no `refusal`."""
    missing = -selection.columns.shape[-1] % cpu.TILE
    columns, allowed, scores = (
        None if x is None else (F.pad(x, (0, missing)) if missing else x.contiguous())
        for x in (selection.columns, selection.allowed, selection.scores)
    )
    assert columns is not None
    assert allowed is not None
    out = cpu.attend(
        inputs.scaled_query,
        inputs.key,
        inputs.value,
        columns,
        allowed,
        size=selection.rows_per_group,
        per_head=selection.per_head,
        scores=None if scores is None else scores.float(),
        sinks=None if inputs.sinks is None else inputs.sinks.float().contiguous(),
        softcap=inputs.softcap,
    )
    return out.to(inputs.value.dtype)
