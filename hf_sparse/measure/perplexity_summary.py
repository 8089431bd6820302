"""From records to answers: perplexity and ratio to dense with intervals, and adaptive against fixed at equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse.measure.methods import FIXED_OF
from hf_sparse.measure.metric import TokenPerplexity
from hf_sparse.measure.perplexity import COMMAND
from hf_sparse.measure.statistics import CONFIDENCE, SAMPLES, FloatArray, bootstrap_means, percentile_interval
from hf_sparse.results import DENSE, Record, Summary, describe


def summarise(records: Sequence[Record], seed: int) -> Summary:
    """Summarise records of `evaluate`: every method on the same documents and lengths, `dense` among them.

    Returns:
        A dictionary for `json.dumps`, in which a ratio is a perplexity divided by another on the same tokens,
        `exp(mean difference of nats per token)`, with `low` and `high` of its 95 % bootstrap interval:

        - `results`: for each method and length `perplexity`, `ratio` to dense with `low` and `high`, `density`,
          `sparse_density` (`None` in records of earlier releases), `mean_keys`, `seconds` (mean of a forward pass),
          `tokens`;
        - `methods`: for each method the mean over lengths (of the nats, so a geometric mean of the ratios), the
          length with the worst ratio, and that ratio;
        - `adaptive_vs_fixed`: ratio of each adaptive method to the fixed number of keys at equal cost, by length,
          over all lengths (`mean`), and of each one's own worst length (`worst`): below 1, adaptive is better;
        - `command`, `documents`, `lengths`, `targets`, `block_tokens`, `resampled` (what the bootstrap drew), `seed`,
          `samples`, `confidence`, `configs`, `about`.
    """
    methods = list(dict.fromkeys(row["method"] for row in records))
    lengths = sorted({row["length"] for row in records})
    documents = list(dict.fromkeys(row["text_sha256"] for row in records))
    series = _Series(records, methods, lengths, documents, seed)
    pairs = [(adaptive, fixed) for adaptive, fixed in FIXED_OF.items() if {adaptive, fixed} <= set(methods)]
    first = records[0]
    return {
        **describe(COMMAND, records),
        "results": [_result(series, method, length, records) for method in methods for length in lengths],
        "methods": [_over_lengths(series, method) for method in methods],
        "adaptive_vs_fixed": [_verdict(series, adaptive, fixed) for adaptive, fixed in pairs],
        "lengths": lengths,
        "targets": first["tokens"],
        "block_tokens": first["block_tokens"],
        "resampled": "documents and blocks" if len(documents) > 1 else "blocks of the one document",
        "seed": seed,
        "samples": SAMPLES,
        "confidence": CONFIDENCE,
        "configs": {row["method"]: row["config"] for row in records},
    }


class _Series:
    """Mean nats per token of every method and length: measured, `(methods, lengths)`, and resampled."""

    def __init__(
        self, records: Sequence[Record], methods: list[str], lengths: list[int], documents: list[str], seed: int
    ) -> None:
        self.methods, self.lengths = methods, lengths
        cells = {(row["method"], row["length"], row["text_sha256"]): row for row in records}
        nll: FloatArray = np.array(
            [[[cells[m, n, d]["block_nll"] for d in documents] for n in lengths] for m in methods], dtype=np.float64
        )
        tokens = _tokens_of_blocks(records[0]["tokens"], records[0]["block_tokens"])
        self.means: FloatArray = nll.sum((2, 3)) / (len(documents) * tokens.sum())
        draws = bootstrap_means(nll.reshape(-1, *nll.shape[2:]), tokens, seed=seed)
        self.draws: FloatArray = draws.reshape(-1, len(methods), len(lengths))

    def excess(self, method: str, other: str = DENSE) -> tuple[FloatArray, FloatArray]:
        """Nats per token of `method` above `other`: measured `(lengths,)`, and resampled `(samples, lengths)`."""
        i, j = self.methods.index(method), self.methods.index(other)
        return self.means[i] - self.means[j], self.draws[:, i] - self.draws[:, j]


def _tokens_of_blocks(tokens: int, block: int) -> FloatArray:
    return np.array([min(block, tokens - start) for start in range(0, tokens, block)], dtype=np.float64)


def _ratio(value: float, draws: FloatArray) -> dict[str, float]:
    low, high = percentile_interval(draws)
    return {"ratio": math.exp(value), "low": math.exp(low), "high": math.exp(high)}


def _result(series: _Series, method: str, length: int, records: Sequence[Record]) -> dict[str, Any]:
    cell = [row for row in records if row["method"] == method and row["length"] == length]
    perplexity = TokenPerplexity(keep_in_memory=True).compute(
        nll=[row["nll"] for row in cell], tokens=[row["tokens"] for row in cell]
    )
    value, draws = series.excess(method)
    i = series.lengths.index(length)
    return {
        "method": method,
        "length": length,
        "perplexity": perplexity["token_perplexity"],
        **_ratio(value[i], draws[:, i]),
        "density": _mean(cell, "density"),
        "sparse_density": _mean(cell, "sparse_density"),
        "mean_keys": _mean(cell, "mean_keys"),
        "seconds": _mean(cell, "seconds"),
        "tokens": sum(row["tokens"] for row in cell),
    }


def _mean(records: Sequence[Record], column: str) -> float | None:
    values = [row[column] for row in records if row.get(column) is not None]
    return math.fsum(values) / len(values) if values else None


def _over_lengths(series: _Series, method: str) -> dict[str, Any]:
    value, draws = series.excess(method)
    worst = int(value.argmax())
    return {
        "method": method,
        "mean": _ratio(value.mean(), draws.mean(1)),
        "worst_length": series.lengths[worst],
        "worst": _ratio(value.max(), draws.max(1)),
    }


def _verdict(series: _Series, adaptive: str, fixed: str) -> dict[str, Any]:
    value, draws = series.excess(adaptive, fixed)
    ours, our_draws = series.excess(adaptive)
    theirs, their_draws = series.excess(fixed)
    return {
        "adaptive": adaptive,
        "fixed": fixed,
        "by_length": [{"length": length, **_ratio(value[i], draws[:, i])} for i, length in enumerate(series.lengths)],
        "mean": _ratio(value.mean(), draws.mean(1)),
        "worst": _ratio(ours.max() - theirs.max(), our_draws.max(1) - their_draws.max(1)),
    }
