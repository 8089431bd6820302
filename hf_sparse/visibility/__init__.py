"""What the queries of a call see: masks as intervals of keys, and their ranges on the CPU, which all layers share."""

from hf_sparse.visibility.intervals import Visible, as_bool, interval_to_mask, is_packed, visible_in
from hf_sparse.visibility.masks import interval_mask
from hf_sparse.visibility.ranges import VisibleRanges, seen_through

__all__ = [
    "Visible",
    "VisibleRanges",
    "as_bool",
    "interval_mask",
    "interval_to_mask",
    "is_packed",
    "seen_through",
    "visible_in",
]
