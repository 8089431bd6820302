"""Tables of a benchmark's summary: times and ratios by length, and break-even."""

from __future__ import annotations

from typing import Any

from hf_sparse.bench.tasks import COMPILED, LAYER_TASKS, LOSSLESS, SPARSE
from hf_sparse.bench.timing import HOST
from hf_sparse.results import Summary, Table

TITLES = {
    ("decode", "seconds"): "decode, one layer, n cached keys",
    ("decode", HOST): "decode, one layer, n cached keys: by the host's clock",
    ("prefill", "seconds"): "prefill, one layer, n queries and keys",
    ("prefill", HOST): "prefill, one layer, n queries and keys: by the host's clock",
    ("cached", "token"): "model, n cached tokens: time per token",
    ("generate", "first_token"): "model, prompt of n: time to first token",
    ("generate", "token"): "model, prompt of n: time per token",
    ("padded", "first_token"): "model, padded prompt of n: time to first token",
    ("padded", "token"): "model, padded prompt of n: time per token",
}
"""Task and quantity -> title."""

_UNITS = ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s"))


def bench_tables(summary: Summary) -> list[Table]:
    """A table for every task and quantity, in the order of `TITLES`, then the break-even lengths."""
    measured = {(row["kind"], row["quantity"]) for row in summary["results"]}
    header = ["break-even", "against", f"n from which {SPARSE} is not slower"]
    lines = [[task, found["against"], break_even_text(found)] for task, found in summary["break_even"].items()]
    return [*(_table(summary, *place) for place in TITLES if place in measured), (header, lines)]


def _table(summary: Summary, task: str, quantity: str) -> Table:
    results = [row for row in summary["results"] if (row["kind"], row["quantity"]) == (task, quantity)]
    lengths = sorted({row["length"] for row in results})
    methods = list(dict.fromkeys(row["method"] for row in results))
    found = {(row["method"], row["length"]): row for row in results}
    exponents = {
        fit["method"]: f"n^{fit['exponent']:.2f}"
        for fit in summary["exponents"]
        if (fit["kind"], fit["quantity"]) == (task, quantity) and fit["exponent"] is not None
    }
    cells: list[list[str]] = []

    def add(name: str, method: str, text: Any, grows: str = "") -> None:
        line = [text(found[method, n]) if (method, n) in found else "-" for n in lengths]
        if any(cell != "-" for cell in line):
            cells.append([name, *line, grows])

    def add_over(method: str, other: str) -> None:
        medians = {row["length"]: row["median"] for row in results if row["method"] == other}

        def text(row: Summary) -> str:
            return f"{row['median'] / medians[row['length']]:.2f}" if row["length"] in medians else "-"

        add(f"{method} / {other}, medians", method, text)

    for method in methods:
        add(method, method, lambda row: time_text(row["median"]), exponents.get(method, ""))
    for method in methods if quantity == "token" else ():
        add(f"{method}: tokens/s", method, lambda row: f"{1 / row['median']:.3g}")
    for method in methods:
        if method != SPARSE:
            add(f"{method} / {SPARSE}", method, lambda row: ratio_text(row["ratio"]))
    if task in LAYER_TASKS and quantity != HOST:
        add("ideal: 1 / density", SPARSE, lambda row: f"{1 / row['density']:.2f}")
        add(f"{SPARSE}: output error, mean query", SPARSE, lambda row: f"{row['output_error']['mean']:.3f}")
        add(f"{SPARSE}: output error, worst query", SPARSE, lambda row: f"{row['output_error']['worst']:.3f}")
    elif task not in LAYER_TASKS:
        new_tokens = summary["conditions"][task]["new_tokens"]
        add(f"{SPARSE}: density", SPARSE, lambda row: f"{row['density']:.3f}")
        for method in (SPARSE, LOSSLESS):
            add(
                f"{method}: leading tokens as dense",
                method,
                lambda row: f"{row['same_tokens']} of {new_tokens}" if "same_tokens" in row else "-",
            )
    if LOSSLESS in methods and quantity == "token":
        for method in methods:
            if method != LOSSLESS:
                add_over(method, LOSSLESS)
        add(f"{LOSSLESS}: accepted of drafted", LOSSLESS, lambda row: "{accepted} of {drafted}".format(**row["drafts"]))
        add(f"{LOSSLESS}: tokens a check", LOSSLESS, lambda row: _tokens_a_check(row["drafts"]))
        add(f"{LOSSLESS}: tokens without a draft", LOSSLESS, lambda row: str(row["drafts"]["plain"]))
    for compiled, plain in COMPILED.items():
        if compiled in methods:
            add_over(plain, compiled)
            if plain != SPARSE:
                add_over(compiled, f"{SPARSE}, compiled")
    if quantity == summary["break_even"][task]["quantity"]:  # once for each task, not for each quantity
        for method in methods:
            add(f"{method}: peak MiB", method, lambda row: "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}")
        for method in methods:
            add(f"{method}: warm-up", method, lambda row: time_text(row["warm_up"]))
    return [TITLES[task, quantity], *(f"n = {n:,}" for n in lengths), "grows as"], cells


def _tokens_a_check(drafts: Summary) -> str:
    return f"{drafts['checked'] / drafts['checks']:.2f}" if drafts["checks"] else "-"


def break_even_text(found: Summary) -> str:
    """A break-even length, or the end of the measured lengths that it lies beyond."""
    shortest, longest = found["measured"]
    if found["length"] is None:
        return f"above {longest:,}"
    return f"at or below {shortest:,}" if found["length"] == shortest else f"{found['length']:,}"


def time_text(seconds: float) -> str:
    """Seconds in a fitting unit, with three digits."""
    factor, unit = next((factor, unit) for below, factor, unit in _UNITS if seconds < below)
    return f"{seconds * factor:.3g} {unit}"


def ratio_text(ratio: Summary) -> str:
    """A ratio with its interval."""
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)
