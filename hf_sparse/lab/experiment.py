"""The frame of the theory lab: cells are measured into records, records conclude in quantities, quantities decide."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hf_sparse.lab.plots import Panel
from hf_sparse.measure.windows import Window
from hf_sparse.results import Record, record_key
from hf_sparse.tables import Table

Cell = dict[str, Any]
"""Everything that decides one measurement, as JSON; an interrupted run recognises its records by it."""

CLAIMS = tomllib.loads((Path(__file__).parent / "claims.toml").read_text(encoding="utf-8"))

CHANCE = 0.05
"""Share of cases, each decided by a 95 % interval, that may come out wrong by chance."""


@dataclass(frozen=True)
class Subject:
    """A real model, unpatched; the windows of every document at every length; and its provenance."""

    model: PreTrainedModel
    windows: Sequence[Window]
    about: Record


@dataclass(frozen=True)
class Setting:
    """The scale, `small` for a check of minutes or `full`, the seed, and the model for experiments that need one."""

    scale: str
    seed: int
    model_subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        """The model and its texts.

        Raises:
            ValueError: if there is none.
        """
        if self.model_subject is None:
            raise ValueError("this experiment needs a model: the setting has no subject")
        return self.model_subject

    def rng(self, cell: Cell) -> np.random.Generator:
        """Random numbers of a cell: independent of other cells and of the order of measurements."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, int(record_key(**cell), 16)]))


def judge(claim: Mapping[str, Any], held: Any, quantities: Mapping[str, Any]) -> dict[str, str]:
    """The verdict on a claim of `claims.toml`, as JSON.

    Args:
        claim: The claim.
        held: Whether it held: a bool, one for each of several cases, or the share of cases; `None`: not testable.
        quantities: What its evidence and place are taken from.
    """
    answer = "not testable here"
    if held is not None:
        share = np.mean(held)
        answer = "holds" if share >= 1 - CHANCE else "holds in part" if share > CHANCE else "fails"
    found = {name.rpartition(" > ")[2]: _take(quantities, name) for name in claim["evidence"]}
    return {
        "claim": claim["text"],
        "source": claim["source"],
        "answer": answer,
        "where": claim["where"].format(**quantities),
        "evidence": "; ".join(f"{name}: {_words(value)}" for name, value in found.items() if value != ""),
    }


def _take(quantities: Any, name: str) -> Any:
    for part in name.split(" > "):
        quantities = quantities[part]
    return quantities


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_words(entry)}" for name, entry in value.items())
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Findings:
    """The conclusions from the records of an experiment, and from nothing else.

    Attributes:
        figures: Quantities for `summary.json`.
        more: Other quantities that show what was found.
        held: For each claim, in the order of `claims.toml`, in which cases it held; see `judge`.
        panels: The page of plots.
        tables: For people.
    """

    figures: dict[str, Any]
    more: dict[str, Any]
    held: Sequence[Any]
    panels: Sequence[Panel]
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: Name on the command line, in `claims.toml` and of the page of plots.
        cells: Lists what to measure.
        measure: Measures one cell: a dictionary without the cell's own entries, numbers finite. Everything random
            comes from `Setting.rng(cell)`.
        conclude: Turns the records (each a cell and its measurements), in the order of the cells, into findings. It
            does not see the setting, so that committed summaries can be checked against committed records.
        needs_model: Whether it needs a `Subject`.
    """

    name: str
    cells: Callable[[Setting], Sequence[Cell]]
    measure: Callable[[Cell, Setting], Record]
    conclude: Callable[[Sequence[Record]], Findings]
    needs_model: bool = False

    def verdicts(self, findings: Findings) -> list[dict[str, str]]:
        """The verdict on each claim."""
        claims = zip(CLAIMS[self.name]["claims"], findings.held, strict=True)
        return [judge(claim, held, findings.figures | findings.more) for claim, held in claims]
