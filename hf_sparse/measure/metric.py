"""Perplexity as an `evaluate` metric that weighs every token alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import evaluate


class TokenPerplexity(evaluate.Metric):  # type: ignore[misc]
    """`exp(sum of nll / sum of tokens)`: the perplexity of all tokens together, whatever texts they came from.

    `evaluate`'s own perplexity loads a model by name and averages the perplexities of texts; this one takes what any
    model, patched or not, was measured to cost. It needs no network.

        >>> TokenPerplexity().compute(nll=[20.0, 5.0], tokens=[10, 5])  # nats and tokens of two texts
        {'token_perplexity': 5.29...}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity over all tokens: exp(sum of nll / sum of tokens).",
            citation="",
            inputs_description="nll: sum of negative log-likelihoods of a text in nats; tokens: how many were summed.",
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
        return {"token_perplexity": math.exp(math.fsum(nll) / sum(tokens))}
