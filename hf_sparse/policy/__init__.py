"""Policies: what `sparse_config.json` says, where it is read and written, and which models it suits."""

from hf_sparse.policy.origin import Origin, is_hub_id
from hf_sparse.policy.policy import Policy

__all__ = ["Origin", "Policy", "is_hub_id"]
