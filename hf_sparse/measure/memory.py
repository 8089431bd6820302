"""Peak memory of one attention call against context length: what is formed besides its inputs.

Every measurement runs in a process of its own, which the operating system watches: nothing is estimated.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hf_sparse.attention import LayerState, attend
from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.engines.common import masked_weights, weighted_values
from hf_sparse.errors import UserError
from hf_sparse.selectors import SELECTORS
from hf_sparse.visibility import interval_to_mask

METHODS = ("eager", "masked-sdpa", "sdpa", *SELECTORS)
"""`eager` forms all scores; `masked-sdpa` the mask alone, as stock models do for a padded batch; `sdpa` neither; the
others are ours."""

_STATUS = Path("/proc/self/status")


def measure(method: str, length: int, shape: tuple[int, int, int], config: SparseAttentionConfig, seed: int) -> float:
    """Peak bytes above the inputs of one causal attention call, its output included.

    Args:
        method: One of `METHODS`.
        length: Query rows and keys.
        shape: Query heads, key heads and head dimension.
        config: For the sparse methods.
        seed: Of the random inputs.

    Raises:
        UserError: where the operating system does not tell a process's peak memory.
    """
    if not _STATUS.exists():
        raise UserError("peak memory is read from /proc, which only Linux has")
    # A fresh process: memory that an earlier call gave back to the allocator would hide what this one takes.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_here, (method, length, shape, config, seed))


def _measure_here(
    method: str, length: int, shape: tuple[int, int, int], config: SparseAttentionConfig, seed: int
) -> float:
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads, length, dim, generator=generator)
    key, value = (torch.randn(1, kv_heads, length, dim, generator=generator) for _ in range(2))
    stop = torch.arange(1, length + 1, dtype=torch.int32)
    intervals = torch.stack([torch.zeros_like(stop), stop], dim=-1)[None, None]
    inputs = AttentionCall(query, key, value, intervals, dim**-0.5)
    # A first call on a few rows loads the libraries that the method needs.
    _run(method, AttentionCall(query[:, :, :64], key[:, :, :64], value[:, :, :64], intervals[:, :, :64], 1.0), config)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from what is in use now
    before = _status_bytes("VmRSS")
    _run(method, inputs, config)
    return _status_bytes("VmHWM") - before


@torch.no_grad()
def _run(method: str, inputs: AttentionCall, config: SparseAttentionConfig) -> None:
    match method:
        case "eager":
            weighted_values(inputs, masked_weights(inputs, interval_to_mask(inputs.intervals, inputs.key.shape[2])))
        case "masked-sdpa":
            torch.nn.functional.scaled_dot_product_attention(
                inputs.query,
                inputs.key,
                inputs.value,
                attn_mask=interval_to_mask(inputs.intervals, inputs.key.shape[2]),
                enable_gqa=True,
            )
        case "sdpa":
            torch.nn.functional.scaled_dot_product_attention(
                inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=True
            )
        case _:
            attend(LayerState(0, config), inputs)


def _status_bytes(name: str) -> float:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return 1024.0 * int(line.split()[1])
    raise UserError(f"{_STATUS} does not tell {name}")


def evaluate(
    lengths: Sequence[int],
    methods: Iterable[str],
    shape: tuple[int, int, int],
    config: SparseAttentionConfig,
    most_bytes: float,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure every method at every length.

    Args:
        lengths: Rows and keys.
        methods: Some of `METHODS`.
        shape: Query heads, key heads and head dimension.
        config: For the sparse methods, which set its selector.
        most_bytes: A method that took `p` bytes at one length is not run at a longer one at which `p` times the
            square of the ratio of the lengths is above this.
        seed: Of the random inputs.

    Returns:
        A dictionary per method and length: `method`, `length`, `peak_mib`, and for sparse methods `mean_keys`, the
        keys that a row keeps on average.
    """
    rows: list[dict[str, Any]] = []
    tasks = [(method, length) for method in methods for length in lengths]
    last: dict[str, tuple[int, float]] = {}
    for method, length in tqdm(tasks, desc="memory", unit="run"):
        if method in last and last[method][1] * (length / last[method][0]) ** 2 > most_bytes:
            continue
        ours = replace(config, selector=method) if method in SELECTORS else config
        peak = measure(method, length, shape, ours, seed)
        last[method] = (length, peak)
        keys = None if ours is config else config.budget().table(length)[1:].double().mean().item()
        rows.append({"method": method, "length": length, "peak_mib": round(peak / 2**20, 1), "mean_keys": keys})
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and for each method the exponent of length with which its peak grows: a least-squares line on logs.

    The same exponent is given for the mean kept keys, which is what a gathered row needs. A peak of 0, of calls so
    short that the operating system sees nothing, has no logarithm: its method gets no exponent.
    """
    exponents = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        if len(own) > 1:
            if all(row["peak_mib"] > 0 for row in own):
                exponents[method] = _slope(own, "peak_mib")
            if own[0]["mean_keys"] is not None:
                exponents["mean kept keys"] = _slope(own, "mean_keys")
    return {"results": list(rows), "exponents": exponents}


def _slope(rows: Sequence[dict[str, Any]], column: str) -> float:
    x = np.log([row["length"] for row in rows])
    return round(float(np.polyfit(x, np.log([row[column] for row in rows]), 1)[0]), 3)
