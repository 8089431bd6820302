"""From records to answers: how often each method retrieves what the dense model does, with intervals and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hf_sparse.measure.grid import Grid
from hf_sparse.measure.retrieval import COMMAND
from hf_sparse.measure.retrieval_tasks import CANDIDATES
from hf_sparse.measure.statistics import SAMPLES, FloatArray, bootstrap_means, estimate, percentile_interval
from hf_sparse.results import DENSE, Record, Summary

CHANCE = {"picked": 1 / CANDIDATES, "found": 0.0}
"""The scores, and what guessing scores: how often the true answer is the likeliest, and the share of it written."""


def summarise(records: Sequence[Record], seed: int) -> Summary:
    """The summary of the records of `retrieval.evaluate`: every method on the same prompts.

    A score counts at a task and length if the 95 % interval of the dense model's score lies above chance (`CHANCE`).

    Returns:
        A dictionary for `json.dumps`, in which estimates are a `value` with `low` and `high`, the ends of a 95 %
        interval of a bootstrap that draws documents and questions within them, the same for all methods:

        - `results`: for each task, mode, method and length the scores `picked` and `found`, `picked_above_dense` and
          `found_above_dense` (paired differences), `counted` (the scores that count), means of `exact` and `margin`
          (nats), `density` of the text, `answer_density`, `mean_keys`, `seconds` (text), `mode_seconds` (questions);
        - `depths`: mean `picked` and `found` for each task, mode, method, length and depth, where there are depths;
        - `verdicts`: for each mode, method and score the mean difference to dense over all `counted` ones of the
          `cells` (tasks at a length), `above_dense` (`None` if none counts), at the mean `density`; its `lengths` hold
          the mean `score`, `density` and number `counted` of each length;
        - `questions` of a prompt, `tasks`, `modes`, `resampled`, and what `Grid.describe` says.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    grids = {task: Grid.of([record for record in records if record["task"] == task]) for task in tasks}
    grid = grids[tasks[0]]
    modes = list(records[0]["modes"])
    places = [(task, mode) for task in tasks for mode in modes]
    results = [row for task, mode in places for row in _results(grids[task], task, mode, seed)]
    return {
        **Grid.of(records).describe(COMMAND, seed, SAMPLES),
        "results": results,
        "depths": [row for task, mode in places for row in _depths(grids[task], task, mode)],
        "verdicts": [
            verdict for mode in modes for score in CHANCE for verdict in _verdicts(grids, results, mode, score, seed)
        ],
        "questions": len(records[0]["answers"]) // len(modes),
        "tasks": tasks,
        "modes": modes,
        "resampled": "documents and questions" if len(grid.documents) > 1 else "questions of the one document",
    }


def _values(grid: Grid, mode: str, name: str) -> FloatArray:
    """Of all answers in a mode, `(methods, lengths, documents, questions)`."""
    return grid.values(lambda record: [answer[name] for answer in record["answers"] if answer["mode"] == mode])


def _draws(values: FloatArray, seed: int) -> FloatArray:
    """Resampled means of `(..., documents, questions)`: `(samples, ...)`."""
    flat = values.reshape(-1, *values.shape[-2:])
    return bootstrap_means(flat, np.ones(values.shape[-1]), seed=seed).reshape(-1, *values.shape[:-2])


def _results(grid: Grid, task: str, mode: str, seed: int) -> Iterator[dict[str, Any]]:
    values = {name: _values(grid, mode, name) for name in (*CHANCE, "exact", "margin")}
    draws = {name: _draws(values[name], seed) for name in CHANCE}
    dense = grid.methods.index(DENSE)
    for method, length in grid.places():
        i, j = grid.methods.index(method), grid.lengths.index(length)
        mean = {name: float(value[i, j].mean()) for name, value in values.items()}
        own = grid.at(method, length)
        yield {
            "task": task,
            "mode": mode,
            "method": method,
            "length": length,
            **{name: estimate(mean[name], draws[name][:, i, j]) for name in CHANCE},
            **{
                f"{name}_above_dense": estimate(
                    mean[name] - values[name][dense, j].mean(), draws[name][:, i, j] - draws[name][:, dense, j]
                )
                for name in CHANCE
            },
            "counted": [name for name in CHANCE if percentile_interval(draws[name][:, dense, j])[0] > CHANCE[name]],
            "exact": mean["exact"],
            "margin": mean["margin"],
            **{name: _mean([record[name] for record in own]) for name in ("density", "mean_keys", "seconds")},
            **{name: _mean([record[name][mode] for record in own]) for name in ("answer_density", "mode_seconds")},
        }


def _depths(grid: Grid, task: str, mode: str) -> Iterator[dict[str, Any]]:
    """Means over documents, of tasks whose questions have a depth."""
    places = [answer["depth"] for answer in grid.records[0]["answers"] if answer["mode"] == mode]
    if None in places:
        return
    values = {name: _values(grid, mode, name).mean(2) for name in CHANCE}
    for method, length in grid.places():
        i, j = grid.methods.index(method), grid.lengths.index(length)
        for k, depth in enumerate(places):
            place = {"task": task, "mode": mode, "method": method, "length": length, "depth": depth}
            yield place | {name: float(value[i, j, k]) for name, value in values.items()}


def _verdicts(
    grids: dict[str, Grid], results: Sequence[dict[str, Any]], mode: str, score: str, seed: int
) -> Iterator[dict[str, Any]]:
    """The difference of each method to dense, over the tasks and lengths that count."""
    grid = next(iter(grids.values()))
    rows = [row for row in results if row["mode"] == mode]
    counted = [(row["task"], row["length"]) for row in rows if row["method"] == DENSE and score in row["counted"]]
    values = {task: _values(grid, mode, score) for task, grid in grids.items()}
    # Tasks have the same number of questions: side by side, each weighs the same.
    cells = [values[task][:, grid.lengths.index(length)] for task, length in counted]
    draws = _draws(np.concatenate(cells, axis=-1), seed) if cells else None
    dense = grid.methods.index(DENSE)
    for i, method in enumerate(grid.methods):
        own = [row for row in rows if row["method"] == method]
        by_length = []
        for length in grid.lengths:
            here = [row for row in own if row["length"] == length]
            means = [row[score]["value"] for row in here if score in row["counted"]]
            density = _mean([row["density"] for row in here])
            by_length.append({"length": length, "score": _mean(means), "density": density, "counted": len(means)})
        difference = None
        if draws is not None:
            means = [float((cell[i] - cell[dense]).mean()) for cell in cells]
            difference = estimate(float(np.mean(means)), draws[:, i] - draws[:, dense])
        yield {
            "mode": mode,
            "method": method,
            "score": score,
            "above_dense": difference,
            "counted": len(counted),
            "cells": len(own),
            "density": _mean([row["density"] for row in own]),
            "lengths": by_length,
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
