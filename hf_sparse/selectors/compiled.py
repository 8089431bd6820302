"""The grouped selector by compiled kernels for processors."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.kernels import cpu
from hf_sparse.rows import RowFacts
from hf_sparse.selectors.spans import OVERSAMPLING


def refusal(inputs: AttentionCall) -> str | None:
    """Why the kernels cannot select for this call; `None` if they can."""
    if inputs.key.shape[3] % 4:
        return f"the compiled kernels take heads of a multiple of 4 components, not {inputs.key.shape[3]}"
    return cpu.refusal(inputs.key)


def select_compiled(inputs: AttentionCall, budgets: Tensor, config: SparseAttentionConfig, size: int) -> Selection:
    """What `hf_sparse.selectors.grouped.select_grouped` gives, by one call of a kernel.

    Args:
        inputs: A whole number of groups of rows.
        budgets: int64 `(batch, heads or 1, rows)`.
        config: For `sink_keys` and `recent_keys`.
        size: Rows in a group.
    """
    batch, heads, rows, _ = inputs.query.shape
    facts = inputs.facts
    columns, allowed, kept, scores = cpu.select(
        inputs.scaled_query,
        inputs.key,
        inputs.own_quantised.up_to(inputs.key, facts.last_visible, cpu.LAYOUT),
        (facts.first, facts.stop),
        budgets.expand(batch, heads, rows),
        size=size,
        width=_width(facts, int(budgets.max()), config, size),
        sink_keys=config.sink_keys,
        recent_keys=config.recent_keys,
        oversampling=OVERSAMPLING,
        softcap=inputs.softcap,
        want_scores=rows == 1,
    )
    return Selection(columns, allowed, size, per_head=False, scores=scores, number=kept)


def _width(facts: RowFacts, most: int, config: SparseAttentionConfig, size: int) -> int:
    """Columns that any group may come to: sinks and local keys, and its pool. `most`: the largest budget."""
    skew = ahead = 0
    if size > 1:
        begin, end = (x.view(len(x), -1, size) for x in (facts.first, facts.stop))
        alive = end > begin
        skew, ahead = (
            max(0, int((x.masked_fill(~alive, 0).amax(-1) - x.masked_fill(~alive, facts.last_visible).amin(-1)).max()))
            for x in (begin, end)
        )
    certain = min(skew + config.sink_keys + ahead + max(1, config.recent_keys), facts.last_visible)
    pool = min(OVERSAMPLING * (most + skew), facts.most_visible + skew)
    return sum(-(-x // cpu.TILE) * cpu.TILE for x in (certain, pool))
