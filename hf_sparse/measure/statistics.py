"""Statistics of measurements: a paired, hierarchical bootstrap, intervals and slopes on log axes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

SAMPLES = 10_000
CONFIDENCE = 0.95

_SAMPLES_AT_ONCE = 1000


def bootstrap_means(nll: FloatArray, tokens: FloatArray, *, seed: int, samples: int = SAMPLES) -> FloatArray:
    """Mean nats per token of several series, under resampling of the documents and of the blocks within them.

    Documents are drawn with replacement, then as many blocks as a document has, with replacement, from each drawn
    document. Neighbouring tokens are not independent, hence blocks; all series are resampled alike, so that the
    difference of two columns is a paired difference. With few documents the spread between texts is underestimated.

    Args:
        nll: `(series, documents, blocks)`: nats, summed over the tokens of a block.
        tokens: `(blocks,)`: tokens of a block, the same in every document.
        seed: Seed of the random generator.
        samples: Number of resamples.

    Returns:
        `(samples, series)`.
    """
    series, documents, blocks = nll.shape
    rng = np.random.default_rng(seed)
    flat = nll.reshape(series, -1).T
    out = np.empty((samples, series))
    for start in range(0, samples, _SAMPLES_AT_ONCE):
        size = min(_SAMPLES_AT_ONCE, samples - start)
        drawn = rng.multinomial(documents, np.full(documents, 1 / documents), size=size)
        # Blocks of a document that was drawn c times: c * blocks draws, which is one multinomial.
        times = rng.multinomial(drawn * blocks, np.full(blocks, 1 / blocks)).astype(np.float64)
        out[start : start + size] = (times.reshape(size, -1) @ flat) / (times.sum(1) @ tokens)[:, None]
    return out


def percentile_interval(draws: FloatArray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The central interval that holds the share `confidence` of `draws`, `(samples,)`."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def estimate(value: float, draws: FloatArray) -> dict[str, float]:
    """A `value` with the ends of its interval, `low` and `high`, for a summary."""
    low, high = percentile_interval(draws)
    return {"value": float(value), "low": low, "high": high}


def log_slope(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Least-squares lines through (ln x, ln y): slopes, which are exponents of x, and intercepts.

    Args:
        x: `(points,)`, positive.
        y: `(..., points)`, positive: any number of lines.

    Returns:
        Slopes `(...)` and intercepts `(...)`.
    """
    x, y = np.log(x), np.log(y)
    centred = x - x.mean()
    slope = (y * centred).sum(-1) / (centred**2).sum()
    return slope, y.mean(-1) - slope * x.mean()
