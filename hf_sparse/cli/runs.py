"""What the evaluating commands do: check, load, measure, sum up, write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.cli.options import DataOptions, RunOptions
from hf_sparse.errors import UserError
from hf_sparse.measure import attention_error, attention_summary, perplexity, perplexity_summary, plots
from hf_sparse.measure.attention_tables import comparison_cells, error_cells, layer_cells, shape_cells, slope_cells
from hf_sparse.measure.data import load_documents
from hf_sparse.measure.perplexity_tables import method_cells, overview_cells, perplexity_cells, verdict_cells
from hf_sparse.measure.processes import process_state
from hf_sparse.measure.tables import Table, markdown_table, text_table
from hf_sparse.measure.windows import Window, check_lengths, cut_windows
from hf_sparse.results import ROWS, SUMMARY, TABLES, ResultFile, Row, check_folder, provenance, write_json
from hf_sparse.share.source import ModelInfo, ModelSource, check_loading

# Enough rows of a data set are joined for a text of so many characters a token; what falls short is refused.
_CHARS_PER_TOKEN = 8


@dataclass(frozen=True)
class Ready:
    """What an evaluation starts from.

    Attributes:
        model: The model, unpatched.
        tokenizer: Its tokenizer.
        windows: The windows of every document.
        about: Provenance of every row.
        folder: Where results go.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: list[Window]
    about: Row
    folder: Path


@dataclass(frozen=True)
class Checked:
    """An evaluation in which everything that a user can get wrong was checked, but what only loading shows.

    Attributes:
        source: The model.
        info: What identifies it.
        tokenizer: Its tokenizer.
        windows: The windows of every document.
        run: How to run.
        folder: Where results go.
    """

    source: ModelSource
    info: ModelInfo
    tokenizer: PreTrainedTokenizerBase
    windows: list[Window]
    run: RunOptions
    folder: Path

    def load(self) -> Ready:
        """Load the model.

        Raises:
            UserError: if it cannot be read.
        """
        model = self.source.model(dtype=self.run.dtype, device_map=_device(self.run))
        return Ready(
            model, self.tokenizer, self.windows, provenance(self.info.to_dict(), model, self.run.seed), self.folder
        )


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found: a summary for machines and its tables for people."""

    summary: dict[str, Any]
    tables: list[Table]

    def __str__(self) -> str:
        return "\n\n".join(text_table(*table) for table in self.tables)


def check(
    source: ModelSource,
    command: str,
    data: DataOptions,
    run: RunOptions,
    lengths: Sequence[int],
    targets: int,
    parts: Sequence[str] = (),
) -> Checked:
    """Check everything that a user can get wrong, the cheap first; the model is not loaded.

    Args:
        source: The model.
        command: Name of the command, for the default folder.
        data: Which texts, and where in them.
        run: How to run.
        lengths: Input tokens of the windows.
        targets: Predicted tokens of the windows.
        parts: Commands whose results go into folders of their names in the folder; `command` itself, into the folder,
            if there are none.

    Raises:
        UserError: for whatever is wrong.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    check_loading(run.dtype, _device(run))
    info = source.info()
    check_lengths(lengths, targets, info.max_positions)
    if not source.support.supported:
        raise UserError(str(source.support))
    stem = info.name.rpartition("/")[2].removesuffix(".gguf")
    folder = run.output or Path("results") / f"{stem}-{command}"
    for place, part in [(folder / part, part) for part in parts] or [(folder, command)]:
        # Processes that try the same folder at once would be in each other's way.
        if is_main_process():
            check_folder(place, part, info.to_dict())
    characters = _CHARS_PER_TOKEN * (data.offset + lengths[-1] + 1)
    documents = load_documents(data.text or [], count=data.documents, column=data.column, min_chars=characters)
    tokenizer = source.tokenizer()
    windows = cut_windows(documents, tokenizer, lengths, targets, data.offset)
    return Checked(source, info, tokenizer, windows, run, folder)


def run_perplexity(ready: Ready, methods: perplexity.Methods) -> Outcome:
    """Measure perplexity and write the results; see `evaluation.perplexity`.

    Raises:
        UserError: if a configuration does not suit the model.
    """
    for method in methods.values():
        try:
            with perplexity.applied(ready.model, method):
                pass
        except ValueError as error:
            raise UserError(str(error)) from error
    results = ResultFile(ready.folder / ROWS)
    rows = perplexity.evaluate(ready.model, ready.windows, methods, results, ready.about)
    with results.summed_up():
        summary = perplexity_summary.summarise(rows, ready.about["seed"])
        tables = [cells(summary) for cells in (perplexity_cells, method_cells, verdict_cells, overview_cells)]
    outcome = Outcome(summary, [table for table in tables if table[1]])
    write_outcome(outcome, ready.folder, "perplexity.png", plots.plot_perplexity)
    return outcome


def run_attention_error(
    ready: Ready, lengths: Sequence[int], methods: attention_error.Methods, rows_per_length: int
) -> Outcome:
    """Measure attention errors and write the results; see `evaluation.attention_error`."""
    windows = [window for window in ready.windows if window.length == lengths[-1]]
    results = ResultFile(ready.folder / ROWS)
    rows = attention_error.evaluate(ready.model, windows, lengths, methods, results, ready.about, rows_per_length)
    shown = attention_error.CALIBRATED if attention_error.CALIBRATED in methods else "grouped"
    with results.summed_up():
        summary = attention_summary.summarise(rows, ready.about["seed"])
        tables = [cells(summary) for cells in (error_cells, shape_cells, slope_cells, comparison_cells)]
        tables.append(layer_cells(summary, shown))
    outcome = Outcome(summary, tables)
    write_outcome(outcome, ready.folder, "attention_error.png", plots.plot_attention_error)
    return outcome


def is_main_process() -> bool:
    """Whether this process is the one that prints."""
    return bool(process_state().is_main_process)


def _device(run: RunOptions) -> str:
    return run.device or str(process_state().device)


def write_outcome(outcome: Outcome, folder: Path, plot: str, draw: Any) -> None:
    """Write `summary.json`, `tables.md` and, if matplotlib is there, the plot, from the main process."""
    if not is_main_process():
        return
    write_json(folder / SUMMARY, outcome.summary)
    markdown = "\n\n".join(markdown_table(*table) for table in outcome.tables)
    (folder / TABLES).write_text(markdown + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        print('no plot is drawn without matplotlib: pip install "hf_sparse[plots]"', file=sys.stderr)
    else:
        draw(outcome.summary, folder / plot)
