"""Experiment: R and the spread of logits of every head of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hf_sparse.lab.bounds import FloatArray, is_vacuous, logit_radius
from hf_sparse.lab.experiment import Answer, Cell, Experiment, Findings, Panel, Setting, Verdict
from hf_sparse.lab.fits import freezing_norm, random_energy_exponent
from hf_sparse.lab.model_norms import input_scales, logit_spread, watched_inputs, weight_scales
from hf_sparse.lab.rows import shortened
from hf_sparse.lab.sampling import LayerRows, visit_rows
from hf_sparse.lab.subject import find_window, longest_windows, row_lengths, subject_of, window_cell
from hf_sparse.measure.tables import Table
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SINKS = 4
"""First keys that may be attention sinks."""

ROWS = {"small": 4, "full": 16}
DELTA = 0.05
"""Probability with which the formal bound on the logits of a row may fail."""


def cells(setting: Setting) -> Sequence[Cell]:
    """The weights alone, and every document."""
    windows = longest_windows(subject_of(setting))
    rows = ROWS[setting.scale]
    longest = max(window.length for window in windows)
    return [
        {"part": "weights", "length": longest},
        *(window_cell(window, part="text", rows=rows) for window in windows),
    ]


def measure(cell: Cell, setting: Setting) -> Row:
    """See `weight_scales`, `input_scales` and `logit_spread`; a list `spread` with an entry per layer and n."""
    subject = subject_of(setting)
    if cell["part"] == "weights":
        return {"scales": shortened(weight_scales(subject.model, np.arange(cell["length"], dtype=np.float64)))}
    spread: list[Row] = []

    def visit(rows: LayerRows) -> None:
        spread.append({"layer": rows.layer, "n": rows.length, **shortened(logit_spread(rows, SINKS))})

    window = find_window(subject, cell["window"])
    with watched_inputs(subject.model) as moments:
        visit_rows(subject.model, window, row_lengths(cell["length"]), cell["rows"], visit)
    return {"inputs": shortened(input_scales(subject.model, moments, cell["length"])), "spread": spread}


def by_length(rows: Sequence[Row], part: str, name: str) -> dict[int, FloatArray]:
    """A column of a list of layers, by n: the mean over documents, `(heads of all layers, ...)`."""
    found: dict[int, list[list[float]]] = {}
    for row in rows:
        here: dict[int, list[float]] = {}
        for entry in row[part]:
            here.setdefault(entry["n"], []).extend(entry[name])
        for n, values in here.items():
            found.setdefault(n, []).append(values)
    return {n: np.mean(values, axis=0) for n, values in sorted(found.items())}


def share(condition: NDArray[np.bool_]) -> float:
    """Share of the entries of a condition that are true."""
    return float(np.mean(condition))


def by_share(value: float) -> Answer:
    """Whether what is true of this share of the heads holds."""
    return "holds" if value >= 0.95 else "fails" if value <= 0.05 else "holds in part"


def trivial_rotation(ratio: FloatArray) -> str:
    """Why R cannot depend on the rotation, given R with over R without it; empty if it can.

    Where queries and keys are normalised after their projection, W is the rotation alone, of one norm at any angle.
    """
    if not np.allclose(ratio, 1, atol=1e-3):
        return ""
    return " (by construction: queries and keys are normalised, so that W is the rotation alone)"


def conclude(rows: Sequence[Row]) -> Findings:
    """R against the thresholds, and which assumption makes the difference."""
    weights = next(row["scales"] for row in rows if row["part"] == "weights")
    texts = [row for row in rows if row["part"] == "text"]
    squared = np.mean([np.square(row["inputs"]["bound"]) for row in texts], axis=0)
    plain, rope, spectral = (squared * np.array(weights[name]) for name in ("plain", "rope", "spectral"))
    gain = np.array(weights["rope"]) / np.array(weights["plain"])
    independent = np.mean([row["inputs"]["independent"] for row in texts], axis=0)
    deviation, tilted, spread = (by_length(texts, "spread", name) for name in ("deviation", "tilted", "spread"))
    subgaussian, rest = (by_length(texts, "spread", name) for name in ("sub_gaussian", "rest"))
    lengths = list(deviation)
    last = lengths[-1]
    flat = _of_layers(texts[0], last)  # layers that see the last n
    measured = deviation[last]
    in_units = np.array([np.median(values / math.sqrt(math.log(n))) for n, values in deviation.items()])
    growth = float(np.polyfit(np.log(np.log(lengths)), np.log([np.median(deviation[n]) for n in lengths]), 1)[0])
    vacuous = np.array(
        [
            is_vacuous(last, 2 * logit_radius(r, s, last, DELTA))
            for r, s in zip(rope[flat].ravel(), spectral[flat].ravel(), strict=True)
        ]
    )
    ratio = independent[flat].ravel() / measured
    below = {
        "R": share(rope[flat] < math.sqrt(math.log(last))),
        "independent": share(independent[flat] < math.sqrt(math.log(last))),
        "measured": share(measured < math.sqrt(math.log(last))),
        "measured, tilted": share(tilted[last] < math.sqrt(math.log(last))),
    }
    thawed = {n: share(values < freezing_norm(n)) for n, values in deviation.items()}
    figures = {
        "n": last,
        "heads": len(measured),
        "sqrt_ln_n": math.sqrt(math.log(last)),
        "freezing": freezing_norm(last),
        "R_rope": _quartiles(rope[flat]),
        "R_plain": _quartiles(plain[flat]),
        "rope_over_plain": _quartiles(gain[flat]),
        "independent": _quartiles(independent[flat]),
        "measured": {n: _quartiles(values) for n, values in deviation.items()},
        "without_sinks": _quartiles(rest[last]),
        "sub_gaussian": _quartiles(subgaussian[last]),
        "tilted": _quartiles(tilted[last]),
        "spread": _quartiles(spread[last]),
        "independent_over_measured": _quartiles(ratio),
        "share_vacuous": share(vacuous),
        "share_below_sqrt_ln_n": below,
        "share_below_freezing": thawed,
        "measured_over_sqrt_ln_n": dict(zip(lengths, in_units.tolist(), strict=True)),
        "exponent_of_ln_n": growth,
        "share_spread_above_ln_n": share(spread[last] > math.log(last)),
    }
    figures = shortened_keys(figures)
    line = f"sqrt(ln n) = {math.sqrt(math.log(last)):.2f} at n = {last:,}"
    r_text = (
        f"R = B^2 ||W||_F, maximised over relative position, has median {np.median(rope[flat]):.3g} "
        f"({_range(rope[flat])}) against {line}; {100 * below['R']:.0f} % of heads are below it and the bound on the "
        f"entries of A is vacuous for {100 * share(vacuous):.0f} %"
    )
    measured_text = (
        f"measured logits of a row deviate by {np.median(measured):.2f} ({_range(measured)}): "
        f"{100 * below['measured']:.0f} % of heads are below sqrt(ln n), {100 * thawed[last]:.0f} % below "
        f"sqrt(2 ln n) = {freezing_norm(last):.2f}"
    )
    independent_text = (
        f"independent entries with the variances of the real inputs would give {np.median(independent[flat]):.2f}; the "
        f"ratio to the measured deviation has median {np.median(ratio):.2f} ({_range(ratio)})"
    )
    start, end = (float(np.median(deviation[n])) for n in (lengths[0], last))
    growth_text = (
        f"the deviation of the median head goes from {start:.2f} at n = {lengths[0]:,} to {end:.2f} at n = {last:,}, "
        f"as (ln n)^{growth:.2f}; over sqrt(ln n) it is {in_units[0]:.2f} and {in_units[-1]:.2f}. Independent Gaussian "
        f"logits of deviation c sqrt(ln n) need n^(1 - c^2 / 2) keys for a share of the mass: with the last c, "
        f"n^{random_energy_exponent(in_units[-1]):.2f}"
    )
    agree = share((ratio > 1 / 1.25) & (ratio < 1.25))
    where = f"every head of the layers that see {last:,} keys, logits of a row"
    verdicts = [
        Verdict(
            "R is small enough, R = o(sqrt(log n)), for the concentration bound to say that every entry of A is "
            "n^(-1 +- o(1))",
            "machine summary",
            by_share(1 - share(vacuous)),
            where + ", R from weights and largest inputs",
            r_text,
        ),
        Verdict(
            "the logits that the model computes are spread by less than sqrt(log n)",
            "derived here",
            by_share(below["measured"]),
            where,
            measured_text,
        ),
        Verdict(
            "the spread of logits does not grow with n, as for fixed weights and independent bounded inputs",
            "derived here",
            "holds" if abs(growth) < 0.25 else "fails",
            where.replace(f"{last:,} keys", f"{lengths[0]:,} to {last:,} keys") + ", median head",
            growth_text,
        ),
        Verdict(
            "entries of the inputs can be taken for independent: the deviation that follows is the measured one within "
            "25 %",
            "machine summary",
            by_share(agree),
            where,
            independent_text,
        ),
        Verdict(
            "RoPE raises R: the maximum over relative position is more than 5 % above R without RoPE",
            "derived here",
            "not testable here" if trivial_rotation(gain[flat]) else by_share(share(gain[flat] > 1.05)),
            where + ", weights alone",
            f"R at its worst distance over R without RoPE: median {np.median(gain[flat]):.3f} "
            f"({_range(gain[flat])}){trivial_rotation(gain[flat])}",
        ),
    ]
    panels = [
        Panel(
            "Scale of logits by layer",
            f"{_capital(r_text)}. {_capital(independent_text)}.",
            lambda axes: _draw_layers(axes, rope, independent, texts, last),
        ),
        Panel(
            "Measured deviation of a row's logits",
            f"{_capital(measured_text)}. {_capital(growth_text)}.",
            lambda axes: _draw_lengths(axes, deviation, tilted),
        ),
    ]
    return Findings(figures, verdicts, panels, [_table(rope, independent, texts, last)])


def _of_layers(row: Row, length: int) -> list[int]:
    return sorted({entry["layer"] for entry in row["spread"] if entry["n"] == length})


def _quartiles(values: FloatArray) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"low": float(low), "median": float(middle), "high": float(high)}


def shortened_keys(figures: Row) -> Row:
    """`shortened`, with keys that JSON takes."""

    def keyed(value: object) -> object:
        return {str(key): keyed(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    found: Row = shortened(keyed(figures))
    return found


def _range(values: FloatArray) -> str:
    low, high = np.quantile(values, [0.25, 0.75])
    return f"quartiles {low:.3g} to {high:.3g}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _per_layer(texts: Sequence[Row], length: int) -> dict[int, FloatArray]:
    found: dict[int, list[list[float]]] = {}
    for row in texts:
        for entry in row["spread"]:
            if entry["n"] == length:
                found.setdefault(entry["layer"], []).append(entry["deviation"])
    return {layer: np.mean(values, axis=0) for layer, values in found.items()}


def _table(rope: FloatArray, independent: FloatArray, texts: Sequence[Row], length: int) -> Table:
    header = ["layer", "R, RoPE (median head)", "independent", f"measured at n = {length:,}", "least", "most"]
    body = [
        [
            str(layer),
            f"{np.median(rope[layer]):.3g}",
            f"{np.median(independent[layer]):.2f}",
            f"{np.median(values):.2f}",
            f"{values.min():.2f}",
            f"{values.max():.2f}",
        ]
        for layer, values in _per_layer(texts, length).items()
    ]
    return header, body


def _draw_layers(axes: Axes, rope: FloatArray, independent: FloatArray, texts: Sequence[Row], length: int) -> None:
    layers = np.arange(len(rope))
    axes.plot(layers, np.median(rope, axis=1), "s-", color="#b2182b", label="R, RoPE (median head)")
    axes.plot(layers, np.median(independent, axis=1), "^-", color="#ef8a62", label="independent entries")
    measured = _per_layer(texts, length)
    axes.plot(
        list(measured), [np.median(values) for values in measured.values()], "o-", color="#2166ac", label="measured"
    )
    for layer, values in measured.items():
        axes.plot([layer] * len(values), values, ".", color="#67a9cf", markersize=3)
    axes.axhline(math.sqrt(math.log(length)), color="#666666", linestyle="--", label="sqrt(ln n)")
    axes.axhline(freezing_norm(length), color="#666666", linestyle=":", label="sqrt(2 ln n)")
    axes.set(xlabel="layer", ylabel=f"deviation of logits, n = {length:,}", yscale="log")
    axes.legend(fontsize=8)


def _draw_lengths(axes: Axes, deviation: dict[int, FloatArray], tilted: dict[int, FloatArray]) -> None:
    lengths = list(deviation)
    for found, color, label in ((deviation, "#2166ac", "deviation"), (tilted, "#1b7837", "deviation as tilted")):
        quartiles = np.array([np.quantile(found[n], [0.25, 0.5, 0.75]) for n in lengths])
        axes.plot(lengths, quartiles[:, 1], "o-", color=color, label=f"{label} (median head)")
        axes.fill_between(lengths, quartiles[:, 0], quartiles[:, 2], color=color, alpha=0.2)
    axes.plot(lengths, [math.sqrt(math.log(n)) for n in lengths], "--", color="#666666", label="sqrt(ln n)")
    axes.plot(lengths, [freezing_norm(n) for n in lengths], ":", color="#666666", label="sqrt(2 ln n)")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="visible keys n", ylabel="deviation of logits (band: quartiles of heads)")
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    "norms",
    "R and the spread of logits",
    "R = B^2 ||W||_F stays below sqrt(log n), so that concentration bounds the entries of QK^T",
    "machine summary",
    cells,
    measure,
    conclude,
    needs_model=True,
)
