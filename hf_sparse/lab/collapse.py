"""Experiment: whether the attention of a model collapses as n grows, in which sense, and what log-n scaling does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_sparse.engines.common import weighted_values
from hf_sparse.lab.bounds import FloatArray
from hf_sparse.lab.detectors import DISPERSED, EPSILON, KINDS, detect, kind_of, log_n_scaling, log_scaled, mixing
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Panel, Setting, Verdict
from hf_sparse.lab.norms import ROWS, SINKS, by_length, by_share, share, shortened_keys
from hf_sparse.lab.rows import shortened
from hf_sparse.lab.sampling import LayerRows, visit_rows
from hf_sparse.lab.subject import find_window, longest_windows, mean_nll, row_lengths, subject_of, window_cell
from hf_sparse.measure.tables import Table
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE = {"small": 128, "full": 512}
"""Keys up to which log-n scaling leaves logits as they are."""

LEAST = 256
"""Smallest n."""

ALIKE = 0.95
_COLORS = dict(zip(KINDS, ("#d6604d", "#2166ac", "#f4a582", "#d9d9d9"), strict=True))


def cells(setting: Setting) -> Sequence[Cell]:
    """Every document, and the first one with the logits of all layers scaled."""
    windows = longest_windows(subject_of(setting))
    more = {"rows": ROWS[setting.scale], "reference": REFERENCE[setting.scale]}
    return [
        *(window_cell(window, scaled=False, **more) for window in windows),
        window_cell(windows[0], scaled=True, **more),
    ]


def measure(cell: Cell, setting: Setting) -> Row:
    """Detectors by layer and n, on the logits as they are and scaled after the fact; the mixing of values; the loss."""
    subject = subject_of(setting)
    window = find_window(subject, cell["window"])
    first = longest_windows(subject)[0].document
    found: list[Row] = []
    outputs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def visit(rows: LayerRows) -> None:
        entry = detect(rows.logits, rows.visible, SINKS)
        if not cell["scaled"]:
            scaled = detect(log_scaled(rows, cell["reference"]), rows.visible, SINKS)
            entry["scaled_effective"] = scaled["effective"]
        found.append({"layer": rows.layer, "n": rows.length, **shortened(entry)})
        output = weighted_values(rows.dense.call, rows.dense.weights)[0]
        outputs.setdefault(rows.layer, []).append((output, rows.values[:, rows.visible - 1]))

    with log_n_scaling(subject.model, cell["reference"]) if cell["scaled"] else nullcontext():
        visit_rows(subject.model, window, row_lengths(cell["length"], LEAST), cell["rows"], visit)
        # Only where it is compared: a pass costs as much as all the rest.
        nll = {"nll": mean_nll(subject.model, window)} if cell["document"] == first else {}
    mixed = [
        {"layer": layer, **shortened(mixing(*(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))))}
        for layer, pairs in outputs.items()
    ]
    return {"detectors": found, "mixing": mixed, **nll}


def conclude(rows: Sequence[Row]) -> Findings:
    """Where real heads stand, by n."""
    plain = [row for row in rows if not row["scaled"]]
    forward = next(row for row in rows if row["scaled"])
    same_text = next(row for row in plain if row["document"] == forward["document"])
    columns = {
        name: by_length(plain, "detectors", name)
        for name in ("above", "largest", "effective", "first", "rest_largest", "rest_share", "scaled_effective")
    }
    lengths = list(columns["above"])
    last = lengths[-1]
    kinds = {n: _shares(columns, n) for n in lengths}
    exponents = {name: _exponents(columns[name]) for name in ("effective", "scaled_effective")}
    exponents["forward_effective"] = _exponents(by_length([forward], "detectors", "effective"))
    flat = {
        name: np.array([value for row in plain for layer in row["mixing"] for value in layer[name]])
        for name in ("output_alike", "value_alike", "output_rank", "value_rank")
    }
    collapsed = share(flat["output_alike"] >= ALIKE)
    cost = forward["nll"] - same_text["nll"]
    mixed = {name: float(np.median(values)) for name, values in flat.items()}
    figures = {
        "n": last,
        "kinds": kinds,
        "median": {
            name: {n: float(np.median(values)) for n, values in found.items()} for name, found in columns.items()
        },
        "exponent_of_effective": {name: _quartiles(values) for name, values in exponents.items()},
        "mixing": mixed | {"share_alike": collapsed},
        "nll_above_own_when_scaled": cost,
    }
    first = lengths[0]

    def change(name: str, form: str = ".2f") -> str:
        before, after = (np.median(columns[name][n]) for n in (first, last))
        return f"{before:{form}} at n = {first:,} and {after:{form}} at {last:,}"

    growth = float(np.median(exponents["effective"]))
    count_text = (
        f"the median head has {change('above', '.0f')} entries above {EPSILON:g}, which is bounded for any row of any "
        f"length, but {change('effective', '.0f')} effective entries e^H, growing as n^{growth:.2f} (median exponent)"
    )
    kind_text = f"at n = {last:,} " + ", ".join(
        f"{100 * kinds[last][kind]:.0f} % of heads are {kind}" for kind in KINDS[:3]
    )
    disperse_text = (
        f"entropy without the first {SINKS} keys over ln n, median head: {change('rest_share')}; "
        f"{100 * kinds[last]['dispersed']:.0f} % of heads are above {DISPERSED:g}"
    )
    rank_text = (
        f"outputs of rows in different places share {mixed['output_alike']:.2f} of their squared norm in the median "
        f"head (values of keys: {mixed['value_alike']:.2f}), stable rank {mixed['output_rank']:.1f} against "
        f"{mixed['value_rank']:.1f}; {100 * collapsed:.0f} % of heads are above {ALIKE:g}"
    )
    scale_text = (
        f"with logits times max(1, ln n / ln {forward['reference']}), effective entries of the median head grow as "
        f"n^{np.median(exponents['scaled_effective']):.2f} instead of n^{growth:.2f} (all layers rerun so: "
        f"n^{np.median(exponents['forward_effective']):.2f}), and the loss of the model, which was not trained for it, "
        f"changes by {cost:+.3f} nats a token"
    )
    where = f"every head of the layers that see {last:,} keys"
    verdicts = [
        Verdict(
            "attention collapses: the entries of a row that are not negligible become one or O(1)",
            "machine summary",
            "fails" if growth > 0.1 else "holds",
            where + ", in the sense of entropy; in the sense of a count above a fixed epsilon it holds for any row",
            count_text,
        ),
        Verdict(
            "attention freezes as n grows: one key besides the sinks takes the mass",
            "derived here",
            by_share(kinds[last]["frozen"]),
            where,
            kind_text,
        ),
        Verdict(
            "attention disperses as n grows: H / ln n tends to 1",
            "derived here",
            by_share(kinds[last]["dispersed"]),
            where,
            disperse_text,
        ),
        Verdict(
            "value mixing makes the outputs of all rows one vector",
            "derived here",
            by_share(collapsed),
            where,
            rank_text,
        ),
        Verdict(
            "log-n scaling of the logits halves the exponent with which effective entries grow",
            "derived here",
            "holds" if float(np.median(exponents["scaled_effective"])) <= growth / 2 else "fails",
            where + ", logits scaled after training",
            scale_text,
        ),
    ]
    panels = [
        Panel(
            "Kinds of heads",
            f"{_capital(kind_text)}. {_capital(disperse_text)}.",
            lambda axes: _draw_kinds(axes, kinds),
        ),
        Panel(
            "Effective entries of a row",
            f"{_capital(count_text)}. {_capital(scale_text)}.",
            lambda axes: _draw_effective(axes, columns["effective"], columns["scaled_effective"], columns["above"]),
        ),
    ]
    return Findings(shortened_keys(figures), verdicts, panels, [_table(columns, kinds)])


def _shares(columns: dict[str, dict[int, FloatArray]], n: int) -> dict[str, float]:
    heads = zip(*(columns[name][n] for name in ("first", "rest_largest", "rest_share")), strict=True)
    found = [kind_of(*head) for head in heads]
    return {kind: found.count(kind) / len(found) for kind in KINDS}


def _exponents(values: dict[int, FloatArray]) -> FloatArray:
    """Exponent of n of every head: `(heads,)`."""
    fitted: FloatArray = np.polyfit(np.log(list(values)), np.log(np.stack(list(values.values()))), 1)[0]
    return fitted


def _quartiles(values: FloatArray) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"low": float(low), "median": float(middle), "high": float(high)}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _table(columns: dict[str, dict[int, FloatArray]], kinds: dict[int, dict[str, float]]) -> Table:
    names = ("above", "effective", "largest", "first", "rest_share")
    header = [
        "n",
        f"entries above {EPSILON:g}",
        "e^H",
        "largest",
        f"first {SINKS} keys",
        "H / ln n without them",
        *KINDS[:3],
    ]
    body = [
        [
            f"{n:,}",
            *(f"{np.median(columns[name][n]):.3g}" for name in names),
            *(f"{100 * kinds[n][kind]:.0f} %" for kind in KINDS[:3]),
        ]
        for n in kinds
    ]
    return header, body


def _draw_kinds(axes: Axes, kinds: dict[int, dict[str, float]]) -> None:
    places = np.arange(len(kinds))
    bottom = np.zeros(len(kinds))
    for kind in KINDS:
        height = np.array([100 * shares[kind] for shares in kinds.values()])
        axes.bar(places, height, bottom=bottom, color=_COLORS[kind], label=kind)
        bottom = bottom + height
    axes.set_xticks(places, [f"{n:,}" for n in kinds])
    axes.set(xlabel="visible keys n", ylabel="% of heads")
    axes.legend(fontsize=8)


def _draw_effective(
    axes: Axes, effective: dict[int, FloatArray], scaled: dict[int, FloatArray], above: dict[int, FloatArray]
) -> None:
    lengths = list(effective)
    for found, color, label in (
        (effective, "#2166ac", "effective entries e^H"),
        (scaled, "#b2182b", "with log-n scaling"),
        (above, "#666666", f"entries above {EPSILON:g}"),
    ):
        quartiles = np.array([np.quantile(found[n], [0.25, 0.5, 0.75]) for n in lengths])
        axes.plot(lengths, quartiles[:, 1], "o-", color=color, label=label)
        axes.fill_between(lengths, quartiles[:, 0], quartiles[:, 2], color=color, alpha=0.15)
    axes.plot(lengths, [math.sqrt(n) for n in lengths], ":", color="#999999", label="sqrt(n)")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="visible keys n", ylabel="entries (band: quartiles of heads)", yscale="log")
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    "collapse",
    "Three kinds of attention collapse",
    "attention collapses: a row keeps O(1) entries that are not negligible",
    "machine summary",
    cells,
    measure,
    conclude,
    needs_model=True,
)
