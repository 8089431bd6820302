"""Plot of the summary of `evaluation.memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_sparse.measure.plots import figure, length_axis

# Okabe and Ito's palette; dense attention is dashed.
_STYLES = {
    "eager": ("#000000", "s", "--"),
    "masked-sdpa": ("#666666", "D", "--"),
    "sdpa": ("#009E73", "^", "--"),
    "grouped": ("#CC79A7", "P", "-"),
    "window": ("#56B4E9", "X", "-"),
    "topk": ("#0072B2", "o", "-"),
}


def plot_memory(summary: dict[str, Any], path: Path) -> None:
    """Draw peak memory against context length on log axes (linear if no peak is above 0), with the fitted exponents.

    Args:
        summary: From `evaluation.memory.summarise`.
        path: PNG file to write.

    Raises:
        UserError: without matplotlib.
    """
    drawing = figure(7, 4.6)
    axes = drawing.subplots()
    for method in dict.fromkeys(row["method"] for row in summary["results"]):
        rows = [row for row in summary["results"] if row["method"] == method]
        color, marker, line = _STYLES[method]
        exponent = summary["exponents"].get(method)
        label = method if exponent is None else f"{method}: n$^{{{exponent:.2f}}}$"
        lengths, peaks = [row["length"] for row in rows], [row["peak_mib"] for row in rows]
        axes.plot(lengths, peaks, color=color, marker=marker, linestyle=line, label=label)
    length_axis(axes, sorted({row["length"] for row in summary["results"]}), "context length n, tokens")
    shape = summary["shape"]
    seen = any(row["peak_mib"] > 0 for row in summary["results"])
    axes.set(
        yscale="log" if seen else "linear",
        ylabel="peak memory above the inputs, MiB",
        title=f"One attention call, {shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, "
        f"{shape['dtype']}, CPU",
    )
    axes.legend(frameon=False)
    drawing.savefig(path, dpi=150)
