"""One attention call of one layer, the keys that its queries keep, and how its queries are cut into groups."""

from hf_sparse.call.call import AlwaysKept, AttentionCall, accurate, as_vectors, pairs_of, sent, take_keys
from hf_sparse.call.groups import align, leading_dense
from hf_sparse.call.selection import Selection, SharedSelection

__all__ = [
    "AlwaysKept",
    "AttentionCall",
    "Selection",
    "SharedSelection",
    "accurate",
    "align",
    "as_vectors",
    "leading_dense",
    "pairs_of",
    "sent",
    "take_keys",
]
