"""What a patched model kept, summed over its layers and heads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

from hf_sparse.monitor import SparsityReport

_NOTHING: dict[str, Any] = {"rows": 0, "visible": 0, "kept": 0, "dense_rows": {}}


def sum_counts(
    report: SparsityReport, sliding_layers: Collection[int], before: SparsityReport | None = None
) -> dict[str, Any]:
    """Counts over all layers and heads.

    Args:
        report: Of the patched model.
        sliding_layers: Layers that do not count for `sparse_density`.
        before: An earlier report of the same patch, whose counts are subtracted.

    Returns:
        `density` (kept / visible keys), `sparse_density` (the same without `sliding_layers`), `mean_keys` kept by a
        query and head, `rows` (queries, summed over the layers), and `dense_rows`, those of them
        that ran dense, by reason.
    """
    earlier = {(row["layer"], row["head"]): row for row in before.rows} if before else {}
    kept, visible, means, rows = Counter[int](), Counter[int](), [], {}
    dense: dict[int, Counter[str]] = {}
    for row in report.rows:
        layer = row["layer"]
        old = earlier.get((layer, row["head"]), _NOTHING)
        own = row["kept"] - old["kept"]
        kept[layer] += own
        visible[layer] += row["visible"] - old["visible"]
        rows[layer] = row["rows"] - old["rows"]
        means.append(own / max(1, rows[layer]))
        dense[layer] = Counter(row["dense_rows"]) - Counter(old["dense_rows"])
    full = [layer for layer in kept if layer not in sliding_layers]
    return {
        "density": kept.total() / visible.total(),
        "sparse_density": sum(kept[layer] for layer in full) / sum(visible[layer] for layer in full),
        "mean_keys": math.fsum(means) / len(means),
        "rows": sum(rows.values()),
        "dense_rows": dict(sum(dense.values(), Counter())),
    }
