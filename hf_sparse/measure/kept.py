"""What a patched model kept, summed up from its reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

from hf_sparse.monitor import SparsityReport


def row_counts(
    report: SparsityReport, sliding_layers: Collection[int], before: SparsityReport | None = None
) -> dict[str, Any]:
    """Counts over all layers and heads.

    Args:
        report: Of the patched model.
        sliding_layers: Layers that do not count for `sparse_density`.
        before: An earlier report of the same patch: what it holds is not counted.

    Returns:
        `density` (kept / visible keys), `sparse_density` (the same without `sliding_layers`), `mean_keys` that a row
        and head keeps, `rows`, summed over the layers, and `dense_rows`, those of them that ran dense, by reason.
    """
    earlier = {(row["layer"], row["head"]): row for row in before.rows} if before else {}
    kept, visible, means, rows = {}, {}, [], {}
    dense: dict[int, Counter[str]] = {}
    for row in report.rows:
        old = earlier.get((row["layer"], row["head"]), {"rows": 0, "mean_keys": 0.0, "mean_visible": 0.0})
        place = (row["layer"], row["head"])
        kept[place] = row["mean_keys"] * row["rows"] - old["mean_keys"] * old["rows"]
        visible[place] = row["mean_visible"] * row["rows"] - old["mean_visible"] * old["rows"]
        rows[row["layer"]] = row["rows"] - old["rows"]
        means.append(kept[place] / max(1, rows[row["layer"]]))
        dense[row["layer"]] = Counter(row["dense_rows"]) - Counter(old.get("dense_rows"))
    full = [place for place in kept if place[0] not in sliding_layers]

    def share(places: Collection[tuple[int, int]]) -> float:
        return math.fsum(kept[place] for place in places) / math.fsum(visible[place] for place in places)

    density = share(kept) if before else report.density
    return {
        "density": density,
        "sparse_density": density if len(full) == len(kept) else share(full),
        "mean_keys": math.fsum(means) / len(means),
        "rows": sum(rows.values()),
        "dense_rows": dict(sum(dense.values(), Counter())),
    }
