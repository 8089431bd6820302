"""Bounds on attention logits, on entries of attention and on errors of top-k, from norms of inputs and weights.

The setting is that of arXiv 2404.02690: the entries of the inputs x_1 ... x_n are independent, have mean 0 and are
at most B in size; the logit of query i and key j is x_i^T W x_j with W = scaling * W_Q^T W_K; R = B^2 ||W||_F. Of the
paper itself only the abstract could be read. That it defines this R, and that it bounds the entries of QK^T by
concentration, is known from a summary; the bounds below, with their constants, are derived here unless a source says
otherwise. The tests check that each holds on random inputs, and that the inputs named under "Tight" reach it.
"""

from __future__ import annotations

import math

import numpy as np

from hf_sparse.measure.statistics import FloatArray


def rope_scales(query: FloatArray, key: FloatArray, frequencies: FloatArray, distances: FloatArray) -> FloatArray:
    """R at B = 1, ||W_Q^T R_D^T W_K||_F of one head, at given distances D of query and key under RoPE: `(distances,)`.

    The standard deviation of a logit of two different tokens is at most R. Rotation turns W into a matrix that depends
    on the distance alone, so all bounds hold at each distance with this R, and everywhere with its maximum.

    Assumes: entries of x independent, mean 0, at most B; RoPE that rotates dimensions a and a + head_dim / 2 together.
    Source: Var(x^T W y) = sum_ab W_ab^2 E[x_a^2] E[y_b^2] <= B^4 ||W||_F^2, whose square is tr(R_D^T G_K R_D G_Q) with
        G = W W^T; on complex coordinates of the pairs it is a quadratic form in exp(i D frequency).
    Tight: entries +B or -B with equal probability, where the standard deviation is R.

    Args:
        query: Query projection of the head, times the scaling of its scores, `(head_dim, hidden)`.
        key: Key projection, `(head_dim, hidden)`.
        frequencies: Radians per token of each pair, `(head_dim / 2,)`; zeros for no position embedding.
        distances: Query position minus key position, tokens.
    """
    identity = np.eye(len(frequencies))
    # x_a + i x_a' and its conjugate, over sqrt(2): a unitary change of coordinates.
    unitary = np.block([[identity, 1j * identity], [identity, -1j * identity]]) / math.sqrt(2)
    grams = [unitary @ (w @ w.T) @ unitary.conj().T for w in (key, query)]
    rotation = np.exp(1j * np.outer(distances, np.concatenate([frequencies, -frequencies])))
    squared = np.einsum("da,da->d", rotation.conj(), rotation @ (grams[0] * grams[1].T).T).real
    return np.asarray(np.sqrt(np.maximum(squared, 0.0)))


def spectral_scale(query: FloatArray, key: FloatArray) -> float:
    """S at B = 1, ||W_Q||_2 ||W_K||_2, at least ||W||_2 at every distance, with and without RoPE.

    Assumes: nothing about x. Source: the spectral norm is submultiplicative, and rotations have norm 1.
    Tight: heads whose leading query and key directions are aligned, such as rank-1 heads.
    """
    return float(np.linalg.norm(query, 2) * np.linalg.norm(key, 2))


def logit_radius(scale: float, spectral: float, pairs: float, delta: float) -> float:
    """r = R sqrt(2 u) + S u, u = ln(2 pairs / delta): `pairs` logits are all in [-r, r] with probability 1 - delta.

    `pairs` is n for a query, n^2 for a matrix. R sqrt(log n) alone needs heads of high stable rank (R / S)^2.

    Assumes: as for `rope_scales`, of which `scale` is the result; `spectral` is at least B^2 ||W||_2. A token's logit
        with itself is not covered.
    Source: bounded centred entries are sub-Gaussian with variance B^2 (Hoeffding), so comparing with Gaussian vectors
        gives E exp(l x^T W y) <= det(1 - l^2 B^4 W W^T)^(-1/2) <= exp(l^2 R^2 / (2 (1 - l S))). Chernoff's bound with
        l = t / (R^2 + S t) makes it P(x^T W y >= t) <= exp(-t^2 / (2 (R^2 + S t))); then a union bound.
    Tight: +-B entries and high stable rank: the largest of n logits is then close to R sqrt(2 ln n).
    """
    u = math.log(2 * pairs / delta)
    return scale * math.sqrt(2 * u) + spectral * u


def row_radius(slope_norm: float, keys: int, delta: float) -> float:
    """r = ||W^T x_i||_2 sqrt(2 ln(2 n / delta)) at B = 1: one given query's logits are in [-r, r], odds 1 - delta.

    Assumes: entries of the n keys independent, mean 0, at most 1; `slope_norm` is ||W^T x_i||_2 of the given query.
    Source: Hoeffding's inequality and a union bound.
    Tight: entries +1 or -1 and a W^T x_i spread over many dimensions: the largest logit tends to r as n grows.
    """
    return slope_norm * math.sqrt(2 * math.log(2 * keys / delta))


def is_vacuous(keys: float, spread: float) -> bool:
    """Whether n logits of this spread, largest minus smallest, leave room for one weight above 1/2: spread > ln(n - 1).

    Logits within [-r, r] have spread 2 r; r = o(log n) gives A_ij = n^(-1 +- o(1)), for which, by `logit_radius`,
    R = o(sqrt(log n)) and S = o(1) are enough.

    Assumes: nothing but the spread. Source: 1 / (1 + (n - 1) e^spread) <= A_ij <= 1 / (1 + (n - 1) e^-spread), by the
        softmax; the threshold sqrt(log n) is that of Alman and Song for fast attention, as summaries say.
    Tight: one logit at one end of the interval and all others at the other end.
    """
    return spread > math.log(keys - 1)


def max_entry_floor(tau: float, kept: int) -> float:
    """Least that ||q - p||_inf can be for any distribution q on k keys: tau / k, with tau the mass that top-k loses.

    With constant k, and tau bounded away from 0, this error cannot vanish: the sense in which too few keys have
    "O(1) error" (abstract of arXiv 2404.02690, there for o(log n) keys).

    Assumes: q sums to 1 and has k entries at most. Source: on its k keys q has at least tau more mass than p.
    Tight: renormalised top-k where the k largest entries of p are equal.
    """
    return tau / kept


def output_bound(tau: float, diameter: float) -> float:
    """Most that the output error of renormalised top-k can be: tau times the diameter of the values.

    Assumes: nothing. The relative error has no bound. Source: the identity in `topk`; also in arXiv 2512.07647.
    Tight: kept values all equal, dropped values all equal, and the two as far apart as the diameter.
    """
    return tau * diameter


def certificate(kept: FloatArray, dropped: int) -> float:
    """Upper bound of the mass that a query has lost, from the logits `(k,)` of its kept keys alone.

    (n - k) e^c / (sum of e^s over kept keys + (n - k) e^c), where c is the smallest kept logit and `dropped` = n - k
    logits are not read, so that the engine of a sparse layer can compute it.

    Assumes: no dropped logit is above c, as for the true top-k: with an approximate selector it certifies nothing.
    Source: the softmax. Tight: all dropped logits equal to c.
    """
    scaled = np.exp(kept - kept.max())
    tail = dropped * scaled.min()
    return float(tail / (scaled.sum() + tail))
