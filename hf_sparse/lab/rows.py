"""One row of attention under top-k windows: its errors in every norm, and how concentrated it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse.lab.inputs import Array

Floats = NDArray[np.float64]

NORMS = (
    "max entry",
    "lost mass",
    "output",
    "relative output",
    "max entry, unnormalised",
    "output, unnormalised",
    "relative output, unnormalised",
)
"""What `row_errors` gives, in this order: largest error of an entry; 1 - mass of the kept keys, which is the total
variation distance of the renormalised row and the l_1 error of the unnormalised one; Euclidean error of the output;
the same over the norm of the exact output. Unnormalised: the kept entries stay as they are and the others become 0."""

MASSES = (0.5, 0.9, 0.99)
EPSILON = 0.01


def row_errors(logits: Array, values: Array, kept: NDArray[np.int64]) -> Floats:
    """Errors of keeping the largest entries of one row.

    With p the entries, largest first, and m the mass of the first k: the renormalised window is p / m on them, its
    largest error max(p_1 (1 - m) / m, p_{k+1}), its output o_k / m for o_k the sum of the first k terms p_j v_j.

    Args:
        logits: `(n,)`.
        values: `(n, dim)`.
        kept: `(windows,)`: how many keys each window keeps, 1 to n.

    Returns:
        `(len(NORMS), windows)`.
    """
    order = np.argsort(-logits)
    p = _weights(logits[order])
    tail = np.append(np.cumsum(p[::-1])[::-1], 0.0)  # tail[k] = mass outside the first k, summed from its small end
    lost = tail[kept]
    mass = 1 - lost
    next_entry = np.append(p, 0.0)[kept]
    partial = _partial_outputs(p, values[order], kept)
    exact = p @ values[order]
    size = np.linalg.norm(exact)
    renormalised = np.linalg.norm(partial / mass[:, None] - exact, axis=1)
    cut = np.linalg.norm(partial - exact, axis=1)
    largest = np.maximum(p[0] * lost / mass, next_entry)
    return np.array([largest, lost, renormalised, renormalised / size, next_entry, cut, cut / size])


def row_shape(logits: Array) -> dict[str, float]:
    """How concentrated one row is: logits `(n,)`.

    Returns:
        `keys_50`, `keys_90`, `keys_99`: fewest keys with that mass; `effective`: 1 / sum p^2; `entropy` in nats;
        `largest`: the largest entry; `above`: entries above `EPSILON`.
    """
    p = _weights(np.sort(logits)[::-1])
    lost = np.cumsum(p[::-1])
    shape = {f"keys_{100 * mass:.0f}": float(len(p) - np.searchsorted(lost, 1 - mass, side="right")) for mass in MASSES}
    positive = p[p > 0]
    return shape | {
        "effective": float(1 / np.square(p).sum()),
        "entropy": float(-(positive * np.log(positive)).sum()),
        "largest": float(p[0]),
        "above": float((p > EPSILON).sum()),
    }


def mean_shape(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean over rows of each entry of `row_shape`."""
    rows = list(rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def shortened(value: Any) -> Any:
    """`value` with its numbers cut to four significant digits, as they stand in files."""
    if isinstance(value, dict):
        return {name: shortened(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [shortened(entry) for entry in value]
    return float(f"{value:.4g}")


def _weights(falling: Array) -> Floats:
    """Softmax of logits that fall, so that the first is the largest."""
    weights = np.exp(falling.astype(np.float64) - float(falling[0]))
    return np.asarray(weights / weights.sum())


def _partial_outputs(p: Floats, values: Array, kept: NDArray[np.int64]) -> Floats:
    """The sums of the first `kept` terms p_j v_j: `(windows, dim)`, each key read once."""
    stops, place = np.unique(kept, return_inverse=True)
    starts = np.concatenate([[0], stops[:-1]])
    pieces = [p[start:stop] @ values[start:stop] for start, stop in zip(starts, stops, strict=True)]
    return np.asarray(np.cumsum(pieces, axis=0)[place])
