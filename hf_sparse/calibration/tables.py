"""Tables of a calibration, for terminals and markdown."""

from __future__ import annotations

import numpy as np

from hf_sparse.calibration.calibrate import Calibration
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure.perplexity_summary import perplexity_cells
from hf_sparse.results import Table


def calibration_tables(result: Calibration) -> list[Table]:
    """All tables of a result that have lines."""
    tables = [_target_cells(result), perplexity_cells(result.check), _family_cells(result), _law_cells(result)]
    return [table for table in tables if table[1]]


def _target_cells(result: Calibration) -> Table:
    """What was to be reached, and what was."""
    record = result.config.calibration
    assert record is not None
    header = ["target", "reached", "met", "density", "at tokens", "fitted to"]
    line = [f"{result.reached:.4g}", "yes" if result.met else "no", f"{result.density:.3f}"]
    return header, [[str(result.target), *line, str(record.reached_at), str(record.fitted_to)]]


def _family_cells(result: Calibration) -> Table:
    """Shapes of law by what they cost on documents left out: lost nats, and keys at their price."""
    power = result.families["power"]
    header = ["law, on documents left out", "cost of a head (nats a token)", "against power"]
    cells = [[name, f"{cost:.3g}", f"{cost / power:.3f}" if power else "-"] for name, cost in result.families.items()]
    return header, cells


def _law_cells(result: Calibration) -> Table:
    """Quartiles of the heads' alphas and exponents, and how many intervals exclude the default exponent."""
    record, laws = result.config.calibration, result.config.per_head or {}
    heads = [law for layer in laws.values() for law in layer]
    if record is None or not heads:
        return [], []
    intervals = [interval for layer in (record.intervals or {}).values() for interval in layer]
    default = SparseAttentionConfig.exponent
    excluded = sum(not low <= default <= high for _, _, low, high in intervals)
    cells = []
    for name, values in zip(("alpha", "exponent"), zip(*heads, strict=True), strict=True):
        quartiles = [f"{value:.3g}" for value in np.quantile(values, [0.25, 0.5, 0.75])]
        cells.append([name, *quartiles, f"{excluded} of {len(intervals)}" if name == "exponent" else "-"])
    header = ["law of a head", "first quartile", "median", "third quartile", f"interval excludes {default:g}"]
    return header, cells
