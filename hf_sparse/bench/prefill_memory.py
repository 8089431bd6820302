"""Peak memory of a prefill by a whole model, above its weights and the keys and values that it leaves behind.

Every prefill runs in a process of its own, which the operating system watches: nothing is estimated.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

import hf_sparse
from hf_sparse.bench.layer import SPARSE
from hf_sparse.bench.shapes import Shape, random_model
from hf_sparse.bench.timing import with_peak
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.tables import Table

KEY = "prefill"
"""The key of a summary under which the rows of `evaluate` stand."""

BASELINE = "sdpa"
"""The model called without a mask, so that SDPA forms none; what all ratios are over."""

METHODS = (BASELINE, "generate", SPARSE)
"""`generate` is stock; `SPARSE` is `generate` of the patched model."""

# So short a text loads all that a first call loads.
_WARM_UP_TOKENS = 256


def measure(method: str, length: int, shape: Shape, config: SparseAttentionConfig, seed: int) -> tuple[float, float]:
    """Peak bytes of a prefill of a float32 model on the CPU, and its density.

    Args:
        method: One of `METHODS`.
        length: Tokens of the prompt.
        shape: Of the model.
        config: Of the patch, in which all layers are sparse unless it names dense ones.
        seed: Of weights and prompt.

    Returns:
        Bytes above the model, less those of `length` keys and values of every layer; kept over visible keys.

    Raises:
        UserError: where the operating system does not tell a process's peak memory.
    """
    # A fresh process: memory that an earlier call gave back to the allocator would hide what this one takes.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_here, (method, length, shape, config, seed))


@torch.no_grad()
def _measure_here(
    method: str, length: int, shape: Shape, config: SparseAttentionConfig, seed: int
) -> tuple[float, float]:
    device = torch.device("cpu")
    model = random_model(shape, torch.float32, device, seed)
    if method == SPARSE:
        hf_sparse.patch(model, config)
    ids = torch.randint(shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    _prefill(model, method, ids[:, :_WARM_UP_TOKENS])
    _, peak = with_peak(lambda: _prefill(model, method, ids), device)
    if peak is None:
        raise UserError("peak memory is read from /proc, which only Linux has")
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * torch.float32.itemsize * length
    return peak - cache, hf_sparse.report(model).density if method == SPARSE else 1.0


def _prefill(model: PreTrainedModel, method: str, ids: torch.Tensor) -> object:
    if method == BASELINE:
        return model(input_ids=ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    return model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False
    )


def evaluate(
    lengths: Sequence[int], shape: Shape, config: SparseAttentionConfig, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Measure every method at every length, `repeats` times in turn.

    Returns:
        A dictionary per length and method: `method`, `length`, `peaks_mib`, their median `peak_mib`, `ratio` (`median`
        peak over that of `BASELINE` in the same round, with its extremes `low` and `high`) and `density`.
    """
    tasks = [(length, index, method) for length in lengths for index in range(repeats) for method in METHODS]
    found = {}
    for task in tqdm(tasks, desc="prefill memory", unit="run"):
        length, _, method = task
        found[task] = measure(method, length, shape, config, seed)
    rows = []
    for length in lengths:
        dense = [found[length, index, BASELINE][0] for index in range(repeats)]
        for method in METHODS:
            peaks = [found[length, index, method][0] for index in range(repeats)]
            ratios = [peak / other for peak, other in zip(peaks, dense, strict=True)]
            rows.append(
                {
                    "method": method,
                    "length": length,
                    "peaks_mib": [round(peak / 2**20, 1) for peak in peaks],
                    "peak_mib": round(median(peaks) / 2**20, 1),
                    "ratio": {"median": median(ratios), "low": min(ratios), "high": max(ratios)},
                    "density": found[length, 0, method][1],
                }
            )
    return rows


def prefill_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The table of `evaluate`'s rows."""
    lengths = sorted({row["length"] for row in rows})
    found = {(row["method"], row["length"]): row for row in rows}

    def line(name: str, method: str, text: Any) -> list[str]:
        return [name, *(text(found[method, length]) for length in lengths)]

    def ratio(row: dict[str, Any]) -> str:
        return "{median:.2f} ({low:.2f} to {high:.2f})".format(**row["ratio"])

    others = [method for method in METHODS if method != BASELINE]
    return ["prefill, peak MiB over model and cache", *(f"n = {length:,}" for length in lengths)], [
        *(line(method, method, lambda row: f"{row['peak_mib']:.0f}") for method in METHODS),
        *(line(f"{method} / {BASELINE}", method, ratio) for method in others),
        line(f"{SPARSE}: density", SPARSE, lambda row: f"{row['density']:.3f}"),
    ]
