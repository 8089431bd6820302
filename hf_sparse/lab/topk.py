"""One query's attention under top-k: its errors in every norm for several k, and how concentrated it is.

With p the attention distribution of a query over n keys, largest entry first, and m the mass of the first k, the
renormalised window is p / m on them. With tau = 1 - m, mu_head and mu_tail the means of the values under p among kept
and dropped keys:

| norm             | renormalised                      | unnormalised     |
|------------------|-----------------------------------|------------------|
| l_inf            | max(p_1 tau / m, p_(k+1))         | p_(k+1)          |
| l_1              | 2 tau (total variation: tau)      | tau              |
| output, l_2      | tau norm(mu_tail - mu_head)       | tau norm(mu_tail) |

These are equalities; that total variation is the lost mass, and the output identity, are also in arXiv 2512.07647.
`hf_sparse.diagnostics` measures any selection on a model's tensors; here many k share one sort, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse.measure.statistics import FloatArray

RENORMALISED = ("max entry", "lost mass", "output", "relative output")
NORMS = (*RENORMALISED, "max entry, unnormalised", "output, unnormalised", "relative output, unnormalised")
"""Largest error of an entry; tau; Euclidean error of the output; the same over the norm of the exact output.
Unnormalised: kept entries stay as they are and the others become 0."""

EPSILON = 0.01
"""Entries above it are not negligible."""


def softmax(logits: NDArray[Any]) -> FloatArray:
    """The attention distribution of `logits`, `(keys,)`, in float64."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(weights / weights.sum())


def top_k_errors(weights: FloatArray, values: NDArray[Any], kept: Sequence[int]) -> tuple[FloatArray, FloatArray]:
    """Errors of keeping the `kept` largest entries, `(windows,)` numbers from 1 to keys, for several k at once.

    The weights p are `(keys,)`, values `(keys, value_dim)`.

    Returns:
        The errors in the order of `NORMS`, `(norms, windows)`, and the output of each renormalised window minus the
        exact output, `(windows, value_dim)`.
    """
    order = np.argsort(-weights, kind="stable")
    p, v = weights[order], values[order]
    tail = np.append(np.cumsum(p[::-1])[::-1], 0.0)  # tail[k] = mass outside the first k, summed from its small end
    lost, dropped = tail[list(kept)], np.append(p, 0.0)[list(kept)]
    mass = 1 - lost
    # Sums of the first k terms p_j v_j, each key read once.
    stops, place = np.unique(kept, return_inverse=True)
    pieces = [p[start:stop] @ v[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
    partial, exact = np.cumsum(pieces, axis=0)[place], p @ v
    difference = partial / mass[:, None] - exact
    whole, cut = (np.linalg.norm(error, axis=1) for error in (difference, partial - exact))
    size = np.linalg.norm(exact)
    largest = np.maximum(p[0] * lost / mass, dropped)
    return np.array([largest, lost, whole, whole / size, dropped, cut, cut / size]), difference


def keys_90(weights: FloatArray) -> int:
    """The fewest keys with 90 % of the mass of an attention distribution `(keys,)`."""
    return len(weights) - int(np.searchsorted(np.cumsum(np.sort(weights)), 1 - 0.9, side="right"))
