"""The grouped selector by compiled kernels for processors."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.kernels import cpu
from hf_sparse.selection import AttentionInputs, Selection
from hf_sparse.selectors.spans import OVERSAMPLING


def refusal(inputs: AttentionInputs) -> str | None:
    """Why the kernels cannot select for this call; `None` if they can."""
    if inputs.softcap is not None:
        return "the compiled kernels rank no scores with a soft cap"
    if inputs.key.shape[3] % 4:
        return f"the compiled kernels take heads of a multiple of 4 components, not {inputs.key.shape[3]}"
    return cpu.refusal(inputs.key)


def select_compiled(inputs: AttentionInputs, budgets: Tensor, config: SparseAttentionConfig, size: int) -> Selection:
    """What `hf_sparse.selectors.grouped.select_grouped` gives, by one call of a kernel.

    Args:
        inputs: A whole number of groups of rows.
        budgets: int64 `(batch, heads or 1, rows)`.
        config: For `sink_keys` and `recent_keys`.
        size: Rows in a group.
    """
    batch, heads, rows, _ = inputs.query.shape
    first, stop = (x.contiguous() for x in inputs.intervals[:, 0].long().unbind(-1))
    query = (inputs.query.float() * inputs.scaling).contiguous()
    columns, allowed, kept, scores = cpu.select(
        query,
        inputs.key,
        inputs.own_quantised.up_to(inputs.key, inputs.last_visible, cpu.LAYOUT),
        (first, stop),
        budgets.expand(batch, heads, rows),
        size=size,
        width=_width(first, stop, budgets, config, size),
        sink_keys=config.sink_keys,
        recent_keys=config.recent_keys,
        oversampling=OVERSAMPLING,
        want_scores=rows == 1,
    )
    return Selection(columns, allowed, size, per_head=False, scores=scores, number=kept)


def _width(first: Tensor, stop: Tensor, budgets: Tensor, config: SparseAttentionConfig, size: int) -> int:
    """Columns that any group may come to: sinks and local keys, and its pool."""
    if size == 1:
        skew, ahead = 0, 0
    else:
        alive = stop > first
        begin, end = (x.view(len(x), -1, size) for x in (first, stop))
        alive = alive.view(begin.shape)
        far = int(stop.max())
        skew = int((begin.masked_fill(~alive, 0).amax(-1) - begin.masked_fill(~alive, far).amin(-1)).max())
        ahead = int((end.masked_fill(~alive, 0).amax(-1) - end.masked_fill(~alive, far).amin(-1)).max())
    certain = max(0, skew) + config.sink_keys + max(0, ahead) + max(1, config.recent_keys)
    pool = min(OVERSAMPLING * (int(budgets.max()) + max(0, skew)), int((stop - first).max()) + max(0, skew))
    return sum(-(-x // cpu.TILE) * cpu.TILE for x in (certain, pool))
