"""Experiment: alpha by an objective against alpha by rule, and what bounds and certificates say on real rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_sparse.diagnostics import concentration
from hf_sparse.lab.allocation import Curves, Law, best_uniform, by_error, by_mass, keys_of, uniform
from hf_sparse.lab.bounds import FloatArray
from hf_sparse.lab.curves import certified, error_curves, key_counts
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Panel, Setting, Verdict
from hf_sparse.lab.norms import ROWS, by_length, by_share, share, shortened_keys
from hf_sparse.lab.rows import shortened
from hf_sparse.lab.sampling import LayerRows, visit_rows
from hf_sparse.lab.subject import find_window, layers_of, longest_windows, row_lengths, subject_of, window_cell
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALPHA = {"small": 2.0, "full": 8.0}
"""The law alpha sqrt(n) whose cost all others have."""

LEAST = {"small": 128, "full": 512}
"""Smallest n."""

WORST = 0.05
"""Share of the heads that counts as the worst."""

RULE = "alpha sqrt(n)"
OURS = "per head, by error"


def cells(setting: Setting) -> Sequence[Cell]:
    """Every document."""
    more = {"rows": ROWS[setting.scale], "alpha": ALPHA[setting.scale], "least": LEAST[setting.scale]}
    return [window_cell(window, **more) for window in longest_windows(subject_of(setting))]


def measure(cell: Cell, setting: Setting) -> Row:
    """See `error_curves` and `certified`: a list with an entry per layer and n."""
    subject = subject_of(setting)
    layers = {layer.index: layer for layer in layers_of(subject.model)}
    found: list[Row] = []

    def visit(rows: LayerRows) -> None:
        needed = concentration(rows.dense)["keys_95"][0].mean(-1).tolist()
        entry = error_curves(rows, layers[rows.layer]) | certified(rows, cell["alpha"]) | {"keys_95": needed}
        found.append({"layer": rows.layer, "n": rows.length, **shortened(entry)})

    lengths = row_lengths(cell["length"], cell["least"])
    visit_rows(subject.model, find_window(subject, cell["window"]), lengths, cell["rows"], visit)
    return {"curves": found}


def curves_of(rows: Sequence[Row]) -> Curves:
    """The curves of some documents, their mean."""
    error, needed = (by_length(rows, "curves", name) for name in ("error", "keys_95"))
    counts = {n: np.array([*key_counts(n), n], np.float64) for n in error}
    return Curves(counts, {n: np.pad(columns, ((0, 0), (0, 1))) for n, columns in error.items()}, needed)


def laws_of(curves: Curves, cost: float) -> dict[str, Law]:
    """The laws that are compared, of equal cost."""
    return {
        RULE: uniform(curves, 0.5, cost),
        "fixed": uniform(curves, 0.0, cost),
        "fraction": uniform(curves, 1.0, cost),
        "best alpha n^C": best_uniform(curves, cost),
        "per head, by 95 % mass": by_mass(curves, cost),
        OURS: by_error(curves, cost),
    }


def conclude(rows: Sequence[Row]) -> Findings:
    """Laws fitted on all documents but the last, judged on the last; certificates on all."""
    fitted, held_out = (curves_of(part) for part in ((rows[:-1] or rows), rows[-1:]))
    alpha = rows[0]["alpha"]
    lengths = fitted.lengths
    cost = float(np.mean([min(alpha * math.sqrt(n), n) for n in lengths]))
    laws = laws_of(fitted, cost)
    results: dict[str, Row] = {}
    for name, law in laws.items():
        keys = keys_of(law, lengths)
        results[name] = {
            "keys": float(keys.mean()),
            "fitted": float(fitted.errors(keys).mean()),
            "held_out": float(held_out.errors(keys).mean()),
            "by_n": dict(zip(lengths, held_out.errors(keys).mean(1).tolist(), strict=True)),
            "alpha": float(np.median(law[0])),
            "exponent": float(np.median(law[1])),
        }
    rule = results[RULE]["held_out"]
    by_head = np.sort(held_out.errors(keys_of(laws[RULE], lengths)).mean(0))[::-1]
    concentrated = float(by_head[: math.ceil(WORST * len(by_head))].sum() / by_head.sum())
    ratio = {name: result["held_out"] / rule for name, result in results.items()}
    last = lengths[-1]
    names = ("lost", "certified", "max_entry", "floor", "output", "output_bound")
    bound = {name: by_length(rows, "curves", name)[last] for name in names}
    informative = share(bound["certified"] < 0.5)
    middle = {name: float(np.median(values)) for name, values in bound.items()}
    used = float(np.median(bound["output"] / np.maximum(bound["output_bound"], 1e-30)))
    figures = {
        "laws": results,
        "held_out_error_over_rule": ratio,
        "error_in_worst_heads": concentrated,
        "n": last,
        "heads": fitted.heads,
        "bounds": middle | {"output_over_bound": used},
        "share_certified_below_half": informative,
    }
    best = results["best alpha n^C"]
    law_text = (
        f"at {cost:.0f} keys a row, squared output error on a text that was not used for fitting, over that of "
        f"{alpha:g} sqrt(n): "
        + ", ".join(f"{name} {value:.2f}" for name, value in ratio.items() if name != RULE)
        + f"; the best single law is {best['alpha']:.3g} n^{best['exponent']:.2f}; under {alpha:g} sqrt(n) the worst "
        f"{100 * WORST:g} % of heads have {100 * concentrated:.0f} % of the error"
    )
    certificate_text = (
        f"with {math.ceil(alpha * math.sqrt(last))} of {last:,} keys the median head loses {middle['lost']:.3f} of "
        f"the mass; the certificate from kept logits says at most {middle['certified']:.3f} and is below 0.5 for "
        f"{100 * informative:.0f} % of heads; the largest error of an entry is {middle['max_entry']:.4f} (floor tau / "
        f"k: {middle['floor']:.5f}); the output error is {used:.3f} of its bound tau * diameter"
    )
    where = f"squared output error of exact top-k at equal cost, n = {lengths[0]:,} to {last:,}, every head"
    verdicts = [
        Verdict(
            "alpha by an objective (least output error at the price of a key, per head) beats alpha sqrt(n) and laws "
            "fitted to retained mass",
            "derived here",
            "holds" if ratio[OURS] < 0.95 * min(value for name, value in ratio.items() if name != OURS) else "fails",
            where + ", held-out text",
            law_text,
        ),
        Verdict(
            "an adaptive window alpha n^C, 0 < C < 1, has less error than a fixed one at equal cost over lengths",
            "abstract",
            "holds" if min(ratio[RULE], ratio["best alpha n^C"]) < ratio["fixed"] else "fails",
            where + ", held-out text",
            law_text,
        ),
        Verdict(
            "the certificate from kept logits is informative on real rows: below one half",
            "derived here",
            by_share(informative),
            f"exact top-k, every head of the layers that see {last:,} keys",
            certificate_text,
        ),
    ]
    panels = [
        Panel("Laws at equal cost, held-out text", f"{_capital(law_text)}.", lambda axes: _draw_laws(axes, results)),
        Panel(
            "What is lost and what is certified",
            f"{_capital(certificate_text)}.",
            lambda axes: _draw_certified(axes, bound["lost"], bound["certified"]),
        ),
    ]
    header = [
        "law",
        "alpha (median)",
        "C (median)",
        "keys a row",
        "error, fitted texts",
        "error, held out",
        "over rule",
    ]
    table = [
        [
            name,
            f"{result['alpha']:.3g}",
            f"{result['exponent']:.2f}",
            f"{result['keys']:.0f}",
            f"{result['fitted']:.3g}",
            f"{result['held_out']:.3g}",
            f"{ratio[name]:.2f}",
        ]
        for name, result in results.items()
    ]
    return Findings(shortened_keys(figures), verdicts, panels, [(header, table)])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _draw_laws(axes: Axes, results: dict[str, Row]) -> None:
    for name, result in results.items():
        by_n = result["by_n"]
        axes.plot(list(by_n), list(by_n.values()), "o-", label=name, linewidth=2.5 if name == OURS else 1.2)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="visible keys n", ylabel="squared output error, mean head", yscale="log")
    axes.legend(fontsize=8)


def _draw_certified(axes: Axes, lost: FloatArray, bound: FloatArray) -> None:
    axes.plot(
        np.maximum(lost, 1e-6), np.maximum(bound, 1e-6), ".", color="#2166ac", alpha=0.6, label="a head, mean row"
    )
    axes.plot([1e-6, 1], [1e-6, 1], ":", color="#666666", label="tight")
    axes.set(xlabel="lost mass tau", ylabel="certificate", xscale="log", yscale="log")
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    "alpha",
    "Alpha by an objective, and certificates",
    "alpha n^C performs better than a fixed window; alpha is not derived from the theory",
    "abstract",
    cells,
    measure,
    conclude,
    needs_model=True,
)
