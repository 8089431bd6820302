"""Memory that key-value caches hold, as the system counts it: the stock cache, and ours of either kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from hf_sparse.bench.shapes import Shape, random_model
from hf_sparse.bench.tasks import DYNAMIC, SPARSE
from hf_sparse.bench.timing import mebibytes, resident
from hf_sparse.cache import SparseCache
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.patching import patch
from hf_sparse.patching.caches import cache_argument
from hf_sparse.results import Summary, Table

IN_8_BITS = f"{SPARSE}, nbits=8"
CACHES = (DYNAMIC, SPARSE, IN_8_BITS)
"""The stock model and its cache, and the patched model with a `SparseCache` in its dtype and in 8 bits."""

_DTYPES = (torch.float32, torch.bfloat16)
# Tokens that a cache is given at a time.
_PIECE = 1024


def measure_caches(
    lengths: Sequence[int], shape: Shape, config: SparseAttentionConfig, seed: int, run: Callable[..., Any]
) -> list[Summary]:
    """Measure every one of `CACHES` at every length, in float32 and in bfloat16.

    Args:
        lengths: Tokens in the cache.
        shape: Of a model with random weights.
        config: Of the patch.
        seed: Of weights, keys and values.
        run: Calls a function with arguments in a new process.

    Returns:
        A dictionary for each: `method`, `length`, `dtype`, `held_mib`, `ratio` to the stock cache, and
        `bytes_per_token` of one layer.
    """
    found: list[Summary] = []
    for length in lengths:
        for dtype in _DTYPES:
            held = {method: run(cache_held, method, length, dtype, shape, config, seed) for method in CACHES}
            found += [
                {
                    "method": method,
                    "length": length,
                    "dtype": str(dtype).removeprefix("torch."),
                    "held_mib": mebibytes(size),
                    "ratio": size / held[DYNAMIC],
                    "bytes_per_token": size / (length * shape.layers),
                }
                for method, size in held.items()
            ]
    return found


@torch.no_grad()
def cache_held(
    method: str, length: int, dtype: torch.dtype, shape: Shape, config: SparseAttentionConfig, seed: int
) -> float:
    """Bytes by which a process is larger with a full cache, after a token was read with it.

    To be called in a new process.
    """
    model = random_model(shape, dtype, torch.device("cpu"), seed)
    if method != DYNAMIC:
        patch(model, config)
    _full_cache(model, method, _PIECE, shape, seed)  # loads all that is needed
    before = resident()
    cache = _full_cache(model, method, length, shape, seed)
    size = resident() - before
    assert cache.get_seq_length() == length
    return size


def _full_cache(model: PreTrainedModel, method: str, length: int, shape: Shape, seed: int) -> Cache:
    """Random keys and values, and those of a last token that the model reads, which has the others made in few bits."""
    nbits = 8 if method == IN_8_BITS else None
    cache: Cache = DynamicCache(config=model.config) if method == DYNAMIC else SparseCache(model.config, nbits=nbits)
    generator = torch.Generator().manual_seed(seed)

    def states(new: int) -> Tensor:
        return torch.randn(1, shape.kv_heads, new, shape.head_dim, generator=generator).to(model.dtype)

    for layer in range(shape.layers):
        for start in range(0, length - 1, _PIECE):
            new = min(_PIECE, length - 1 - start)
            cache.update(states(new), states(new), layer)
    model(torch.zeros(1, 1, dtype=torch.int64), **cache_argument(model, cache))
    return cache


def cache_table(results: Sequence[Summary]) -> Table:
    """MiB held by every cache, and how it compares to the stock cache of the same dtype."""
    places = sorted({(each["length"], each["dtype"]) for each in results}, key=lambda place: (place[0], place[1][::-1]))
    found = {(each["method"], each["length"], each["dtype"]): each for each in results}
    columns = [f"{dtype}, n = {length:,}" for length, dtype in places]
    return ["full cache, MiB held (of the stock cache)", *columns], [
        [method, *(_cell(found[method, *place]) for place in places)] for method in CACHES
    ]


def _cell(each: Summary) -> str:
    return f"{each['held_mib']:.1f} ({each['ratio']:.2f})"
