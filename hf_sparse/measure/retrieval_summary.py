"""From records to answers: how often codes are found again, by length, depth and document, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_sparse.measure.grid import Grid
from hf_sparse.measure.retrieval import COMMAND
from hf_sparse.measure.statistics import SAMPLES, FloatArray, bootstrap_means, estimate
from hf_sparse.results import DENSE, Column, Record, Summary, Table, make_table


def summarise(records: Sequence[Record], seed: int) -> Summary:
    """The summary of the records of `retrieval.evaluate`: every method on the same prompts.

    Returns:
        A dictionary for `json.dumps`. `accuracy` is the share of questions answered with exactly the code, `nats` the
        mean over questions of the nats that a token of the code costs, `low` and `high` the ends of a 95 % interval of
        a bootstrap that draws documents and the questions within them, the same ones for all methods and lengths:

        - `results`: for each method and length `questions`, `accuracy`, `nats` and `accuracy_above_dense` (the paired
          difference), each a `value` with `low` and `high`; `density` of the text, `answer_density` of the questions
          and answers, `mean_keys` and `seconds`;
        - `depths`: for each method, length and depth `accuracy` and `nats`, means over documents;
        - `by_document`: for each method, length and document the same, means over depths;
        - `codes`, `resampled` (what the bootstrap drew), and what `Grid.describe` says.
    """
    grid = Grid.of(records)
    # (methods, lengths, documents, questions)
    correct = grid.values(lambda record: [answer["correct"] for answer in record["answers"]])
    nats = grid.values(lambda record: [answer["nll"] / answer["tokens"] for answer in record["answers"]])
    draws, nats_draws = _draws(correct, seed), _draws(nats, seed)
    dense = grid.methods.index(DENSE)
    depths = [answer["depth"] for answer in records[0]["answers"]]
    results, by_depth, by_document = [], [], []
    for method, length in grid.places():
        own = grid.at(method, length)
        i, j = grid.methods.index(method), grid.lengths.index(length)
        place = {"method": method, "length": length}
        above = correct[i, j].mean() - correct[dense, j].mean()
        results.append(
            {
                **place,
                "questions": correct[i, j].size,
                "accuracy": estimate(correct[i, j].mean(), draws[:, i, j]),
                "nats": estimate(nats[i, j].mean(), nats_draws[:, i, j]),
                "accuracy_above_dense": estimate(above, draws[:, i, j] - draws[:, dense, j]),
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
        **grid.describe(COMMAND, seed, SAMPLES),
        "results": results,
        "depths": by_depth,
        "by_document": by_document,
        "codes": len(depths),
        "resampled": "documents and questions" if len(grid.documents) > 1 else "questions of the one document",
    }


def all_tables(summary: Summary) -> list[Table]:
    """Accuracy, nats and density of every method and length; accuracy by depth at the longest length."""
    columns: list[Column] = [
        ("method", "{method}"),
        ("length", "{length}"),
        ("found", "{accuracy[value]:.3f}"),
        ("95 % interval", "{accuracy[low]:.3f} to {accuracy[high]:.3f}"),
        (
            "found - dense",
            lambda row: "-" if row["method"] == DENSE else f"{row['accuracy_above_dense']['value']:+.3f}",
        ),
        ("nats / token", "{nats[value]:.3f}"),
        ("95 % interval", "{nats[low]:.3f} to {nats[high]:.3f}"),
        ("density", "{density:.3f}"),
        ("density, answers", "{answer_density:.3f}"),
    ]
    longest = summary["lengths"][-1]
    depths = [row for row in summary["depths"] if row["length"] == longest]
    places = list(dict.fromkeys(row["depth"] for row in depths))
    by_depth = [
        [method, *(f"{row['accuracy']:.2f}" for row in depths if row["method"] == method)]
        for method in dict.fromkeys(row["method"] for row in depths)
    ]
    header = [f"found at {longest} tokens", *(f"depth {place:.2f}" for place in places)]
    return [make_table(columns, summary["results"]), (header, by_depth)]


def _draws(values: FloatArray, seed: int) -> FloatArray:
    """Resampled means of `(methods, lengths, documents, questions)`: `(samples, methods, lengths)`."""
    methods, lengths, documents, questions = values.shape
    flat = values.reshape(methods * lengths, documents, questions)
    return bootstrap_means(flat, np.ones(questions), seed=seed).reshape(-1, methods, lengths)


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in records]
    return None if None in values else float(np.mean(values))
