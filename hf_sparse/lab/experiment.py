"""The frame of the theory lab: cells are measured into records, records conclude in quantities, quantities decide."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_sparse.measure.plots import figure, log_axis, style
from hf_sparse.measure.windows import Window
from hf_sparse.results import Record, record_key

Cell = dict[str, Any]
"""Everything that decides one measurement, as JSON; an interrupted run recognises its records by it."""

CLAIMS = tomllib.loads((Path(__file__).parent / "claims.toml").read_text(encoding="utf-8"))

CHANCE = 0.05
"""Share of cases, each decided by a 95 % interval, that may come out wrong by chance."""


@dataclass(frozen=True)
class Setting:
    """What an experiment runs on: the scale, `small` (a check of minutes) or `full`, and the seed of everything random.

    Experiments on models also take an unpatched model, the windows that it reads (one of every document at every
    length), and the provenance of the model.
    """

    scale: str
    seed: int
    model: Any = None
    windows: Sequence[Window] = ()
    about: Record = field(default_factory=dict)

    def rng(self, cell: Cell) -> np.random.Generator:
        """Random numbers of a cell: independent of other cells and of the order of measurements."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, int(record_key(**cell), 16)]))


def words(value: Any) -> str:
    """A quantity for readers: three significant digits, whole numbers in full, the entries of a mapping by name."""
    if isinstance(value, Mapping) and value.keys() == {"value", "low", "high"}:
        return "{} [{}, {}]".format(*(words(value[end]) for end in ("value", "low", "high")))
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {words(entry)}" for name, entry in value.items())
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def judge(claim: Mapping[str, Any], held: Any, quantities: Mapping[str, Any]) -> dict[str, str]:
    """The verdict on a claim of `claims.toml`, as JSON; its evidence and place are taken from `quantities`.

    Whether the claim `held` is a bool, one for each of several cases, or the share of cases; `None`: not testable.
    """
    answer = "not testable here"
    if held is not None:
        share = np.mean(held)
        answer = "holds" if share >= 1 - CHANCE else "holds in part" if share > CHANCE else "fails"
    paths = [name.split(" > ") for name in claim["evidence"]]
    found: dict[str, Any] = {path[-1]: reduce(getitem, path, quantities) for path in paths}
    return {
        "claim": claim["text"],
        "source": claim["source"],
        "answer": answer,
        "where": claim["where"].format(**quantities),
        "evidence": "; ".join(f"{name}: {words(value)}" for name, value in found.items() if value != ""),
    }


@dataclass(frozen=True)
class Plot:
    """Lines against a common x.

    Attributes:
        lines: By label: y `(x,)`, or `(3, x)` for a band: low, middle, high.
        references: Lines to compare with, at most two, `(x,)`.
        log: The logarithmic axes; an x axis is one of lengths.
    """

    xlabel: str
    ylabel: str
    x: Sequence[int | float]
    lines: Mapping[str, ArrayLike]
    references: Mapping[str, ArrayLike] = field(default_factory=dict)
    log: str = "xy"

    def draw(self, title: str, path: Path) -> None:
        """Write a PNG file."""
        page = figure(7.4, 4.8)
        axes = page.subplots()
        for label, y in self.lines.items():
            low, middle, high = np.asarray(y) if np.ndim(y) == 2 else (y, y, y)
            look = style(label, list(self.lines))
            axes.plot(self.x, middle, label=label, **look)
            axes.fill_between(self.x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        for (label, y), dashes in zip(self.references.items(), ("--", ":"), strict=False):
            axes.plot(self.x, np.asarray(y), color="#000000", linestyle=dashes, label=label)
        if "x" in self.log:
            log_axis(axes, [int(x) for x in self.x], self.xlabel)
        if "y" in self.log:
            axes.set_yscale("log")
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)
        axes.grid(visible=True, alpha=0.25)
        axes.set_title(title, fontsize=10)
        page.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
        page.savefig(path, dpi=100)


@dataclass(frozen=True)
class Findings:
    """What an experiment concludes.

    Attributes:
        figures: Quantities for `summary.json` and `tables.md`.
        more: Other quantities that claims name as evidence.
        held: For each claim, in the order of `claims.toml`, in which cases it held; see `judge`.
        plot: What shows the point of the experiment.
    """

    figures: dict[str, Any]
    more: dict[str, Any]
    held: Sequence[Any]
    plot: Plot


@dataclass(frozen=True)
class Experiment:
    """One experiment: a module of this package.

    Attributes:
        name: On the command line, in `claims.toml` and of the plot.
        cells: Lists what to measure.
        measure: Measures one cell, with finite numbers; everything random comes from `Setting.rng(cell)`.
        conclude: Turns the records (each a cell and its measurements), in the order of the cells, into findings. It
            does not see the setting, so that committed summaries can be checked against committed records.
    """

    name: str
    cells: Callable[[Setting], Sequence[Cell]]
    measure: Callable[[Cell, Setting], Record]
    conclude: Callable[[Sequence[Record]], Findings]
    needs_model: bool

    def verdicts(self, findings: Findings) -> list[dict[str, str]]:
        """The verdict on each claim."""
        claims = zip(CLAIMS[self.name]["claims"], findings.held, strict=True)
        return [judge(claim, held, findings.figures | findings.more) for claim, held in claims]
