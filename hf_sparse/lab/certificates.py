"""Errors of top-k attention in every norm: what they are, what they can be at most, and what can be certified.

A row of dense attention is a distribution p over n keys with values v; top-k keeps the k largest entries and either
renormalises them or leaves them as they are. tau is the mass of the n - k dropped ones. As in `bounds`, every
docstring says what a bound assumes, where it comes from and what makes it tight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hf_sparse.lab.bounds import FloatArray


@dataclass(frozen=True)
class TopKError:
    """Distances between dense attention and top-k attention, for one row.

    Attributes:
        max_entry: ||q - p||_inf.
        l1: ||q - p||_1; if renormalised, twice the total variation.
        output: ||sum_j (q_j - p_j) v_j||_2, of the head's output.
        relative_output: The same over ||sum_j p_j v_j||_2; infinite where that is 0.
    """

    max_entry: float
    l1: float
    output: float
    relative_output: float


def lost_mass(weights: FloatArray, kept: int) -> float:
    """tau: the mass of all but the `kept` largest entries of `weights`, `(keys,)`."""
    return float(np.sort(weights)[: len(weights) - kept].sum())


def top_k_error(weights: FloatArray, values: FloatArray, kept: int, *, renormalise: bool) -> TopKError:
    """The error of keeping the `kept` largest entries, by closed forms.

    With p sorted and tau the dropped mass, renormalised: ||.||_inf = max(tau / (1 - tau) p_1, p_(k+1)), ||.||_1 = 2
    tau and the output error is tau ||mu_tail - mu_head||, where mu is the mean of the values under p inside and
    outside the kept keys. Unnormalised: p_(k+1), tau and tau ||mu_tail||.

    Assumes: `weights` is a distribution.
    Source: derived here; that total variation is the lost mass, and the output identity, are also in arXiv 2512.07647.
    Tight: all of these are equalities.

    Args:
        weights: p, `(keys,)`.
        values: v, `(keys, value_dim)`.
        kept: k, from 1 to keys.
        renormalise: Whether the kept entries are divided by their sum.
    """
    order = np.argsort(-weights, kind="stable")
    p, v = weights[order], values[order]
    head, tail = p[:kept], p[kept:]
    mass, tau = float(head.sum()), float(tail.sum())
    largest_dropped = float(tail[0]) if len(tail) else 0.0
    mean_tail = tail @ v[kept:] / tau if tau > 0 else np.zeros(v.shape[1])
    mean_head = head @ v[:kept] / mass
    if renormalise:
        largest, l1 = max(tau / mass * float(p[0]), largest_dropped), 2 * tau
        output = tau * float(np.linalg.norm(mean_tail - mean_head))
    else:
        largest, l1 = largest_dropped, tau
        output = tau * float(np.linalg.norm(mean_tail))
    size = float(np.linalg.norm(p @ v))
    return TopKError(largest, l1, output, output / size if size > 0 else math.inf)


def lost_mass_bounds(keys: int, kept: int, spread: float) -> tuple[float, float]:
    """Least and most mass that top-k can lose: (n - k) / (n - k + k e^spread) <= tau <= 1 - k / n.

    Both tend to 1 - k / n as the spread shrinks: with logits in a bounded interval, k = n^C keys with C < 1 lose
    nearly all mass as n grows. Such rows are not n^C-sparse in total variation, whatever holds entry by entry.

    Assumes: logits within an interval of length `spread`.
    Source: derived here.
    Tight: below, k logits at the upper end and the others at the lower end; above, equal logits.
    """
    least = (keys - kept) * math.exp(-spread)
    return least / (least + kept), 1 - kept / keys


def max_entry_bound(keys: int, kept: int, spread: float, *, renormalise: bool) -> float:
    """Most that ||q - p||_inf of top-k can be: about e^spread / k if renormalised, e^spread / n if not.

    Unnormalised: p_(k+1) <= 1 / (k + 1 + (n - k - 1) e^-spread). Renormalised: the larger of that and
    (1 - k / n) / (1 + (k - 1) e^-spread).

    Assumes: logits within an interval of length `spread`.
    Source: derived here. It is the sense in which alpha n^C keys have "decreasing loss" (abstract of arXiv 2404.02690)
    for logits of bounded spread, and also the sense in which unnormalised top-k has it for any k.
    Tight: unnormalised, k + 1 logits at the upper end and the others at the lower end; renormalised, one logit at the
    upper end and the others at the lower end, as n grows.
    """
    dropped = 1 / (kept + 1 + (keys - kept - 1) * math.exp(-spread)) if kept < keys else 0.0
    if not renormalise:
        return dropped
    return max(dropped, (1 - kept / keys) / (1 + (kept - 1) * math.exp(-spread)))


def max_entry_floor(tau: float, kept: int) -> float:
    """Least that ||q - p||_inf can be for any distribution q on k keys: tau / k, with tau the mass that top-k loses.

    With constant k, and tau bounded away from 0, this error cannot vanish: the sense in which too few keys have
    "O(1) error" (abstract of arXiv 2404.02690, there for o(log n) keys). It needs q to sum to 1.

    Assumes: q >= 0 sums to 1 and has at most k entries; p is a distribution.
    Source: derived here: on its k keys q has at least tau more mass than p.
    Tight: renormalised top-k where the k largest entries of p are equal.
    """
    return tau / kept


def output_bound(tau: float, diameter: float) -> float:
    """Most that the output error of renormalised top-k can be: tau times the diameter of the values.

    For an unnormalised row take the largest norm of a value for `diameter`. No such bound holds for the relative error:
    the dense output can be as small as one likes.

    Assumes: nothing.
    Source: derived here, from the identity in `top_k_error`; also in arXiv 2512.07647.
    Tight: kept values all equal, dropped values all equal, and the two as far apart as the diameter.
    """
    return tau * diameter


def certificate(kept: FloatArray, dropped: float | FloatArray, ceiling: FloatArray | None = None) -> FloatArray:
    """Upper bound of the mass that a row has lost, from the logits of its kept keys alone.

    (n - k) e^c / (sum of e^s over kept keys + (n - k) e^c), where c is the ceiling of the dropped logits. No dropped
    logit is read, so that the engine of a sparse layer can compute it.

    Assumes: no dropped logit is above the ceiling. The default ceiling, the smallest kept logit, is one only if the
    kept keys are the true top-k: with an approximate selector the result certifies nothing.
    Source: derived here.
    Tight: all dropped logits equal to the ceiling.

    Args:
        kept: Logits of the kept keys, `(..., k)`.
        dropped: Number of dropped keys, n - k; `(...)` or a number.
        ceiling: Upper bound of the dropped logits, `(...)`.

    Returns:
        `(...)`, in 0 ... 1.
    """
    top = kept.max(-1)
    if ceiling is None:
        ceiling = kept.min(-1)
    top = np.maximum(top, ceiling)
    head = np.exp(kept - top[..., None]).sum(-1)
    tail = dropped * np.exp(ceiling - top)
    lost: FloatArray = tail / (head + tail)
    return lost
