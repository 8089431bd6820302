"""Policies: what `sparse_config.json` says, and where it is read and written."""

from hf_sparse.policy.origin import Origin, is_hub_id
from hf_sparse.policy.policy import Policy

__all__ = ["Origin", "Policy", "is_hub_id"]
