"""Exponents of n with intervals over independent repeats, closed forms for normal logits, and numbers for files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hf_sparse.measure.statistics import CONFIDENCE, FloatArray, log_slope
from hf_sparse.results import Record

_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Interval:
    """A mean over independent repeats with its 95 % interval (Student's t)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, repeats: FloatArray) -> Interval:
        """The interval of the mean of `repeats`, `(repeats,)`, two or more."""
        mean = float(np.mean(repeats))
        half = float(stats.sem(repeats) * stats.t.ppf((1 + CONFIDENCE) / 2, len(repeats) - 1))
        return cls(mean, mean - half, mean + half)

    def to_dict(self) -> dict[str, float]:
        """The attributes as a dictionary, to four decimals."""
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def slope(lengths: Sequence[int], errors: ArrayLike) -> Interval:
    """The exponent e of errors ~ n^e, `(lengths, repeats)`: its mean and interval over the repeats.

    Errors are raised to the rounding error of a mass where they are below it.
    """
    least = np.finfo(np.float64).eps
    return Interval.of(log_slope(lengths, np.maximum(np.asarray(errors, np.float64), least).T)[0])


def trend(lengths: Sequence[int], fit: Interval) -> str:
    """The meaning of a slope over `lengths`.

    `falls`: surely faster than 1 / ln n does over the same lengths, so like a power of n; `falls slowly`: surely, but
    not surely faster than 1 / ln n; `rises`: surely; `level`: neither.
    """
    if fit.high < log_slope(lengths, 1 / np.log(lengths))[0]:
        return "falls"
    if fit.high < 0:
        return "falls slowly"
    return "rises" if fit.low > 0 else "level"


def normal_keys(spread: float, lost: float) -> float:
    """k / n for which the top k of many independent N(0, spread^2) logits lose the share `lost` of the mass.

    Phi_c(spread + Phi^-1(lost)), with Phi the normal distribution function and Phi_c = 1 - Phi (arXiv 2512.07647):
    under the tilt by the softmax the logits over their deviation are N(spread, 1); that share of their mass lies below
    t = spread + Phi^-1(lost), and the untilted share of keys above t is Phi_c(t).
    """
    return float(stats.norm.sf(spread + stats.norm.ppf(lost)))


def random_energy_exponent(scale: float) -> float:
    """The limit for n to infinity of the exponent of k_p, 0 < p < 1, for logits N(0, scale^2 ln n).

    The random energy model: the mass sits at logits near scale^2 ln n, above which there are about
    n^(1 - scale^2 / 2) of n; at the freezing point sqrt(2) the largest logit is there, and few keys have the mass.
    """
    return max(0.0, 1 - scale**2 / 2)


def freezing_norm(n: float) -> float:
    """sqrt(2 ln n): the deviation of n independent normal logits at which few keys take all the mass."""
    return math.sqrt(2 * math.log(n))


def shortened(value: Any) -> Any:
    """`value` as JSON: numbers cut to four significant digits, keys as strings."""
    if isinstance(value, dict):
        return {str(name): shortened(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [shortened(entry) for entry in value]
    return float(f"{value:.4g}")


def quartiles(values: FloatArray) -> dict[str, float]:
    """Quartiles of all entries."""
    return dict(zip(("low", "median", "high"), np.quantile(values, _QUARTILES).tolist(), strict=True))


def bands(columns: dict[int, FloatArray]) -> FloatArray:
    """Quartiles of the heads at each n, `(3, lengths)`: low, median, high."""
    return np.transpose([np.quantile(values, _QUARTILES) for values in columns.values()])


def by_length(records: Sequence[Record], part: str) -> dict[str, dict[int, FloatArray]]:
    """Entries of the layers of `records[...][part]` by name and n, `(heads of all layers, ...)`: document means."""
    lengths = sorted({layer["n"] for layer in records[0][part]})

    def mean(name: str, n: int) -> FloatArray:
        documents = [[x for layer in record[part] if layer["n"] == n for x in layer[name]] for record in records]
        return np.asarray(np.mean(documents, axis=0))

    names = [name for name in records[0][part][0] if name not in ("layer", "n")]
    return {name: {n: mean(name, n) for n in lengths} for name in names}
