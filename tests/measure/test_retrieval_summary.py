"""Scores, chance, verdicts, tables and plots of retrieval records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_sparse.measure import plots
from hf_sparse.measure.retrieval_plots import plot_retrieval
from hf_sparse.measure.retrieval_summary import summarise
from hf_sparse.measure.retrieval_tables import all_tables, sentences
from hf_sparse.results import Record

LENGTHS = (512, 1024)
DEPTHS = (0.0, 0.5, 1.0)

# By task and method, whether the answers to three questions are picked, at every length and of both documents.
PICKED = {
    "needle-single": {"dense": (1, 1, 1), "window": (0, 1, 1), "fraction-0.5": (1, 1, 1)},
    "frequent-words": {"dense": (0, 1, 0), "window": (1, 1, 1), "fraction-0.5": (0, 0, 0)},
}


def records(modes: tuple[str, ...] = ("prefill", "decode"), documents: int = 2) -> list[Record]:
    return [
        {
            "task": task,
            "method": method,
            "modes": list(modes),
            "length": length,
            "document": f"d{i}",
            "text_sha256": str(i),
            "answers": [
                {
                    "mode": mode,
                    "depth": depth if task == "needle-single" else None,
                    "picked": bool(right),
                    "found": right / 2,
                    "exact": False,
                    "margin": 1.0,
                }
                for mode in modes
                for depth, right in zip(DEPTHS, picked, strict=True)
            ],
            "density": 1.0 if method == "dense" else 0.25,
            "answer_density": dict.fromkeys(modes, 0.1),
            "mean_keys": None if method == "dense" else 9.0,
            "seconds": 1.0,
            "mode_seconds": dict.fromkeys(modes, 2.0),
            "config": None,
        }
        | dict.fromkeys(("dtype", "device", "device_name", "versions", "commit"))
        | {"model": {"name": "tiny"}}
        for i in range(documents)
        for length in LENGTHS
        for task, methods in PICKED.items()
        for method, picked in methods.items()
    ]


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return summarise(records(), seed=0)


def row(summary: dict[str, Any], table: str, **place: Any) -> Any:
    [found] = [row for row in summary[table] if place.items() <= row.items()]
    return found


def test_scores_are_means_with_paired_differences(summary: dict[str, Any]) -> None:
    json.dumps(summary, allow_nan=False)
    place = {"mode": "decode", "length": 512, "task": "needle-single"}
    dense, window = (row(summary, "results", method=method, **place) for method in ("dense", "window"))
    assert window["picked"]["value"] == pytest.approx(2 / 3)
    assert window["found"]["value"] == pytest.approx(1 / 3)
    assert window["picked"]["low"] < 2 / 3 < window["picked"]["high"]
    assert window["picked_above_dense"]["value"] == pytest.approx(-1 / 3)
    assert dense["picked"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert dense["picked_above_dense"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (dense["mean_keys"], window["mean_keys"], window["mode_seconds"]) == (None, 9.0, 2.0)
    assert (summary["questions"], summary["resampled"]) == (3, "documents and questions")
    assert summarise(records(documents=1), 0)["resampled"] == "questions of the one document"


def test_where_dense_guesses_nothing_counts(summary: dict[str, Any]) -> None:
    """A third of right answers out of six cannot be told from a quarter by guessing."""
    for task, counted in (("needle-single", ["picked", "found"]), ("frequent-words", [])):
        for found in (row for row in summary["results"] if row["task"] == task):
            assert found["counted"] == counted
    verdict = row(summary, "verdicts", mode="prefill", method="window", score="picked")
    assert (verdict["counted"], verdict["cells"], verdict["density"]) == (2, 4, 0.25)
    assert verdict["above_dense"]["value"] == pytest.approx(-1 / 3)
    assert [(each["length"], each["counted"]) for each in verdict["lengths"]] == [(512, 1), (1024, 1)]
    assert verdict["lengths"][0]["score"] == pytest.approx(2 / 3)
    [first, *_] = sentences(summary)
    assert first.startswith("window, prefill: by likelihood 33.3 points below dense (-")
    assert first.endswith("; 2 of 4 tasks and lengths counted), at density 0.25")


def test_nothing_is_compared_where_no_task_counts() -> None:
    given = [record for record in records() if record["task"] == "frequent-words"]
    summary = summarise(given, seed=0)
    assert {row["above_dense"] for row in summary["verdicts"]} == {None}
    assert next(iter(sentences(summary))).count("nothing to compare (0 of 2 tasks and lengths counted)") == 2


def test_depths_are_of_tasks_that_have_them(summary: dict[str, Any]) -> None:
    assert {row["task"] for row in summary["depths"]} == {"needle-single"}
    own = [r for r in summary["depths"] if (r["method"], r["mode"], r["length"]) == ("window", "decode", 1024)]
    assert [(row["depth"], row["picked"]) for row in own] == [(0.0, 0.0), (0.5, 1.0), (1.0, 1.0)]


def test_tables_have_a_line_for_each_task_and_length(summary: dict[str, Any]) -> None:
    verdict, picked, found, cost = all_tables(summary)
    assert len(verdict[1]) == 2 * 2
    for header, lines in (picked, found):
        assert header[1:] == ["length", "dense", "window - dense", "fraction-0.5 - dense"]
        assert len(lines) == 2 * 2 * 2
        assert [line for line in lines if "near chance" in line[2]] == lines[4:]
    assert len(cost[1]) == 3 * 2 * 2


@pytest.mark.parametrize("tasks", [["needle-single", "frequent-words"], ["frequent-words"]])
def test_maps_and_lines_are_drawn(tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []

    def spy(width: float, height: float) -> Any:
        drawn.append(plots.figure(width, height))
        return drawn[-1]

    monkeypatch.setattr("hf_sparse.measure.retrieval_plots.figure", spy)
    given = [record for record in records() if record["task"] in tasks]
    plot_retrieval(summarise(given, seed=0), tmp_path / "plots" / "retrieval.png")
    assert (tmp_path / "plots" / "retrieval.png").stat().st_size > 10_000
    [drawing] = drawn
    maps = [axes for axes in drawing.axes if axes.images]
    panels = [axes for axes in drawing.axes if axes.get_xlabel().startswith("kept")]
    assert len(panels) == 4
    if tasks == ["frequent-words"]:
        assert not maps
        assert all(not axes.lines for axes in panels)
        return
    titles = [f"{method}, {mode}" for mode in ("prefill", "decode") for method in ("dense", "window", "fraction-0.5")]
    assert [axes.get_title() for axes in maps] == titles
    assert maps[1].images[0].get_array().tolist() == [[0, 100, 100]] * 2
    # The ladder from half of the keys to all of them, and the window beside it.
    ladder, window = panels[0].lines[:2]
    assert list(ladder.get_xdata()) == [25.0, 100.0]
    assert list(window.get_ydata()) == [pytest.approx(200 / 3)]
