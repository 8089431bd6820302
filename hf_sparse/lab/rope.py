"""Experiment `rope`: R, the spread of logits and sparsity of a model without RoPE and with other bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_sparse.diagnostics import concentration
from hf_sparse.lab import fits, probe
from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.norms import trivial_rotation
from hf_sparse.lab.scales import largest_scales, logit_spread
from hf_sparse.measure.perplexity import token_nll
from hf_sparse.measure.statistics import log_slope
from hf_sparse.results import Record

FACTORS = {"small": (None, 0.1, 1.0, 10.0), "full": (None, 0.01, 0.1, 1.0, 10.0, 100.0)}
"""Factors of the base of RoPE; `None` for no position embedding."""

LONGEST = 2048
_DISTANCES = 1024
_OWN, _NONE = "base x 1", "no RoPE"


def cells(setting: Setting) -> Sequence[Cell]:
    """Every base, on one document."""
    window, rows = probe.longest_windows(setting, LONGEST)[0], probe.QUERIES[setting.scale]
    return [probe.window_cell(window, rows=rows, factor=factor) for factor in FACTORS[setting.scale]]


def measure(cell: Cell, setting: Setting) -> Record:
    """With the base of the cell: ||W_D||_F of every head, spread and concentration of its attention, and the loss."""
    model, window = setting.model, probe.find_window(cell, setting)

    def look(sample: probe.Sample) -> dict[str, Tensor]:
        return {
            "deviation": logit_spread(sample)["deviation"],
            "keys_90": concentration(sample.dense)["keys_90"][0],
            "first_keys": sample.weights[..., : probe.SINKS].sum(-1),
        }

    with probe.rope_base(model, cell["factor"]):
        found = probe.visit_samples(cell, setting, look, probe.row_lengths(cell["length"]))
        nll = float(token_nll(model, window.input_ids, window.targets).mean())
        scales = largest_scales(model, _DISTANCES)
    return {"scale": {"largest": fits.shortened(scales)}, "rows": found, "nll": nll}


def conclude(records: Sequence[Record]) -> Findings:
    """The effect of the rotation on R, on the spread and on the keys needed, against the model's own base."""
    by_base = {_NONE if r["factor"] is None else f"base x {r['factor']:g}": r for r in records}
    own = by_base[_OWN]
    found = {base: fits.by_length([record], "rows") for base, record in by_base.items()}
    keys = {base: columns["keys_90"] for base, columns in found.items()}
    scales = {base: np.array(record["scale"]["largest"]) for base, record in by_base.items()}
    lengths = list(keys[_OWN])
    n = lengths[-1]
    mean_keys = {base: [values.mean() for values in column.values()] for base, column in keys.items()}
    bases = {
        base: {
            "R_over_own": float(np.median(scales[base] / scales[_OWN])),
            "R_over_own_most": float((scales[base] / scales[_OWN]).max()),
            "deviation": float(np.median(columns["deviation"][n])),
            "keys_90": mean_keys[base][-1],
            "keys_90_exponent": log_slope(lengths, mean_keys[base])[0],
            "first_keys": columns["first_keys"][n].mean(),
            "nll_above_own": by_base[base]["nll"] - own["nll"],
        }
        for base, columns in found.items()
    }
    gain = scales[_OWN] / scales[_NONE]
    changes = [entry["R_over_own"] for base, entry in bases.items() if base != _NONE]
    more: dict[str, Any] = {
        "R with RoPE over R without": f"median {np.median(gain):.3f}, {gain.min():.3f} to {gain.max():.3f}",
        "change of R over the bases": max(changes) / min(changes),
        "by construction": trivial_rotation(gain),
        "share of heads that need fewer keys": np.mean(keys[_OWN][n] < keys[_NONE][n]),
        "outside training": "all bases but the model's own",
    }
    drawn = {base: mean_keys[base] for base in (_NONE, "base x 0.1", _OWN, "base x 10") if base in bases}
    plot = Plot("visible keys n", "keys for 90 % of the mass, mean head", lengths, drawn)
    change = max(more["change of R over the bases"], np.median(gain))
    held = [None if more["by construction"] else change < 1.1, more["share of heads that need fewer keys"]]
    return Findings({"n": n, "bases": bases}, more, held, plot)
