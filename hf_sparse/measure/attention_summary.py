"""From records to answers: attention error with intervals, its slope against n, and laws compared at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse.errors import UserError
from hf_sparse.measure.attention_error import COMMAND
from hf_sparse.measure.grid import Grid
from hf_sparse.measure.methods import CALIBRATED, EXACT
from hf_sparse.measure.statistics import FloatArray, estimate, log_slope, percentile_interval
from hf_sparse.results import DENSE, Record, Summary

ERRORS = ("lost_mass", "l1", "max_entry", "l2", "output_error")
"""Metrics of a method that are 0 for dense attention."""

NEEDED = ("keys_90", "keys_95", "keys_99")
"""Keys that dense attention itself needs: their slope is the exponent C of a budget that keeps the mass constant."""

SHAPES = (*NEEDED, "entropy")
"""Metrics of dense attention itself."""

STATISTICS = ("mean", "worst")
"""Over the queries of a head: their mean, and the mean of the worst 1 %."""

SAMPLES = 2000

MOST_DENSE = 0.5
"""A method that keeps a larger share of the visible keys is not fitted there: it runs out of keys to leave out, and its
error falls to 0 by no power of n."""


def summarise(records: Sequence[Record], seed: int) -> Summary:
    """The summary of the records of `attention_error.evaluate`: every method on the same documents and lengths.

    Values are means over documents, layers and heads of what `layer_errors` keeps of a head. Layers in which a sliding
    window hides keys are left out, except in `layers`: their n does not grow with the length. `low` and `high` are
    the 95 % interval of a bootstrap that draws documents, the same ones for every method and length. Of a single
    document it draws (layer, head) pairs instead and says how heads differ, not how texts do: see `resampled`.

    Returns:
        A dictionary for `json.dumps`:

        - `results`: for each method and length `rows` (queries measured per head), `visible`, `kept`, `density`; under
          the name of each metric, `mean` and `worst`, each a `value` with `low` and `high`; `lost_mass` is there beside
          `retained_mass`; `frobenius` has one value;
        - `slopes`: for each method, metric and statistic the least-squares line through (ln n, ln value), where n is
          the mean of the visible keys: `slope` with `low` and `high`, `intercept`, and `lengths`, the lengths it goes
          through. Lengths at which more than half of the visible keys are kept, or where nothing is lost, are left
          out; `slope` and the others are `None` where less than two remain;
        - `reference`: the method that the others are compared with: `"calibrated"` if it was measured, else `"topk"`,
          else the first;
        - `comparisons`: error of each other method divided by that of `reference`: of the mean over lengths (`mean`)
          and of each one's own worst length (`worst_length`), `ratio` with `low` and `high`: above 1, `reference` is
          better;
        - `layers`: `value` alone, for each method and layer, at the longest length, with `windowed`;
        - `methods`, `resampled` (what the bootstrap drew), and what `Grid.describe` says.

    Raises:
        UserError: (a `ValueError`) if a sliding window hides keys in every layer.
    """
    grid = Grid.of(records)
    series = _Series(grid, seed)
    methods = [method for method in grid.methods if method != DENSE]
    reference = next(name for name in (CALIBRATED, EXACT, *methods) if name in methods)
    fitted = [(method, metric) for method in grid.methods for metric in (NEEDED if method == DENSE else ERRORS)]
    compared = [(method, metric) for method in methods if method != reference for metric in ERRORS]
    described = grid.describe(COMMAND, seed, SAMPLES)
    return {
        **described,
        "results": [_result(series, method, length) for method, length in grid.places()],
        "slopes": [
            {"method": method, "metric": metric, "statistic": statistic}
            | _slope(series, method, f"{metric}_{statistic}")
            for method, metric in fitted
            for statistic in STATISTICS
        ],
        "reference": reference,
        "comparisons": [
            {"method": method, "metric": metric, "statistic": statistic}
            | _comparison(series, method, reference, f"{metric}_{statistic}")
            for method, metric in compared
            for statistic in STATISTICS
        ],
        "layers": [row for method in grid.methods for row in _layers(grid, method)],
        "methods": methods,
        "resampled": "documents" if len(grid.documents) > 1 else "layers and heads",
        "configs": {method: described["configs"][method] for method in methods},
    }


class _Series:
    """Values of the columns of every method, and the bootstrap's draws.

    Attributes:
        grid: The records.
        values: (method, column) -> `(clusters, lengths)`, where a cluster is what the bootstrap draws.
        shares: `(samples, clusters)`: share of each cluster in each sample.
    """

    def __init__(self, grid: Grid, seed: int) -> None:
        self.grid = grid
        self.values: dict[tuple[str, str], FloatArray] = {}
        growing = ~_columns(grid.records[0])["windowed"].astype(bool)
        if not growing.any():
            raise UserError("a sliding window hides keys in every layer: there is no error against n to sum up")
        several = len(grid.documents) > 1
        for method in grid.methods:
            columns = [[_columns(record) for record in grid.at(method, length)] for length in grid.lengths]
            for name in columns[0][0]:
                # (lengths, documents, heads of all layers)
                whole = np.array([[own[name][growing] for own in documents] for documents in columns])
                self.values[method, name] = (whole.mean(2) if several else whole[:, 0]).T
        clusters = len(grid.documents) if several else int(growing.sum())
        # One less than there are: drawing all of them would make the spread of a mean too small by their share.
        drawn = clusters - 1
        draws = np.random.default_rng(seed).multinomial(drawn, np.full(clusters, 1 / clusters), size=SAMPLES)
        self.shares: FloatArray = draws / drawn

    def mean(self, method: str, column: str) -> FloatArray:
        """`(lengths,)`."""
        return np.asarray(self.values[method, column].mean(0))

    def draws(self, method: str, column: str) -> FloatArray:
        """`(samples, lengths)`."""
        return np.asarray(self.shares @ self.values[method, column])

    def with_interval(self, method: str, column: str, index: int) -> dict[str, float]:
        """The value at one length, with its interval."""
        return estimate(self.mean(method, column)[index], self.draws(method, column)[:, index])


def _columns(record: Record) -> dict[str, FloatArray]:
    """The columns of a record as arrays, the lost mass among them."""
    out = {name: np.asarray(column, dtype=np.float64) for name, column in record["columns"].items()}
    for statistic in STATISTICS:
        if f"l1_{statistic}" in out:
            # Not 1 - retained mass, of which rounding to six digits leaves little where little is lost.
            out[f"lost_mass_{statistic}"] = out[f"l1_{statistic}"] / 2
    return out


def _result(series: _Series, method: str, length: int) -> dict[str, Any]:
    index = series.grid.lengths.index(length)
    out: dict[str, Any] = {"method": method, "length": length, "rows": series.grid.at(method, length)[0]["rows"]}
    for name in ("visible", "kept", "density"):
        out[name] = float(series.mean(method, name)[index])
    for metric in SHAPES if method == DENSE else ("retained_mass", *ERRORS):
        out[metric] = {s: series.with_interval(method, f"{metric}_{s}", index) for s in STATISTICS}
    if method != DENSE:
        out["frobenius"] = series.with_interval(method, "frobenius", index)
    return out


def _slope(series: _Series, method: str, column: str) -> dict[str, Any]:
    value = series.mean(method, column)
    used = value > 0
    if method != DENSE:
        used &= series.mean(method, "density") <= MOST_DENSE
    lengths = [length for length, use in zip(series.grid.lengths, used, strict=True) if use]
    if len(lengths) < 2:
        return {"slope": None, "low": None, "high": None, "intercept": None, "lengths": lengths}
    n = series.mean(method, "visible")[used]
    slope, intercept = log_slope(n, value[used])
    draws = series.draws(method, column)[:, used]
    # A sample may consist of clusters without any error at some length: it has no slope.
    slopes, _ = log_slope(n, draws[(draws > 0).all(1)])
    low, high = percentile_interval(slopes)
    return {"slope": float(slope), "low": low, "high": high, "intercept": float(intercept), "lengths": lengths}


def _comparison(series: _Series, method: str, reference: str, column: str) -> dict[str, Any]:
    mine, other = series.mean(method, column), series.mean(reference, column)
    my_draws, other_draws = series.draws(method, column), series.draws(reference, column)
    out: dict[str, Any] = {}
    for name, over in (("mean", np.mean), ("worst_length", np.max)):
        theirs = over(other_draws, axis=1)
        if (theirs <= 0).any():
            out[name] = {"ratio": None, "low": None, "high": None}
        else:
            low, high = percentile_interval(over(my_draws, axis=1) / theirs)
            out[name] = {"ratio": float(over(mine) / over(other)), "low": low, "high": high}
    return out


def _layers(grid: Grid, method: str) -> list[dict[str, Any]]:
    length = grid.lengths[-1]
    found = [_columns(record) for record in grid.at(method, length)]
    layers = found[0]["layer"]
    means = {name: np.mean([columns[name] for columns in found], axis=0) for name in found[0] if name != "head"}
    out = []
    for layer in dict.fromkeys(layers.tolist()):
        own = {name: float(mean[layers == layer].mean()) for name, mean in means.items()}
        out.append({"method": method, "length": length, **own, "layer": int(layer), "windowed": bool(own["windowed"])})
    return out
