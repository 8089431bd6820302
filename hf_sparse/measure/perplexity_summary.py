"""From records to answers: perplexity and ratio to dense with intervals, adaptive against fixed, and their tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse.measure.grid import Grid
from hf_sparse.measure.methods import FIXED_OF
from hf_sparse.measure.perplexity import COMMAND
from hf_sparse.measure.statistics import SAMPLES, FloatArray, bootstrap_means, percentile_interval
from hf_sparse.results import DENSE, Column, Record, Summary, Table, known, make_table

_INTERVAL = "{low:.4f} to {high:.4f}"


def summarise(records: Sequence[Record], seed: int) -> Summary:
    """The summary of the records of `perplexity.evaluate`: every method on the same documents and lengths.

    Returns:
        A dictionary for `json.dumps`, in which a ratio is a perplexity divided by another on the same tokens,
        `exp(mean difference of nats per token)`, with `low` and `high` of its 95 % bootstrap interval:

        - `results`: for each method and length `perplexity`, `ratio` to dense with `low` and `high`, `density`,
          `sparse_density` (`None` in records of earlier releases), `mean_keys`, `seconds` (mean of a forward pass),
          `tokens`;
        - `methods`: for each method the mean over lengths (of the nats, so a geometric mean of the ratios), the
          length with the worst ratio, and that ratio;
        - `adaptive_vs_fixed`: ratio of each adaptive method to the fixed number of keys at equal cost, by length,
          over all lengths (`mean`), and of each one's own worst length (`worst`): below 1, adaptive is better;
        - `targets`, `block_tokens`, `resampled` (what the bootstrap drew), and what `Grid.describe` says.
    """
    grid = Grid.of(records)
    series = _Series(grid, seed)
    pairs = [(adaptive, fixed) for adaptive, fixed in FIXED_OF.items() if {adaptive, fixed} <= set(grid.methods)]
    return {
        **grid.describe(COMMAND, seed, SAMPLES),
        "results": [_result(series, method, length) for method, length in grid.places()],
        "methods": [_over_lengths(series, method) for method in grid.methods],
        "adaptive_vs_fixed": [_verdict(series, adaptive, fixed) for adaptive, fixed in pairs],
        "targets": records[0]["tokens"],
        "block_tokens": records[0]["block_tokens"],
        "resampled": "documents and blocks" if len(grid.documents) > 1 else "blocks of the one document",
    }


class _Series:
    """Mean nats per token of every method and length: measured, `(methods, lengths)`, and resampled."""

    def __init__(self, grid: Grid, seed: int) -> None:
        self.grid = grid
        nll = grid.values(lambda record: record["block_nll"])
        targets, block = (grid.records[0][name] for name in ("tokens", "block_tokens"))
        tokens = np.array([min(block, targets - start) for start in range(0, targets, block)], dtype=np.float64)
        self.means: FloatArray = nll.sum((2, 3)) / (len(grid.documents) * tokens.sum())
        draws = bootstrap_means(nll.reshape(-1, *nll.shape[2:]), tokens, seed=seed)
        self.draws: FloatArray = draws.reshape(-1, *nll.shape[:2])

    def excess(self, method: str, other: str = DENSE) -> tuple[FloatArray, FloatArray]:
        """Nats per token of `method` above `other`: measured `(lengths,)`, and resampled `(samples, lengths)`."""
        i, j = self.grid.methods.index(method), self.grid.methods.index(other)
        return self.means[i] - self.means[j], self.draws[:, i] - self.draws[:, j]


def _ratio(value: float, draws: FloatArray) -> dict[str, float]:
    low, high = percentile_interval(draws)
    return {"ratio": math.exp(value), "low": math.exp(low), "high": math.exp(high)}


def _result(series: _Series, method: str, length: int) -> dict[str, Any]:
    records = series.grid.at(method, length)
    nll, tokens = ([record[name] for record in records] for name in ("nll", "tokens"))
    value, draws = series.excess(method)
    i = series.grid.lengths.index(length)
    # Imported where it is used: the command line and the tests start without datasets and evaluate, too.
    from hf_sparse.measure.metric import token_perplexity

    return {
        "method": method,
        "length": length,
        "perplexity": token_perplexity(nll, tokens),
        **_ratio(value[i], draws[:, i]),
        **{name: _mean(records, name) for name in ("density", "sparse_density", "mean_keys", "seconds")},
        "tokens": sum(tokens),
    }


def _mean(records: Sequence[Record], column: str) -> float | None:
    values = [record[column] for record in records if record.get(column) is not None]
    return math.fsum(values) / len(values) if values else None


def _over_lengths(series: _Series, method: str) -> dict[str, Any]:
    value, draws = series.excess(method)
    return {
        "method": method,
        "mean": _ratio(value.mean(), draws.mean(1)),
        "worst_length": series.grid.lengths[int(value.argmax())],
        "worst": _ratio(value.max(), draws.max(1)),
    }


def _verdict(series: _Series, adaptive: str, fixed: str) -> dict[str, Any]:
    value, draws = series.excess(adaptive, fixed)
    ours, our_draws = series.excess(adaptive)
    theirs, their_draws = series.excess(fixed)
    lengths = enumerate(series.grid.lengths)
    return {
        "adaptive": adaptive,
        "fixed": fixed,
        "by_length": [{"length": length, **_ratio(value[i], draws[:, i])} for i, length in lengths],
        "mean": _ratio(value.mean(), draws.mean(1)),
        "worst": _ratio(ours.max() - theirs.max(), our_draws.max(1) - their_draws.max(1)),
    }


def all_tables(summary: Summary) -> list[Table]:
    """Every table that has lines."""
    made = [cells(summary) for cells in (perplexity_cells, method_cells, verdict_cells, overview_cells)]
    return [table for table in made if table[1]]


def perplexity_cells(summary: Summary) -> Table:
    """Perplexity and ratio to dense of every method and length.

    Where sliding-window layers make a difference to the density, that of the other layers has a column too.
    """
    columns: list[Column] = [
        ("method", "{method}"),
        ("length", "{length}"),
        ("perplexity", "{perplexity:.3f}"),
        ("ratio to dense", "{ratio:.4f}"),
        ("95 % interval", lambda row: "-" if row["method"] == DENSE else _INTERVAL.format(**row)),
        ("density", "{density:.3f}"),
        ("mean keys", known("mean_keys", ".0f")),
    ]
    if any(row.get("sparse_density") not in (None, row["density"]) for row in summary["results"]):
        columns.append(("density, full layers", known("sparse_density", ".3f")))
    return make_table(columns, summary["results"])


def method_cells(summary: Summary) -> Table:
    """Ratio to dense of every method, over all lengths and at its worst."""
    columns: list[Column] = [
        ("method", "{method}"),
        ("mean ratio", "{mean[ratio]:.4f}"),
        ("95 % interval", "{mean[low]:.4f} to {mean[high]:.4f}"),
        ("worst length", "{worst_length}"),
        ("worst ratio", "{worst[ratio]:.4f}"),
        ("95 % interval", "{worst[low]:.4f} to {worst[high]:.4f}"),
    ]
    return make_table(columns, (row for row in summary["methods"] if row["method"] != DENSE))


def verdict_cells(summary: Summary) -> Table:
    """Adaptive against fixed at equal cost, and which is better where the interval leaves no doubt."""
    columns: list[Column] = [
        ("adaptive / fixed", "{adaptive} / {fixed}"),
        ("over", "{over}"),
        ("ratio", "{ratio:.4f}"),
        ("95 % interval", _INTERVAL),
        ("better", "{better}"),
    ]
    lines = []
    for pair in summary["adaptive_vs_fixed"]:
        over = [(row["length"], row) for row in pair["by_length"]]
        for name, row in [*over, ("all lengths", pair["mean"]), ("worst length", pair["worst"])]:
            better = pair["adaptive"] if row["high"] < 1 else pair["fixed"] if row["low"] > 1 else "not resolved"
            lines.append(pair | row | {"over": name, "better": better})
    return make_table(columns, lines)


def overview_cells(summary: Summary) -> Table:
    """A line per method, a column per length: the dense model's perplexity, then ratios to it."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in summary["results"]):
        shown = {"ratio": "{ratio:.4f} (" + _INTERVAL + ")", "density": "{density:.3f}"}
        for name, form in ({"perplexity": "{perplexity:.2f}"} if method == DENSE else shown).items():
            own = [form.format(**row) for row in summary["results"] if row["method"] == method]
            lines.append([f"{method}: {name}", *own])
    return ["method", *(f"{length:,} tokens" for length in summary["lengths"])], lines
