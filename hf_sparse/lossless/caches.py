"""Caches from which the last tokens can be taken back, in layers with full attention and with a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_sparse.cache import SparseLayer
from hf_sparse.errors import UserError

# Layers that hold no keys are of a class of their own, which transformers 5.17 does not have yet.
_CROPPED = (DynamicLayer, SparseLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))


def refuse_cache(cache: object) -> None:
    """Refuse a cache from which tokens cannot be taken back."""
    if isinstance(cache, DynamicCache) and all(type(layer) in _CROPPED for layer in cache.layers):
        return
    kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
    raise UserError(
        "generate_lossless takes tokens back from the cache, which must be a SparseCache or DynamicCache of attention "
        f"layers; got {' and '.join(kinds) if kinds else type(cache).__name__}"
    )


def crop(cache: Cache, length: int) -> None:
    """Remove all tokens after the first `length`, and those that have left a sliding window."""
    for layer in _filled(cache):
        extra = max(0, layer.get_seq_length() - length)
        if extra or layer.is_sliding:
            layer.crop(-extra)


@contextmanager
def restored_after_errors(cache: Cache, length: int) -> Iterator[None]:
    """After an error, the cache holds `length` tokens again, whichever layer it came from."""
    try:
        yield
    except BaseException:
        crop(cache, length)
        raise


@contextmanager
def recording_past(cache: Cache) -> Iterator[None]:
    """Layers with a sliding window keep what has left it, until `crop`."""
    sliding = [layer for layer in _filled(cache) if isinstance(layer, DynamicSlidingWindowLayer)]
    before = [layer.record_past for layer in sliding]
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for layer, recorded in zip(sliding, before, strict=True):
            layer.crop(0)
            layer.record_past = recorded


def _filled(cache: Cache) -> list[DynamicLayer]:
    """The layers that hold keys: those of a model whose layers share them may not."""
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
