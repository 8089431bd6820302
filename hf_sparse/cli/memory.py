"""`hf-sparse memory`: what one attention call, and a whole prefill, take besides what they are given."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_sparse.bench import prefill_memory
from hf_sparse.bench.shapes import Shape, check_shape
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure import memory, plot_memory
from hf_sparse.measure.run import Outcome, write_outcome
from hf_sparse.results import check_folder, software
from hf_sparse.tables import Table

# Processes in which each prefill is measured.
_REPEATS = 3


def run_memory(
    lengths: Sequence[int],
    prefill: Sequence[int],
    shape: Shape,
    config: SparseAttentionConfig,
    limit: float,
    seed: int,
    folder: Path,
) -> Outcome:
    """Measure, and write summary, tables and plot.

    Args:
        lengths: Rows and keys of the calls.
        prefill: Tokens of the prompts.
        shape: Of the layer and of the model.
        config: For the sparse methods; all layers of the model are sparse unless it names dense ones.
        limit: GiB that no single call may be expected to take.
        seed: Of the random inputs and weights.
        folder: Where results go.

    Raises:
        UserError: where peak memory cannot be read, for a shape, configuration or engine that cannot be used, or if
            results cannot go into the folder.
    """
    check_folder(folder, "memory")
    heads = (shape.heads, shape.kv_heads, shape.head_dim)
    sparse = config if config.dense_layers is not None else replace(config, dense_layers=())
    check_shape(shape, sparse, torch.float32, torch.device("cpu"), weights=bool(prefill))
    calls = memory.evaluate(lengths, memory.METHODS, heads, config, limit * 2**30, seed)
    rows = prefill_memory.evaluate(prefill, shape, sparse, _REPEATS, seed)
    summary = {
        **memory.summarise(calls),
        prefill_memory.KEY: rows,
        "shape": {**shape.to_dict(), "dtype": "float32"},
        "config": config.to_dict(),
        "seed": seed,
        "device": "cpu",
        "device_name": platform.machine(),
        **software(),
    }
    tables = [
        *([_call_table(calls, summary)] if calls else []),
        *([prefill_memory.prefill_table(rows)] if rows else []),
    ]
    outcome = Outcome(summary, tables)
    write_outcome(outcome, folder, "memory.png", plot_memory.plot_memory)
    return outcome


def _call_table(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> Table:
    lengths = sorted({row["length"] for row in rows})
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        peaks = {row["length"]: f"{row['peak_mib']:.0f}" for row in rows if row["method"] == method}
        exponent = summary["exponents"].get(method)
        cells.append(
            [method, *(peaks.get(length, "-") for length in lengths), "-" if exponent is None else f"{exponent:.2f}"]
        )
    return ["peak MiB above the inputs", *(f"n = {length:,}" for length in lengths), "grows as n to the"], cells
