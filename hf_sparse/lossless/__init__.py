"""Generation whose text is that of the dense model: sparse drafts, and dense passes that check them."""

from hf_sparse.lossless.generate import generate_lossless

__all__ = ["generate_lossless"]
