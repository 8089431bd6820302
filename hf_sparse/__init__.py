"""Adaptive-window sparse attention for Hugging Face causal language models, in one line."""

from typing import TYPE_CHECKING, Any

from hf_sparse.cache import SparseCache
from hf_sparse.call import AlwaysKept, AttentionCall, Selection
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.diagnostics import audit, observed
from hf_sparse.engines import Engine
from hf_sparse.lossless import generate_lossless
from hf_sparse.monitor import SparsityReport
from hf_sparse.patching import SupportReport, inspect, is_patched, patch, patched, report, unpatch
from hf_sparse.schema import CalibrationRecord
from hf_sparse.selectors import ScoreSelector, Selector
from hf_sparse.share import from_pretrained, push_to_hub, save_pretrained
from hf_sparse.version import __version__

if TYPE_CHECKING:
    from hf_sparse.calibration.calibrate import calibrate
    from hf_sparse.page.prompt import kept_keys

__all__ = [
    "AlwaysKept",
    "AttentionCall",
    "CalibrationRecord",
    "Engine",
    "ScoreSelector",
    "Selection",
    "Selector",
    "SparseAttentionConfig",
    "SparseCache",
    "SparsityReport",
    "SupportReport",
    "__version__",
    "audit",
    "calibrate",
    "from_pretrained",
    "generate_lossless",
    "inspect",
    "is_patched",
    "kept_keys",
    "observed",
    "patch",
    "patched",
    "push_to_hub",
    "report",
    "save_pretrained",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: patching a model needs none of what measures or shows one.
    if name == "calibrate":
        from hf_sparse.calibration.calibrate import calibrate

        return calibrate
    if name == "kept_keys":
        from hf_sparse.page.prompt import kept_keys

        return kept_keys
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
