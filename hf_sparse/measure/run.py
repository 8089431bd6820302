"""What a command found: a summary, its tables and its plot, made of records and written beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hf_sparse.measure import (
    attention_error,
    attention_summary,
    attention_tables,
    perplexity,
    perplexity_summary,
    plots,
    retrieval,
    retrieval_plots,
    retrieval_summary,
    retrieval_tables,
)
from hf_sparse.results import Record, ResultFile, Summary, Table, is_main_process, plot_name, text_table, write_summary


@dataclass(frozen=True)
class Outcome:
    """A summary for machines and its tables for people."""

    summary: Summary
    tables: list[Table]

    def __str__(self) -> str:
        return "\n\n".join(text_table(*table) for table in self.tables)


@dataclass(frozen=True)
class Kind:
    """How the records of a command become an outcome.

    Attributes:
        command: Its name.
        summarise: Takes the records and the seed of the bootstrap.
        tables: Takes the summary.
        draw: Draws the summary into a file.
    """

    command: str
    summarise: Callable[[Sequence[Record], int], Summary]
    tables: Callable[[Summary], list[Table]]
    draw: Callable[[Summary, Path], None]

    def conclude(self, records: Sequence[Record], results: ResultFile, seed: int) -> Outcome:
        """The outcome of `records`, which `results` holds, written beside them.

        Raises:
            UserError: naming the file, if records of an earlier run cannot be summed up.
        """
        with results.summed_up():
            summary = self.summarise(records, seed)
            outcome = Outcome(summary, self.tables(summary))
        return write_outcome(outcome, results.path.parent, plot_name(self.command), self.draw)


PERPLEXITY = Kind(
    perplexity.COMMAND, perplexity_summary.summarise, perplexity_summary.all_tables, plots.plot_perplexity
)
ATTENTION_ERROR = Kind(
    attention_error.COMMAND, attention_summary.summarise, attention_tables.all_tables, plots.plot_attention_error
)
RETRIEVAL = Kind(
    retrieval.COMMAND, retrieval_summary.summarise, retrieval_tables.all_tables, retrieval_plots.plot_retrieval
)


def write_outcome(outcome: Outcome, folder: Path, plot: str, draw: Callable[[Summary, Path], None]) -> Outcome:
    """Write `summary.json`, `tables.md` and, if matplotlib is installed, the plot, from the main process.

    Returns:
        `outcome`.
    """
    if is_main_process():
        write_summary(folder, outcome.summary, outcome.tables)
        if find_spec("matplotlib") is None:
            print('no plot is drawn without matplotlib: pip install "hf_sparse[plots]"', file=sys.stderr)
        else:
            draw(outcome.summary, folder / plot)
    return outcome
