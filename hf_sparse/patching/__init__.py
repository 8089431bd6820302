"""Patching a model and undoing it: the only place that touches a model's modules, configuration and cache."""

from hf_sparse.patching.patcher import (
    ConfigLike,
    ModelT,
    base_model,
    is_patched,
    patch,
    patched,
    policy_of,
    report,
    states,
    unpatch,
)

__all__ = [
    "ConfigLike",
    "ModelT",
    "base_model",
    "is_patched",
    "patch",
    "patched",
    "policy_of",
    "report",
    "states",
    "unpatch",
]
