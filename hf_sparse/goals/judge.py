"""What measured runs say about goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.evaluation.tables import Table
from hf_sparse.goals.reading import Interval, Reader, Summary

MISSED = "missed"
"""The verdict on a goal whose least is not met."""


@dataclass(frozen=True)
class Measure:
    """A quantity that is judged.

    Attributes:
        text: How a value of it is written.
        rising: Whether more is better.
        of: What it is a part of, if that must be said.
    """

    text: Callable[[float], str]
    rising: bool
    of: str = ""


MEASURES = {
    "speed-up": Measure("{:.3g}x".format, rising=True),
    "share of 1/density": Measure(lambda value: f"{100 * value:.0f} %", rising=True, of=" of 1/density"),
    "exponent": Measure("{:.2f}".format, rising=False),
    "exponent - C": Measure("{:+.2f}".format, rising=False, of=" over C"),
    "overhead": Measure("{:.3g} %".format, rising=False),
    "peak memory": Measure("{:.3g}x".format, rising=False),
    "perplexity ratio": Measure("{:.4f}".format, rising=False),
    "adaptive / fixed": Measure("{:.4f}".format, rising=False),
}


@dataclass(frozen=True)
class Bound:
    """What a measure must reach, by its median."""

    measure: str
    value: float

    def met_by(self, measured: Mapping[str, Interval]) -> bool:
        """Whether it is reached."""
        value = measured[self.measure]["median"]
        return value >= self.value if MEASURES[self.measure].rising else value <= self.value

    def __str__(self) -> str:
        measure = MEASURES[self.measure]
        return measure.text(self.value) + measure.of


@dataclass(frozen=True)
class Goal:
    """What is aimed at.

    Attributes:
        name: What is measured, and against what.
        goal: What we want.
        least: What must be.
        reader: Where it is read.
    """

    name: str
    goal: Bound
    least: Bound
    reader: Reader


def judge(runs: Mapping[str, Summary], goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """What runs say about the goals.

    Args:
        runs: Name -> summary of `hf-sparse bench`, `memory` or `perplexity`. Of several that measured the same,
            the first counts.
        goals: What to judge.

    Returns:
        A dictionary per goal: `target`, `goal` and `least` as text, `measured` (measure -> interval), `judged` (the
        measures that count), `density`, `verdict` (`"goal met"`, `"least met"`, `MISSED` or `"not measured"`), `run`
        (the name), and `reason`, why it was not measured.
    """
    return [
        {"target": goal.name, "goal": str(goal.goal), "least": str(goal.least), **_judge(goal, runs)} for goal in goals
    ]


def _judge(goal: Goal, runs: Mapping[str, Summary]) -> dict[str, Any]:
    for name, run in runs.items():
        reading = goal.reader.read(run)
        if reading is None:
            continue
        verdict = MISSED
        if goal.least.met_by(reading.measured):
            verdict = "goal met" if goal.goal.met_by(reading.measured) else "least met"
        return {
            "measured": dict(reading.measured),
            "judged": list(dict.fromkeys((goal.least.measure, goal.goal.measure))),
            "density": reading.density,
            "verdict": verdict,
            "run": name,
            "reason": None,
        }
    return {
        "measured": {},
        "judged": [],
        "density": None,
        "verdict": "not measured",
        "run": None,
        "reason": f"no run of {goal.reader}",
    }


def goals_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `judge`'s rows."""
    header = ["target", "goal", "least", "measured", "density", "verdict", "run"]
    return header, [
        [
            row["target"],
            row["goal"],
            row["least"],
            "; ".join(_interval_text(name, row["measured"][name]) for name in row["judged"]) or "-",
            "-" if row["density"] is None else f"{row['density']:.3f}",
            row["verdict"] if row["reason"] is None else f"{row['verdict']}: {row['reason']}",
            row["run"] or "-",
        ]
        for row in rows
    ]


def _interval_text(measure: str, interval: Interval) -> str:
    text, of = MEASURES[measure].text, MEASURES[measure].of
    return f"{text(interval['median'])}{of} ({text(interval['low'])} to {text(interval['high'])})"
