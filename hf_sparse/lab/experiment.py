"""What an experiment of the theory lab is: cells to measure, and what follows from the measured rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from transformers import PreTrainedModel

from hf_sparse.measure.tables import Table
from hf_sparse.measure.windows import Window
from hf_sparse.results import Row, row_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Scale = Literal["small", "full"]
SCALES: tuple[str, ...] = get_args(Scale)

Cell = dict[str, Any]
"""Everything that decides one measurement, as JSON: it is the key by which a run that starts again skips it."""

Answer = Literal["holds", "holds in part", "fails", "not testable here"]
Source = Literal["abstract", "machine summary", "derived here"]
"""Where a claim was read: in the abstract of arXiv 2404.02690, in a machine-made summary of the paper only (whose body
could not be obtained), or nowhere: then it follows from a derivation in this package."""


@dataclass(frozen=True)
class Subject:
    """A real model and what it reads.

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
    """How an experiment is run.

    Attributes:
        scale: `small` for a check of minutes, `full` for figures to quote.
        seed: Seed of everything random.
        subject: The real model, for the experiments that need one.
    """

    scale: Scale
    seed: int
    subject: Subject | None = None

    def rng(self, cell: Cell) -> np.random.Generator:
        """The random numbers of a cell: the same whatever was run before, and independent of those of other cells."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, int(row_key(**cell), 16)]))


@dataclass(frozen=True)
class Verdict:
    """What was found about one claim.

    Attributes:
        claim: The claim, in a sentence, as it was tested.
        source: Where it was read.
        answer: What the data say.
        where: In which norm, for which inputs.
        evidence: The figures, in a sentence.
    """

    claim: str
    source: Source
    answer: Answer
    where: str
    evidence: str

    def to_dict(self) -> dict[str, str]:
        """The attributes as a dictionary."""
        return asdict(self)


_CHANCE = 0.05


def answer_from(cases: Iterable[bool]) -> Answer:
    """The answer about a claim that was tried in several cases: `True` where it held.

    One case of twenty may come out wrong by chance where each is decided by a 95 % interval.
    """
    held = list(cases)
    share = sum(held) / len(held)
    if share >= 1 - _CHANCE:
        return "holds"
    return "holds in part" if share > _CHANCE else "fails"


@dataclass(frozen=True)
class Panel:
    """One plot of an experiment's page.

    Attributes:
        title: What is drawn.
        sentence: What was found, against the claim, with figures; printed under the plot.
        draw: Draws it, labels included.
    """

    title: str
    sentence: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Findings:
    """What follows from the rows of an experiment, and from nothing else.

    Attributes:
        figures: Fitted slopes with intervals and the like, as JSON.
        verdicts: One for each claim that the experiment tests.
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
        claim: What is tested.
        source: Where the claim was read.
        cells: What to measure at a scale.
        measure: Measures one cell: a flat dictionary without the cell's own entries, numbers finite. What is random
            comes from `Setting.rng(cell)`.
        conclude: What follows from the rows (each a cell and its measurements), in the order of the cells. Knows
            nothing of the setting, so that a committed summary can be checked against committed rows.
        needs_model: Whether there is nothing to measure without a `Subject`.
    """

    name: str
    title: str
    claim: str
    source: Source
    cells: Callable[[Setting], Sequence[Cell]]
    measure: Callable[[Cell, Setting], Row]
    conclude: Callable[[Sequence[Row]], Findings]
    needs_model: bool = False
