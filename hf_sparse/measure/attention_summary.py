"""From records to answers: attention error with intervals, its slope against n, and laws compared at equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_sparse.errors import UserError
from hf_sparse.measure.attention_error import COMMAND
from hf_sparse.measure.methods import CALIBRATED, EXACT
from hf_sparse.measure.statistics import CONFIDENCE, FloatArray, estimate, log_slope, percentile_interval
from hf_sparse.results import DENSE, Record, Summary, describe

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
    """Summarise records of `evaluate`: every method on the same documents and lengths, `dense` among them.

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
        - `command`, `methods`, `lengths`, `documents`, `resampled` (what the bootstrap drew), `seed`, `samples`,
          `confidence`, `configs`, `about`.

    Raises:
        UserError: (a `ValueError`) if a sliding window hides keys in every layer.
    """
    cells = _Cells.of(records, seed)
    methods = [method for method in cells.methods if method != DENSE]
    reference = next(name for name in (CALIBRATED, EXACT, *methods) if name in methods)
    metrics = {method: NEEDED if method == DENSE else ERRORS for method in cells.methods}
    described = describe(COMMAND, records)
    return {
        **described,
        "results": [_result(cells, records, method, length) for method in cells.methods for length in cells.lengths],
        "slopes": [
            {
                "method": method,
                "metric": metric,
                "statistic": statistic,
                **_slope(cells, method, f"{metric}_{statistic}"),
            }
            for method in cells.methods
            for metric in metrics[method]
            for statistic in STATISTICS
        ],
        "reference": reference,
        "comparisons": [
            {"method": method, "metric": metric, "statistic": statistic}
            | _comparison(cells, method, reference, f"{metric}_{statistic}")
            for method in methods
            if method != reference
            for metric in ERRORS
            for statistic in STATISTICS
        ],
        "layers": [row for method in cells.methods for row in _layers(records, method, cells.lengths[-1])],
        "methods": methods,
        "lengths": cells.lengths,
        "resampled": "documents" if len(described["documents"]) > 1 else "layers and heads",
        "seed": seed,
        "samples": SAMPLES,
        "confidence": CONFIDENCE,
        "configs": {row["method"]: row["config"] for row in records if row["config"] is not None},
    }


@dataclass(frozen=True)
class _Cells:
    """Values of the columns of every method, and the bootstrap's draws.

    Attributes:
        values: (method, column) -> `(clusters, lengths)`, where a cluster is what the bootstrap draws.
        shares: `(samples, clusters)`: share of each cluster in each sample.
    """

    methods: list[str]
    lengths: list[int]
    values: Mapping[tuple[str, str], FloatArray]
    shares: FloatArray

    @classmethod
    def of(cls, records: Sequence[Record], seed: int) -> _Cells:
        methods = list(dict.fromkeys(row["method"] for row in records))
        lengths = sorted({row["length"] for row in records})
        documents = list(dict.fromkeys(row["text_sha256"] for row in records))
        columns = {(row["method"], row["length"], row["text_sha256"]): _columns(row) for row in records}
        growing = ~next(iter(columns.values()))["windowed"].astype(bool)
        if not growing.any():
            raise UserError("a sliding window hides keys in every layer: there is no error against n to sum up")
        values = {}
        for method in methods:
            for name in columns[method, lengths[0], documents[0]]:
                # (documents, heads of all layers, lengths)
                whole = np.array([[columns[method, n, d][name][growing] for n in lengths] for d in documents])
                whole = whole.swapaxes(1, 2)
                values[method, name] = whole.mean(1) if len(documents) > 1 else whole[0]
        clusters = len(documents) if len(documents) > 1 else int(growing.sum())
        # One less than there are: drawing all of them would make the spread of a mean too small by their share.
        drawn = clusters - 1
        draws = np.random.default_rng(seed).multinomial(drawn, np.full(clusters, 1 / clusters), size=SAMPLES)
        return cls(methods, lengths, values, draws / drawn)

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


def _result(cells: _Cells, records: Sequence[Record], method: str, length: int) -> dict[str, Any]:
    index = cells.lengths.index(length)
    out: dict[str, Any] = {"method": method, "length": length}
    out["rows"] = next(row["rows"] for row in records if row["length"] == length)
    for name in ("visible", "kept", "density"):
        out[name] = float(cells.mean(method, name)[index])
    for metric in SHAPES if method == DENSE else ("retained_mass", *ERRORS):
        out[metric] = {s: cells.with_interval(method, f"{metric}_{s}", index) for s in STATISTICS}
    if method != DENSE:
        out["frobenius"] = cells.with_interval(method, "frobenius", index)
    return out


def _slope(cells: _Cells, method: str, column: str) -> dict[str, Any]:
    value = cells.mean(method, column)
    used = value > 0
    if method != DENSE:
        used &= cells.mean(method, "density") <= MOST_DENSE
    lengths = [length for length, use in zip(cells.lengths, used, strict=True) if use]
    if len(lengths) < 2:
        return {"slope": None, "low": None, "high": None, "intercept": None, "lengths": lengths}
    n = cells.mean(method, "visible")[used]
    slope, intercept = log_slope(n, value[used])
    draws = cells.draws(method, column)[:, used]
    # A sample may consist of clusters without any error at some length: it has no slope.
    slopes, _ = log_slope(n, draws[(draws > 0).all(1)])
    low, high = percentile_interval(slopes)
    return {"slope": float(slope), "low": low, "high": high, "intercept": float(intercept), "lengths": lengths}


def _comparison(cells: _Cells, method: str, reference: str, column: str) -> dict[str, Any]:
    mine, other = cells.mean(method, column), cells.mean(reference, column)
    my_draws, other_draws = cells.draws(method, column), cells.draws(reference, column)
    out: dict[str, Any] = {}
    for name, over in (("mean", np.mean), ("worst_length", np.max)):
        theirs = over(other_draws, axis=1)
        if (theirs <= 0).any():
            out[name] = {"ratio": None, "low": None, "high": None}
        else:
            low, high = percentile_interval(over(my_draws, axis=1) / theirs)
            out[name] = {"ratio": float(over(mine) / over(other)), "low": low, "high": high}
    return out


def _layers(records: Sequence[Record], method: str, length: int) -> list[dict[str, Any]]:
    found = [_columns(row) for row in records if row["method"] == method and row["length"] == length]
    layers = found[0]["layer"]
    means = {name: np.mean([columns[name] for columns in found], axis=0) for name in found[0]}
    out = []
    for layer in dict.fromkeys(layers.tolist()):
        own = {name: float(mean[layers == layer].mean()) for name, mean in means.items()}
        del own["head"]
        out.append({"method": method, "length": length, **own, "layer": int(layer), "windowed": bool(own["windowed"])})
    return out
