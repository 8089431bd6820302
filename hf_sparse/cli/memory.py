"""`hf-sparse memory`: what one attention call takes besides its inputs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from hf_sparse.cli.runs import Outcome, write_outcome
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.evaluation import memory, plot_memory
from hf_sparse.evaluation.results import software


def run_memory(
    lengths: Sequence[int],
    shape: tuple[int, int, int],
    config: SparseAttentionConfig,
    limit: float,
    seed: int,
    folder: Path,
) -> Outcome:
    """Measure, and write summary, table and plot.

    Args:
        lengths: Rows and keys.
        shape: Query heads, key heads and head dimension.
        config: For the sparse methods.
        limit: GiB that no single call may be expected to take.
        seed: Of the random inputs.
        folder: Where results go.

    Raises:
        UserError: where peak memory cannot be read.
    """
    rows = memory.evaluate(lengths, memory.METHODS, shape, config, limit * 2**30, seed)
    heads, kv_heads, head_dim = shape
    summary = {
        **memory.summarise(rows),
        "shape": {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": "float32"},
        "config": config.to_dict(),
        "seed": seed,
        "device": "cpu",
        "device_name": platform.machine(),
        **software(),
    }
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        peaks = {row["length"]: f"{row['peak_mib']:.0f}" for row in rows if row["method"] == method}
        exponent = summary["exponents"].get(method)
        cells.append(
            [method, *(peaks.get(length, "-") for length in lengths), "-" if exponent is None else f"{exponent:.2f}"]
        )
    header = ["peak MiB above the inputs", *(f"n = {length:,}" for length in lengths), "grows as n to the"]
    outcome = Outcome(summary, [(header, cells)])
    write_outcome(outcome, folder, "memory.png", plot_memory.plot_memory)
    return outcome
