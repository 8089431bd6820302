"""Tables of a benchmark's summary: times and ratios by length, and break-even."""

from __future__ import annotations

from typing import Any

from hf_sparse.bench.layer import SPARSE
from hf_sparse.bench.summary import Summary, is_layer
from hf_sparse.tables import Table

TITLES = {
    ("decode", "seconds"): "decode, one layer, n cached keys",
    ("prefill", "seconds"): "prefill, one layer, n rows and keys",
    ("cached", "token"): "model, n tokens cached: time a token",
    ("generate", "first_token"): "model, prompt of n: time to first token",
    ("generate", "token"): "model, prompt of n: time a token",
    ("padded", "first_token"): "model, padded prompt of n: time to first token",
    ("padded", "token"): "model, padded prompt of n: time a token",
}
"""What each quantity of each kind is."""

_UNITS = ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s"))


def bench_tables(summary: Summary) -> list[Table]:
    """A table for every kind and quantity, in the order of `TITLES`, then the break-even lengths."""
    measured = {(row["kind"], row["quantity"]) for row in summary["results"]}
    return [*(_table(summary, *place) for place in TITLES if place in measured), _break_even(summary)]


def _table(summary: Summary, kind: str, quantity: str) -> Table:
    rows = [row for row in summary["results"] if (row["kind"], row["quantity"]) == (kind, quantity)]
    lengths = sorted({row["length"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["length"]): row for row in rows}
    exponents = {
        fit["method"]: fit["exponent"]
        for fit in summary["exponents"]
        if (fit["kind"], fit["quantity"]) == (kind, quantity) and fit["exponent"] is not None
    }
    header = [TITLES[kind, quantity], *(f"n = {n:,}" for n in lengths), "grows as"]
    cells: list[list[str]] = []

    def add(name: str, method: str, text: Any, grows: str = "") -> None:
        line = [text(found[method, n]) if (method, n) in found else "-" for n in lengths]
        if any(cell != "-" for cell in line):
            cells.append([name, *line, grows])

    for method in methods:
        grows = f"n^{exponents[method]:.2f}" if method in exponents else ""
        add(method, method, lambda row: time_text(row["median"]), grows)
    for method in methods if quantity == "token" else ():
        add(f"{method}: tokens/s", method, lambda row: f"{1 / row['median']:.3g}")
    for method in methods:
        if method != SPARSE:
            add(f"{method} / {SPARSE}", method, lambda row: _ratio_text(row["ratio"]))
    if is_layer(kind):
        add("ideal: 1 / density", SPARSE, lambda row: f"{1 / row['density']:.2f}")
        add(f"{SPARSE}: output error, mean row", SPARSE, lambda row: f"{row['output_error']['mean']:.3f}")
        add(f"{SPARSE}: output error, worst row", SPARSE, lambda row: f"{row['output_error']['worst']:.3f}")
    else:
        add(f"{SPARSE}: density", SPARSE, lambda row: f"{row['density']:.3f}")
        add(f"{SPARSE}: first tokens as dense", SPARSE, lambda row: _tokens_text(row, summary))
    if quantity != summary["break_even"][kind]["quantity"]:
        return header, cells  # the rest is of the whole call, and stands in the table of its first quantity
    for method in methods:
        add(f"{method}: peak MiB", method, lambda row: "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}")
    for method in methods:
        add(f"{method}: warm-up", method, lambda row: time_text(row["warm_up"]))
    return header, cells


def _break_even(summary: Summary) -> Table:
    cells = []
    for kind, found in summary["break_even"].items():
        shortest, longest = (f"{n:,}" for n in found["measured"])
        length = f"above {longest}" if found["length"] is None else f"{found['length']:,}"
        if found["length"] == found["measured"][0]:
            length = f"at or below {shortest}"
        cells.append([kind, found["against"], length])
    return ["break-even", "against", "n from which hf_sparse is not slower"], cells


def time_text(seconds: float) -> str:
    """Seconds in a fitting unit, three figures."""
    factor, unit = next((factor, unit) for below, factor, unit in _UNITS if seconds < below)
    return f"{seconds * factor:.3g} {unit}"


def _tokens_text(row: Summary, summary: Summary) -> str:
    if "same_tokens" not in row:
        return "-"
    return f"{row['same_tokens']} of {summary['conditions'][row['kind']]['new_tokens']}"


def _ratio_text(ratio: Summary) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
