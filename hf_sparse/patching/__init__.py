"""Patching a model and undoing it, and which models can be: all that touches modules, configuration and caches."""

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
from hf_sparse.patching.suitability import check_calibration, warn_of_another_base
from hf_sparse.patching.support import LayerSupport, SupportReport, attention_modules, inspect

__all__ = [
    "ConfigLike",
    "LayerSupport",
    "ModelT",
    "SupportReport",
    "attention_modules",
    "base_model",
    "check_calibration",
    "inspect",
    "is_patched",
    "patch",
    "patched",
    "policy_of",
    "report",
    "states",
    "unpatch",
    "warn_of_another_base",
]
