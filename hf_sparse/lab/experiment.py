"""The frame of the theory lab: an experiment is cells to measure, and what follows from the measured records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedModel

from hf_sparse.lab.plots import Panel
from hf_sparse.measure.tables import Table
from hf_sparse.measure.windows import Window
from hf_sparse.results import Row, row_key

Scale = Literal["small", "full"]
SCALES: tuple[str, ...] = get_args(Scale)

Cell = dict[str, Any]
"""Everything that decides one measurement, as JSON; an interrupted run recognises its records by it."""

Answer = Literal["holds", "holds in part", "fails", "not testable here"]
Source = Literal["abstract", "machine summary", "derived here"]
"""Where a claim was read: in the abstract of arXiv 2404.02690, in a machine-made summary only (the body of the paper
could not be obtained), or nowhere: then it follows from a derivation in this package."""

_CHANCE = 0.05


@dataclass(frozen=True)
class Subject:
    """A real model and its texts.

    Attributes:
        model: The model, unpatched.
        windows: The windows of every document, at every length.
        about: Provenance: model, dtype, device, versions.
    """

    model: PreTrainedModel
    windows: Sequence[Window]
    about: Row


@dataclass(frozen=True)
class Setting:
    """How experiments are run.

    Attributes:
        scale: `small` for a check of minutes, `full` for figures to quote.
        seed: Seed of everything random.
        model_subject: The model that the experiments on models look at.
    """

    scale: Scale
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
        return np.random.default_rng(np.random.SeedSequence([self.seed, int(row_key(**cell), 16)]))


def decide(held: ArrayLike) -> Answer:
    """The verdict on a claim from the cases in which it `held`: one bool, several, or the share that is true.

    One case of twenty may fail by chance where each is decided by a 95 % interval, and one may hold by chance.
    """
    share = float(np.mean(held))
    if share >= 1 - _CHANCE:
        return "holds"
    return "holds in part" if share > _CHANCE else "fails"


@dataclass(frozen=True)
class Verdict:
    """The result on one claim.

    Attributes:
        claim: The claim as it was tested, its threshold included.
        source: Where it was read.
        answer: Whether it holds.
        where: Norm, inputs and cases.
        measured: The quantities that decide, by name: numbers, intervals, text, or a mapping of those.
    """

    claim: str
    source: Source
    answer: Answer
    where: str
    measured: Mapping[str, Any]

    @property
    def caption(self) -> str:
        """Claim and answer, for a plot."""
        return f"{self.answer.upper()}: {self.claim}"

    def to_dict(self) -> dict[str, str]:
        """The attributes as JSON, `measured` in words under `evidence`."""
        words = "; ".join(f"{name}: {_words(value)}" for name, value in self.measured.items())
        return {**{name: getattr(self, name) for name in ("claim", "source", "answer", "where")}, "evidence": words}


def _words(value: Any) -> str:
    match value:
        case Mapping():
            return ", ".join(f"{name} {_words(entry)}" for name, entry in value.items())
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case _:
            return str(value)


@dataclass(frozen=True)
class Findings:
    """The conclusions from the records of an experiment, and from nothing else.

    Attributes:
        figures: Fitted slopes with intervals and the like, as JSON.
        verdicts: One for each claim.
        panels: The page of plots.
        tables: For people.
    """

    figures: dict[str, Any]
    verdicts: Sequence[Verdict]
    panels: Sequence[Panel]
    tables: Sequence[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: Name on the command line and of the page of plots.
        title: Title of the page.
        claim: The claim under test.
        source: Where the claim was read.
        cells: Lists what to measure.
        measure: Measures one cell: a dictionary without the cell's own entries, numbers finite. Everything random
            comes from `Setting.rng(cell)`.
        conclude: Turns the records (each a cell and its measurements), in the order of the cells, into findings. It
            does not see the setting, so that committed summaries can be checked against committed records.
        needs_model: Whether it needs a `Subject`.
    """

    name: str
    title: str
    claim: str
    source: Source
    cells: Callable[[Setting], Sequence[Cell]]
    measure: Callable[[Cell, Setting], Row]
    conclude: Callable[[Sequence[Row]], Findings]
    needs_model: bool = False
