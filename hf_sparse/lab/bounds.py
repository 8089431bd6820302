"""Bounds on attention logits and on the entries of attention, from norms of the inputs and the weights.

The setting is that of arXiv 2404.02690: the entries of the inputs x_1 ... x_n are independent, have mean 0 and are
at most B in size; the logit of query i and key j is x_i^T W x_j with W = scaling * W_Q^T W_K; R = B^2 ||W||_F. Of the
paper itself only the abstract could be read. That it defines this R, and that it bounds the entries of QK^T by
concentration, is known from a summary; the bounds below, with their constants, are derived here.

Every docstring says what a bound assumes, where it comes from and which inputs make it tight; the tests check both
that it holds on random inputs and the tight case.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

FloatArray = NDArray[np.float64]


def logit_scale(query: FloatArray, key: FloatArray, bound: float, scaling: float = 1.0) -> float:
    """R = B^2 ||W||_F of one head.

    The standard deviation of a logit of two different tokens is at most R.

    Assumes: entries of x independent, mean 0, at most B; no position embedding.
    Source: R was seen in a summary of arXiv 2404.02690; that it bounds the standard deviation is derived here:
    Var(x^T W y) = sum_ab W_ab^2 E[x_a^2] E[y_b^2] <= B^4 ||W||_F^2.
    Tight: entries +B or -B with equal probability, where the standard deviation is R.

    Args:
        query: Query projection of the head, `(head_dim, hidden)`.
        key: Key projection, `(head_dim, hidden)`.
        bound: B.
        scaling: Factor of the scores.
    """
    squared = np.sum((query @ query.T) * (key @ key.T))
    return bound**2 * abs(scaling) * math.sqrt(max(float(squared), 0.0))


def rope_scales(
    query: FloatArray,
    key: FloatArray,
    frequencies: FloatArray,
    distances: FloatArray,
    bound: float,
    scaling: float = 1.0,
) -> FloatArray:
    """R at given distances of query and key under RoPE: B^2 ||W_Q^T R_D^T W_K||_F; its maximum is the RoPE version.

    Rotation turns W into a matrix that depends on the distance D alone, so that everything said about R holds at each
    distance with this value, and at all distances with the maximum.

    Assumes: as for `logit_scale`, and RoPE that rotates the dimensions a and a + head_dim / 2 together.
    Source: derived here. The square is tr(R_D^T G_K R_D G_Q) with G = W W^T; where the rotation is diagonal, on the
    complex coordinates of each pair, it is a quadratic form in exp(i D frequency).
    Tight: as for `logit_scale`, at the distance that has the maximum.

    Args:
        query: Query projection of the head, `(head_dim, hidden)`.
        key: Key projection, `(head_dim, hidden)`.
        frequencies: Radians per token of each pair, `(head_dim / 2,)`; zeros for no position embedding.
        distances: Query position minus key position, tokens, `(count,)`.
        bound: B.
        scaling: Factor of the scores.

    Returns:
        `(count,)`.
    """
    half = len(frequencies)
    identity = np.eye(half)
    # Rows: x_a + i x_a' and its conjugate, over sqrt(2): a unitary change of coordinates.
    unitary = np.block([[identity, 1j * identity], [identity, -1j * identity]]) / math.sqrt(2)
    grams = [unitary @ (w @ w.T) @ unitary.conj().T for w in (key, query)]
    form = grams[0] * grams[1].T
    phases = np.outer(distances, np.concatenate([frequencies, -frequencies]))
    rotation = np.exp(1j * phases)
    squared = np.einsum("da,da->d", rotation.conj(), rotation @ form.T).real
    scales: FloatArray = bound**2 * abs(scaling) * np.sqrt(np.maximum(squared, 0.0))
    return scales


def spectral_scale(query: FloatArray, key: FloatArray, bound: float, scaling: float = 1.0) -> float:
    """S = B^2 ||W_Q||_2 ||W_K||_2, at least B^2 ||W||_2 at every distance, with and without RoPE.

    Assumes: nothing about x.
    Source: derived here (the spectral norm is submultiplicative, and rotations have norm 1).
    Tight: heads whose leading query and key directions are aligned, such as rank-1 heads.
    """
    return bound**2 * abs(scaling) * float(np.linalg.norm(query, 2) * np.linalg.norm(key, 2))


def tail_probability(t: float, scale: float, spectral: float) -> float:
    """Upper bound of P(x^T W y >= t) for two different tokens: exp(-t^2 / (2 (R^2 + S t))).

    Assumes: as for `logit_scale`; `scale` is R and `spectral` at least B^2 ||W||_2.
    Source: derived here. Bounded centred entries are sub-Gaussian with variance B^2 (Hoeffding), so comparing with
    Gaussian vectors gives E exp(l x^T W y) <= det(1 - l^2 B^4 W W^T)^(-1/2) <= exp(l^2 R^2 / (2 (1 - l S))), and
    Chernoff's bound with l = t / (R^2 + S t) does the rest.
    Tight: the exponent, for +-B entries and t between R and R^2 / S, where logits are close to Gaussian.
    """
    if t <= 0:
        return 1.0
    return math.exp(-(t**2) / (2 * (scale**2 + spectral * t)))


def logit_radius(scale: float, spectral: float, pairs: float, delta: float) -> float:
    """r with which `pairs` logits of different tokens are all within [-r, r], with probability 1 - delta at least.

    r = R sqrt(2 u) + S u with u = ln(2 pairs / delta). Take `pairs` = n for a row, n^2 for a matrix. The second term
    is the smaller one where u < 2 (R / S)^2: a form R sqrt(log n) alone needs heads of high stable rank (R / S)^2.

    Assumes: as for `logit_scale`; a token's logit with itself is not covered.
    Source: derived here, from the moment generating function in `tail_probability` and a union bound. That the paper
    bounds the entries of QK^T by concentration is known from a summary; its form is not known to us.
    Tight: +-B entries and high stable rank: the largest of n logits is then close to R sqrt(2 ln n).
    """
    u = math.log(2 * pairs / delta)
    return scale * math.sqrt(2 * u) + spectral * u


def row_radius(slope_norm: float, bound: float, keys: int, delta: float) -> float:
    """r with which the logits of one given query with n random keys are all within [-r, r], with probability 1 - delta.

    r = B ||W^T x_i||_2 sqrt(2 ln(2 n / delta)): no second term, as only the keys are random.

    Assumes: entries of the keys independent, mean 0, at most B; `slope_norm` is ||W^T x_i||_2 of the given query.
    Source: Hoeffding's inequality and a union bound, applied here.
    Tight: +-B entries and a W^T x_i spread over many dimensions: the largest logit tends to r as n grows.
    """
    return bound * slope_norm * math.sqrt(2 * math.log(2 * keys / delta))


def entry_bounds(keys: float, spread: float) -> tuple[float, float]:
    """Smallest and largest weight that a softmax over n logits can have if they lie within an interval of `spread`.

    1 / (1 + (n - 1) e^spread) <= A_ij <= 1 / (1 + (n - 1) e^-spread). Logits within [-r, r] have spread 2 r, so that
    r = o(log n) gives A_ij = n^(-1 +- o(1)). By `logit_radius`, R = o(sqrt(log n)) and S = o(1) are enough for that.

    Assumes: nothing but the spread.
    Source: derived here. The threshold sqrt(log n) is that of Alman and Song for fast attention, as summaries say.
    Tight: one logit at one end of the interval and all others at the other end.
    """
    if keys == 1:
        return 1.0, 1.0
    others = math.log(keys - 1)
    return float(expit(-others - spread)), float(expit(spread - others))


def is_vacuous(keys: float, spread: float, informative: float = 0.5) -> bool:
    """Whether logits of this spread leave room for one weight above `informative`: the bound then says nothing.

    Source: derived here, from `entry_bounds`. With the default this is spread > ln(n - 1).
    """
    return entry_bounds(keys, spread)[1] > informative
