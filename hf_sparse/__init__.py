"""Adaptive-window sparse attention for Hugging Face causal language models, in one line."""

from hf_sparse.config import SparseAttentionConfig

__version__ = "0.1.0"

__all__ = ["SparseAttentionConfig", "__version__"]
