"""Experiment: R, the spread of logits and sparsity of a model with and without RoPE, and with other bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sparse.diagnostics import concentration
from hf_sparse.lab.bounds import FloatArray
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Panel, Setting, Verdict
from hf_sparse.lab.model_norms import head_forms, logit_spread
from hf_sparse.lab.norms import ROWS, SINKS, by_length, by_share, share, shortened_keys, trivial_rotation
from hf_sparse.lab.rope import frequencies_of, rope_base, with_base
from hf_sparse.lab.rows import shortened
from hf_sparse.lab.sampling import LayerRows, visit_rows
from hf_sparse.lab.subject import (
    find_window,
    layers_of,
    longest_windows,
    mean_nll,
    row_lengths,
    subject_of,
    window_cell,
)
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = {"small": (None, 0.1, 1.0, 10.0), "full": (None, 0.01, 0.1, 1.0, 10.0, 100.0)}
"""Factors of the base of RoPE; `None` for no position embedding."""

LONGEST = 2048
_DISTANCES = 1024


def cells(setting: Setting) -> Sequence[Cell]:
    """Every base, on one document."""
    window = longest_windows(subject_of(setting), LONGEST)[0]
    rows = ROWS[setting.scale]
    return [window_cell(window, rows=rows, factor=factor) for factor in FACTORS[setting.scale]]


def measure(cell: Cell, setting: Setting) -> Row:
    """With the base of the cell: ||W_D||_F of every head, spread and concentration of its rows, and the loss."""
    subject = subject_of(setting)
    window = find_window(subject, cell["window"])
    found: list[Row] = []

    def visit(rows: LayerRows) -> None:
        shape = concentration(rows.dense)
        entry = {
            "deviation": logit_spread(rows, SINKS)["deviation"],
            "keys_90": shape["keys_90"][0].mean(-1).tolist(),
            "first_keys": rows.weights[..., :SINKS].sum(-1).mean(-1).tolist(),
        }
        found.append({"layer": rows.layer, "n": rows.length, **shortened(entry)})

    with rope_base(subject.model, cell["factor"]):
        visit_rows(subject.model, window, row_lengths(cell["length"]), cell["rows"], visit)
        nll = mean_nll(subject.model, window)
    return {"scale": shortened(_scales(subject.model, cell["factor"])), "rows": found, "nll": nll}


def _scales(model: Any, factor: float | None) -> dict[str, list[list[float]]]:
    """||W_D||_F by layer and head: its maximum and its root mean square over the distances below `_DISTANCES`."""
    distances = np.arange(_DISTANCES, dtype=np.float64)
    out: dict[str, list[list[float]]] = {"largest": [], "rms": []}
    for layer in layers_of(model):
        frequencies = with_base(frequencies_of(model, layer), factor)
        done: dict[int, FloatArray] = {}
        over = [done.setdefault(id(form), form.over(frequencies, distances)) for form in head_forms(layer)]
        out["largest"].append([float(values.max()) for values in over])
        out["rms"].append([float(np.sqrt(np.mean(values**2))) for values in over])
    return out


def conclude(rows: Sequence[Row]) -> Findings:
    """What the rotation does to R, to the spread and to the keys needed, against the model's own base."""
    by_factor = {row["factor"]: row for row in rows}
    own = by_factor[1.0]
    n = max(entry["n"] for entry in own["rows"])
    columns: dict[str, Any] = {}
    for factor, row in by_factor.items():
        deviation, keys = (by_length([row], "rows", name)[n] for name in ("deviation", "keys_90"))
        largest = np.array(row["scale"]["largest"]) / np.array(own["scale"]["largest"])
        columns[_name(factor)] = {
            "R_over_own": float(np.median(largest)),
            "R_over_own_most": float(largest.max()),
            "deviation": float(np.median(deviation)),
            "keys_90": float(np.mean(keys)),
            "keys_90_exponent": _exponent(by_length([row], "rows", "keys_90")),
            "first_keys": float(np.mean(by_length([row], "rows", "first_keys")[n])),
            "nll_above_own": row["nll"] - own["nll"],
        }
    plain = by_factor[None]
    ratio = np.array(own["scale"]["largest"]) / np.array(plain["scale"]["largest"])
    why_trivial = trivial_rotation(ratio)
    fewer = share(by_length([own], "rows", "keys_90")[n] < by_length([plain], "rows", "keys_90")[n])
    base = [columns[_name(factor)] for factor in by_factor if factor is not None]
    spread_r = max(entry["R_over_own"] for entry in base) / min(entry["R_over_own"] for entry in base)
    weight_text = (
        f"R at its worst distance with RoPE over R without has median {np.median(ratio):.3f} "
        f"({ratio.min():.3f} to {ratio.max():.3f}); over all bases tried the median head's R changes by a factor of "
        f"{spread_r:.3f}{why_trivial}"
    )
    use, nope = columns[_name(1.0)], columns[_name(None)]
    key_text = (
        f"at n = {n:,} the mean head needs {use['keys_90']:.0f} keys for 90 % of the mass with RoPE and "
        f"{nope['keys_90']:.0f} without ({100 * fewer:.0f} % of heads need fewer with it), logits of the median head "
        f"deviate by {use['deviation']:.2f} and {nope['deviation']:.2f}, and the loss changes by "
        f"{nope['nll_above_own']:+.2f} nats a token without it; all bases but its own are outside "
        "the training of the model"
    )
    where = "every head, RoPE of a trained model changed at inference"
    verdicts = [
        Verdict(
            "R, maximised over relative position, hardly depends on RoPE and its base (10 %, median head)",
            "derived here",
            "not testable here" if why_trivial else "holds" if max(spread_r, np.median(ratio)) < 1.1 else "fails",
            where + ", weights alone",
            weight_text,
        ),
        Verdict(
            "RoPE makes attention sparser: fewer keys hold 90 % of the mass",
            "derived here",
            by_share(fewer),
            where,
            key_text,
        ),
    ]
    panels = [
        Panel(
            "Keys for 90 % of the mass", f"{key_text[0].upper()}{key_text[1:]}.", lambda axes: _draw_keys(axes, rows)
        ),
        Panel(
            "R across bases",
            f"{weight_text}.",
            lambda axes: _draw_scales(axes, list(columns), list(columns.values())),
        ),
    ]
    header = ["base", "R over own (median head)", "deviation", "keys for 90 %", "exponent", "first 4 keys", "loss"]
    table = [
        [
            name,
            f"{entry['R_over_own']:.3f}",
            f"{entry['deviation']:.2f}",
            f"{entry['keys_90']:.0f}",
            f"{entry['keys_90_exponent']:.2f}",
            f"{entry['first_keys']:.2f}",
            f"{entry['nll_above_own']:+.3f}",
        ]
        for name, entry in columns.items()
    ]
    return Findings(shortened_keys({"n": n, "bases": columns}), verdicts, panels, [(header, table)])


def _exponent(keys: dict[int, FloatArray]) -> float:
    """The exponent with which the mean head's keys grow with n."""
    if len(keys) < 2:
        return 0.0
    return float(np.polyfit(np.log(list(keys)), np.log([values.mean() for values in keys.values()]), 1)[0])


def _name(factor: float | None) -> str:
    return "no RoPE" if factor is None else f"base x {factor:g}"


def _draw_keys(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        keys = by_length([row], "rows", "keys_90")
        style = "k--" if row["factor"] is None else "o-"
        width = 2.5 if row["factor"] == 1.0 else 1.0
        axes.plot(
            list(keys), [values.mean() for values in keys.values()], style, label=_name(row["factor"]), linewidth=width
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="visible keys n", ylabel="keys for 90 % of the mass, mean head", yscale="log")
    axes.legend(fontsize=8)


def _draw_scales(axes: Axes, names: Sequence[str], columns: Sequence[Row]) -> None:
    places = np.arange(len(names))
    axes.plot(
        places, [entry["R_over_own"] for entry in columns], "s-", label="R over R at the model's own base, median head"
    )
    own = columns[list(names).index(_name(1.0))]["deviation"]
    axes.plot(
        places, [entry["deviation"] / own for entry in columns], "o-", label="deviation of logits over the model's own"
    )
    axes.set_xticks(places, names, rotation=20)
    axes.set(ylabel="ratio to the model's own base")
    axes.legend(fontsize=8)


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
