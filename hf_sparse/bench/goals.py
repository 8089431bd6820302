"""What hf_sparse aims at in speed and memory, and what measured runs say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.bench import end_to_end, layer
from hf_sparse.bench.readings import Growth, Interval, Memory, Overhead, Reader, SpeedUp
from hf_sparse.bench.summary import Summary
from hf_sparse.evaluation.tables import Table

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


_CPU = {"device": "cpu"}
_MODEL = {"device": "cpu", "layers": 2}
_H200 = {"device_name": "NVIDIA H200", "dtype": "bfloat16", "name": "llama-8b"}
_STOCK, _SDPA = end_to_end.BASELINE, layer.BASELINE


def _times(name: str, goal: float, least: float, reader: Reader) -> Goal:
    return Goal(name, Bound("speed-up", goal), Bound("speed-up", least), reader)


def _overhead(name: str, reader: Reader) -> Goal:
    return Goal(f"overhead below break-even, {name}, CPU", Bound("overhead", 0), Bound("overhead", 5), reader)


GOALS = (
    _times(
        "decode end to end, 32,768 cached, against stock generate, CPU",
        4.5,
        3,
        SpeedUp("cached", "token", 32768, _STOCK, _MODEL),
    ),
    _times(
        "decode end to end, 131,072 cached, against stock generate, CPU",
        20,
        10,
        SpeedUp("cached", "token", 131072, _STOCK, _MODEL),
    ),
    _times(
        "decode attention, 131,072, against SDPA without concatenation, CPU",
        12,
        8,
        SpeedUp("decode", "seconds", 131072, _SDPA, _CPU),
    ),
    Goal(
        "prefill attention, 32,768, selection included, against causal SDPA, CPU",
        Bound("share of 1/density", 0.75),
        Bound("speed-up", 3),
        SpeedUp("prefill", "seconds", 32768, _SDPA, _CPU),
    ),
    _times(
        "time to first token, 32,768, against stock generate, CPU",
        12,
        5,
        SpeedUp("generate", "first_token", 32768, _STOCK, _MODEL),
    ),
    Goal(
        "exponent of decode time in n, 16,384 to 262,144, CPU",
        Bound("exponent - C", 0.1),
        Bound("exponent", 0.7),
        Growth(16384, 262144, _CPU),
    ),
    _overhead("first token of 1,024 and 4,096", Overhead("generate", "first_token", (1024, 4096), _MODEL)),
    _overhead("a token after 1,024 and 4,096", Overhead("cached", "token", (1024, 4096), _MODEL)),
    Goal(
        "peak memory of a prefill over model and cache, 32,768, against dense SDPA, CPU",
        Bound("peak memory", 1.2),
        Bound("peak memory", 1.5),
        Memory(32768),
    ),
    _times(
        "decode attention, 131,072, Llama-8B shape, against the fastest dense, H200",
        15,
        6,
        SpeedUp("decode", "seconds", 131072, None, _H200),
    ),
    _times(
        "prefill attention, 131,072, Llama-8B shape, against the fastest dense, H200",
        8,
        3,
        SpeedUp("prefill", "seconds", 131072, None, _H200),
    ),
)
"""The goals, in the order in which they are shown. An overhead is the worse of its two lengths."""


def judge(runs: Mapping[str, Summary], goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """What runs say about the goals.

    Args:
        runs: Name -> summary of `hf-sparse bench` or `hf-sparse memory`. Of several that measured the same, the first
            counts.
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
