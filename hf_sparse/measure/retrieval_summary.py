"""From records to answers: how often codes are found again, by length, depth and document, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_sparse.measure.retrieval import COMMAND
from hf_sparse.measure.statistics import CONFIDENCE, SAMPLES, FloatArray, bootstrap_means, estimate
from hf_sparse.results import DENSE, Record, Summary, describe
from hf_sparse.tables import Table


def summarise(records: Sequence[Record], seed: int) -> Summary:
    """Summarise records of `evaluate`: every method on the same prompts, `dense` among them.

    Returns:
        A dictionary for `json.dumps`. `accuracy` is the share of questions answered with exactly the code, `nats` the
        mean over questions of the nats that a token of the code costs, `low` and `high` the ends of a 95 % interval of
        a bootstrap that draws documents and the questions within them, the same ones for all methods and lengths:

        - `results`: for each method and length `questions`, `accuracy`, `nats` and `accuracy_above_dense` (the paired
          difference), each a `value` with `low` and `high`; `density` of the text, `answer_density` of the questions
          and answers, `mean_keys` and `seconds`;
        - `depths`: for each method, length and depth `accuracy` and `nats`, means over documents;
        - `by_document`: for each method, length and document the same, means over depths;
        - `command`, `documents`, `lengths`, `codes`, `resampled` (what the bootstrap drew), `seed`, `samples`,
          `confidence`, `configs`, `about`.
    """
    methods = list(dict.fromkeys(record["method"] for record in records))
    lengths = sorted({record["length"] for record in records})
    described = describe(COMMAND, records)
    documents = [document["text_sha256"] for document in described["documents"]]
    cells = {(record["method"], record["length"], record["text_sha256"]): record for record in records}
    depths = [answer["depth"] for answer in records[0]["answers"]]

    def collect(value: Callable[[Record], float]) -> FloatArray:
        """`(methods, lengths, documents, questions)`."""
        found = [
            [[[value(answer) for answer in cells[m, n, d]["answers"]] for d in documents] for n in lengths]
            for m in methods
        ]
        return np.array(found, dtype=np.float64)

    correct = collect(lambda answer: answer["correct"])
    nats = collect(lambda answer: answer["nll"] / answer["tokens"])
    draws = [_draws(values, seed) for values in (correct, nats)]
    dense = methods.index(DENSE)
    results, by_depth, by_document = [], [], []
    for i, method in enumerate(methods):
        for j, length in enumerate(lengths):
            own = [cells[method, length, document] for document in documents]
            place = {"method": method, "length": length}
            results.append(
                {
                    **place,
                    "questions": correct[i, j].size,
                    "accuracy": estimate(correct[i, j].mean(), draws[0][:, i, j]),
                    "nats": estimate(nats[i, j].mean(), draws[1][:, i, j]),
                    "accuracy_above_dense": estimate(
                        correct[i, j].mean() - correct[dense, j].mean(), draws[0][:, i, j] - draws[0][:, dense, j]
                    ),
                    **{name: _mean(own, name) for name in ("density", "answer_density", "mean_keys", "seconds")},
                }
            )
            by_depth += [
                place | {"depth": depth, "accuracy": float(a), "nats": float(b)}
                for depth, a, b in zip(depths, correct[i, j].mean(0), nats[i, j].mean(0), strict=True)
            ]
            by_document += [
                place | {"document": record["document"], "accuracy": float(a), "nats": float(b)}
                for record, a, b in zip(own, correct[i, j].mean(1), nats[i, j].mean(1), strict=True)
            ]
    return {
        **described,
        "results": results,
        "depths": by_depth,
        "by_document": by_document,
        "lengths": lengths,
        "codes": len(depths),
        "resampled": "documents and questions" if len(documents) > 1 else "questions of the one document",
        "seed": seed,
        "samples": SAMPLES,
        "confidence": CONFIDENCE,
        "configs": {record["method"]: record["config"] for record in records},
    }


def all_tables(summary: Summary) -> list[Table]:
    """Accuracy, nats and density of every method and length; accuracy by depth at the longest length."""
    header = ["method", "length", "found", "95 % interval", "found - dense", "nats / token", "95 % interval", "density"]
    header.append("density, answers")
    lines = [
        [
            row["method"],
            str(row["length"]),
            f"{row['accuracy']['value']:.3f}",
            _interval(row["accuracy"]),
            "-" if row["method"] == DENSE else f"{row['accuracy_above_dense']['value']:+.3f}",
            f"{row['nats']['value']:.3f}",
            _interval(row["nats"]),
            f"{row['density']:.3f}",
            f"{row['answer_density']:.3f}",
        ]
        for row in summary["results"]
    ]
    longest = summary["lengths"][-1]
    depths = [row for row in summary["depths"] if row["length"] == longest]
    found = {(row["method"], row["depth"]): f"{row['accuracy']:.2f}" for row in depths}
    methods, places = (list(dict.fromkeys(row[name] for row in depths)) for name in ("method", "depth"))
    by_depth = [[method, *(found[method, place] for place in places)] for method in methods]
    return [(header, lines), ([f"found at {longest} tokens", *(f"depth {place:.2f}" for place in places)], by_depth)]


def _draws(values: FloatArray, seed: int) -> FloatArray:
    """Resampled means of `(methods, lengths, documents, questions)`: `(samples, methods, lengths)`."""
    methods, lengths, documents, questions = values.shape
    flat = values.reshape(methods * lengths, documents, questions)
    return bootstrap_means(flat, np.ones(questions), seed=seed).reshape(-1, methods, lengths)


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in records]
    return None if None in values else float(np.mean(values))


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:.3f} to {row['high']:.3f}"
