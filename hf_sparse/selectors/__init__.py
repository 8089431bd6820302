"""Selectors: which keys a block of query rows keeps, given how many each row may keep."""

from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.selectors.grouped import select_grouped
from hf_sparse.selectors.topk import select_topk
from hf_sparse.selectors.window import select_window

__all__ = ["select", "select_grouped", "select_topk", "select_window"]


def select(name: str, inputs: AttentionCall, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """Run the selector called `name`.

    Args:
        name: One of `hf_sparse.config.SELECTORS`.
        inputs: The block of rows. For `"grouped"`, whole groups: see `hf_sparse.selectors.grouped.ROWS`.
        budgets: int64 `(batch, heads or 1, rows)`: keys that each row keeps, at most what it sees.
        config: For `sink_keys` and `recent_keys`.

    Returns:
        A selection in which every row has exactly its budget of keys, all of them visible to it.
    """
    match name:
        case "grouped":
            return select_grouped(inputs, budgets, config)
        case "topk":
            return select_topk(inputs, budgets, config)
        case "window":
            return select_window(inputs, budgets, config)
        case _:
            raise ValueError(f"unknown selector {name!r}")
