"""Policies: what `sparse_config.json` says, where it is read and written, and which models it suits."""

from hf_sparse.policy.policy import Policy, is_hub_id

__all__ = ["Policy", "is_hub_id"]
