"""What a patched model attends to, and the policy around it: `sparse_config.json`, where it is read and written."""

from hf_sparse.config.config import DENSE_BELOW, HeadLaw, SparseAttentionConfig
from hf_sparse.config.origin import Origin, is_hub_id, origin_of
from hf_sparse.config.policy import Policy

__all__ = ["DENSE_BELOW", "HeadLaw", "Origin", "Policy", "SparseAttentionConfig", "is_hub_id", "origin_of"]
