"""Perplexity as an `evaluate` metric that weighs every token alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import datasets
import evaluate


class TokenPerplexity(evaluate.Metric):  # type: ignore[misc]
    """`exp(sum of nll / sum of tokens)` of texts that any model, patched or not, was measured on; needs no network.

    >>> TokenPerplexity().compute(nll=[20.0, 5.0], tokens=[10, 5])  # nats and tokens of two texts
    {'token_perplexity': 5.29...}
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")})
        about = {"description": "exp(sum of nll / sum of tokens)", "citation": "", "inputs_description": "one per text"}
        return evaluate.MetricInfo(features=features, **about)

    def _compute(self, nll: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
        return {"token_perplexity": math.exp(math.fsum(nll) / sum(tokens))}


def token_perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """The metric of some texts. Its folder is a temporary one: the user's home may be read-only."""
    with TemporaryDirectory() as folder:
        metric = TokenPerplexity(keep_in_memory=True, cache_dir=folder)
        return float(metric.compute(nll=nll, tokens=tokens)["token_perplexity"])
