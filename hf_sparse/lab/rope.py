"""Experiment `rope`: R, the spread of logits and sparsity of a model without RoPE and with other bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse.lab.bounds import rope_scales
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, decide
from hf_sparse.lab.fits import by_length, log_log_slope, shortened
from hf_sparse.lab.model import (
    QUERIES,
    SINKS,
    Sample,
    find_window,
    frequencies_of,
    layers_of,
    longest_windows,
    mean_nll,
    rope_base,
    row_lengths,
    visit_samples,
    window_cell,
)
from hf_sparse.lab.norms import trivial_rotation
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.scales import head_forms, logit_spread
from hf_sparse.results import Row
from hf_sparse.row_errors import row_shape

FACTORS = {"small": (None, 0.1, 1.0, 10.0), "full": (None, 0.01, 0.1, 1.0, 10.0, 100.0)}
"""Factors of the base of RoPE; `None` for no position embedding."""

LONGEST = 2048
_DISTANCES = 1024


def cells(setting: Setting) -> Sequence[Cell]:
    """Every base, on one document."""
    window = longest_windows(setting.subject, LONGEST)[0]
    return [window_cell(window, rows=QUERIES[setting.scale], factor=factor) for factor in FACTORS[setting.scale]]


def measure(cell: Cell, setting: Setting) -> Row:
    """With the base of the cell: ||W_D||_F of every head, spread and concentration of its attention, and the loss."""
    subject = setting.subject
    model, window = subject.model, find_window(subject, cell)
    found: list[Row] = []

    def visit(sample: Sample) -> None:
        entry = {
            "deviation": logit_spread(sample)["deviation"],
            "keys_90": row_shape(sample.dense)["keys_90"][0].mean(-1).tolist(),
            "first_keys": sample.weights[..., :SINKS].sum(-1).mean(-1).tolist(),
        }
        found.append({"layer": sample.layer, "n": sample.length, **shortened(entry)})

    distances = np.arange(_DISTANCES, dtype=np.float64)
    with rope_base(model, cell["factor"]):
        visit_samples(model, window, row_lengths(cell["length"]), cell["rows"], visit)
        nll = mean_nll(model, window)
        over = [
            [rope_scales(*form, frequencies_of(model, layer), distances) for form in head_forms(layer)]
            for layer in layers_of(model)
        ]
    scale = {"largest": np.max(over, axis=-1), "rms": np.sqrt(np.mean(np.square(over), axis=-1))}
    return {"scale": shortened(scale), "rows": found, "nll": nll}


def conclude(records: Sequence[Row]) -> Findings:
    """The effect of the rotation on R, on the spread and on the keys needed, against the model's own base."""
    by_factor = {record["factor"]: record for record in records}
    own, plain = by_factor[1.0], by_factor[None]
    keys = {_name(factor): by_length([record], "rows", "keys_90") for factor, record in by_factor.items()}
    lengths = list(keys[_name(1.0)])
    n = lengths[-1]
    columns: dict[str, dict[str, float]] = {}
    for factor, record in by_factor.items():
        largest = np.array(record["scale"]["largest"]) / np.array(own["scale"]["largest"])
        needed = keys[_name(factor)]
        columns[_name(factor)] = {
            "R_over_own": float(np.median(largest)),
            "R_over_own_most": float(largest.max()),
            "deviation": float(np.median(by_length([record], "rows", "deviation")[n])),
            "keys_90": float(np.mean(needed[n])),
            "keys_90_exponent": float(log_log_slope(lengths, [values.mean() for values in needed.values()])),
            "first_keys": float(np.mean(by_length([record], "rows", "first_keys")[n])),
            "nll_above_own": record["nll"] - own["nll"],
        }
    ratio = np.array(own["scale"]["largest"]) / np.array(plain["scale"]["largest"])
    why_trivial = trivial_rotation(ratio)
    fewer = float(np.mean(keys[_name(1.0)][n] < keys[_name(None)][n]))
    base = [columns[_name(factor)]["R_over_own"] for factor in by_factor if factor is not None]
    change = max(base) / min(base)
    with_rope, without = columns[_name(1.0)], columns[_name(None)]
    where = "every head, RoPE of a trained model changed at inference"
    verdicts = [
        Verdict(
            "R, maximised over relative position, hardly depends on RoPE and its base (10 %, median head)",
            "derived here",
            "not testable here" if why_trivial else decide(bool(max(change, np.median(ratio)) < 1.1)),
            where + ", weights alone",
            {
                "R at its worst distance with RoPE over R without, median head": float(np.median(ratio)),
                "all heads": f"{ratio.min():.3f} to {ratio.max():.3f}",
                "largest change of the median head's R over the bases": change,
            }
            | ({"by construction": why_trivial} if why_trivial else {}),
        ),
        Verdict(
            "RoPE makes attention sparser: fewer keys hold 90 % of the mass",
            "derived here",
            decide(fewer),
            where,
            {"n": n, "share of heads that need fewer with RoPE": fewer}
            | {
                f"with, without: {what}": f"{with_rope[name]:{form}}, {without[name]:{form}}"
                for what, name, form in (
                    ("keys of the mean head", "keys_90", ".0f"),
                    ("deviation of the median head's logits", "deviation", ".2f"),
                    ("nats a token above the model's own", "nll_above_own", "+.2f"),
                )
            }
            | {"outside the training of the model": "all bases but its own"},
        ),
    ]
    header = ["base", "R over own (median head)", "deviation", "keys for 90 %", "exponent", "first 4 keys", "loss"]
    form = "{R_over_own:.3f} {deviation:.2f} {keys_90:.0f} {keys_90_exponent:.2f} {first_keys:.2f} {nll_above_own:+.3f}"
    body = [[name, *form.format(**entry).split()] for name, entry in columns.items()]
    drawn = [_name(factor) for factor in FACTORS["small"] if factor in by_factor]

    def ratios(name: str) -> list[float]:
        return [entry[name] / with_rope[name] for entry in columns.values()]

    lines: dict[str, Any] = {name: [values.mean() for values in keys[name].values()] for name in drawn}
    changes = {"R, median head": ratios("R_over_own"), "deviation of logits, median head": ratios("deviation")}
    panels = [
        Panel("Keys for 90 % of the mass", verdicts[1].caption, lengths, "visible keys n", "keys, mean head", lines),
        Panel("R across bases", verdicts[0].caption, list(columns), "", "ratio to the model's own base", changes, log=""),
    ]  # fmt: skip
    return Findings(shortened({"n": n, "bases": columns}), verdicts, panels, [(header, body)])


def _name(factor: float | None) -> str:
    return "no RoPE" if factor is None else f"base x {factor:g}"


EXPERIMENT = Experiment(
    "rope",
    "R and sparsity with other rotations",
    "R and sparsity with and without RoPE, and across its bases",
    "machine summary",
    cells,
    measure,
    conclude,
    needs_model=True,
)
