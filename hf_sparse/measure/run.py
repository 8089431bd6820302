"""The steps of an evaluation: check what the user gave, load the model, measure, summarise and write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.machine import is_main_process, process_state
from hf_sparse.measure import (
    attention_error,
    attention_summary,
    attention_tables,
    perplexity,
    perplexity_summary,
    perplexity_tables,
    plots,
    retrieval,
    retrieval_summary,
)
from hf_sparse.measure.data import load_documents
from hf_sparse.measure.methods import Methods
from hf_sparse.measure.windows import Window, check_lengths, cut_windows
from hf_sparse.results import (
    ROWS,
    Record,
    ResultFile,
    Summary,
    check_folder,
    default_folder,
    provenance,
    write_summary,
)
from hf_sparse.share.source import ModelSource, check_config, check_loading, max_positions
from hf_sparse.tables import Table, text_table


@dataclass(frozen=True)
class Texts:
    """Which tokens are evaluated.

    Attributes:
        text: Sources, as for `load_documents`.
        documents: Documents taken from each.
        column: Column of a data set that holds the text.
        offset: Tokens left out at the start of each document.
    """

    text: list[str] | None = None
    documents: int = 4
    column: str = "text"
    offset: int = 0


@dataclass(frozen=True)
class Run:
    """How an evaluation runs.

    Attributes:
        dtype: Of the model; see `check_loading`.
        device: Of the model; `None` for the best there is.
        threads: CPU threads; `None` for PyTorch's own choice.
        seed: Of everything random.
        output: Folder of the results; `None` for `default_folder`.
    """

    dtype: str = "auto"
    device: str | None = None
    threads: int | None = None
    seed: int = 0
    output: Path | None = None


@dataclass(frozen=True)
class Ready:
    """What an evaluation starts from.

    Attributes:
        model: The model, unpatched.
        tokenizer: Its tokenizer.
        windows: One window for each document and length.
        about: Provenance of every record.
        folder: Where results go.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: list[Window]
    about: Record
    folder: Path


@dataclass(frozen=True)
class Checked:
    """An evaluation whose arguments were checked as far as that is possible before the model is loaded.

    Attributes:
        source: The model.
        info: Its name and revision.
        tokenizer: Its tokenizer.
        windows: One window for each document and length.
        run: How to run.
        folder: Where results go.
    """

    source: ModelSource
    info: Record
    tokenizer: PreTrainedTokenizerBase
    windows: list[Window]
    run: Run
    folder: Path

    def load(self) -> Ready:
        """Load the model.

        Raises:
            UserError: if it cannot be read.
        """
        model = self.source.model(dtype=self.run.dtype, device_map=_device(self.run))
        about = provenance(self.info, model, self.run.seed)
        return Ready(model, self.tokenizer, self.windows, about, self.folder)


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found: a summary for machines and its tables for people."""

    summary: Summary
    tables: list[Table]

    def __str__(self) -> str:
        return "\n\n".join(text_table(*table) for table in self.tables)


def check(
    source: ModelSource,
    command: str,
    texts: Texts,
    run: Run,
    lengths: Sequence[int],
    targets: int,
    parts: Sequence[str] = (),
) -> Checked:
    """Check everything that can be checked without loading the model, cheap things first.

    Args:
        source: The model.
        command: Name of the command, for the default folder.
        texts: Which texts, and where in them.
        run: How to run.
        lengths: Input tokens of the windows.
        targets: Predicted tokens of the windows.
        parts: Commands whose results go into subfolders of their names; if there are none, those of `command` go into
            the folder itself.

    Raises:
        UserError: for the first thing that is wrong.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    check_loading(run.dtype, _device(run))
    check_lengths(lengths, targets, max_positions(source.config))
    if not source.support.supported:
        raise UserError(str(source.support))
    info = source.info()
    folder = run.output or default_folder(info["name"], command)
    # Processes that try to write into the same folder at once would be in each other's way.
    if is_main_process():
        for place, part in [(folder / part, part) for part in parts] or [(folder, command)]:
            check_folder(place, part, info)
    tokens = texts.offset + lengths[-1] + 1
    documents = load_documents(texts.text or [], count=texts.documents, column=texts.column, tokens=tokens)
    tokenizer = source.tokenizer()
    windows = cut_windows(documents, tokenizer, lengths, targets, texts.offset)
    return Checked(source, info, tokenizer, windows, run, folder)


def run_perplexity(ready: Ready, methods: Methods) -> Outcome:
    """Measure perplexity and write the results.

    Raises:
        UserError: if a configuration does not suit the model.
    """
    _check_methods(ready.model, methods)
    results = ResultFile(ready.folder / ROWS)
    records = perplexity.evaluate(ready.model, ready.windows, methods, results, ready.about)
    with results.summed_up():
        summary = perplexity_summary.summarise(records, ready.about["seed"])
        tables = perplexity_tables.all_tables(summary)
    return write_outcome(Outcome(summary, tables), ready.folder, "perplexity.png", plots.plot_perplexity)


def run_attention_error(
    ready: Ready, lengths: Sequence[int], methods: Mapping[str, SparseAttentionConfig], rows_per_length: int
) -> Outcome:
    """Measure attention errors and write the results.

    Raises:
        UserError: if a configuration does not suit the model.
    """
    _check_methods(ready.model, methods)
    windows = [window for window in ready.windows if window.length == lengths[-1]]
    results = ResultFile(ready.folder / ROWS)
    records = attention_error.evaluate(ready.model, windows, lengths, methods, results, ready.about, rows_per_length)
    with results.summed_up():
        summary = attention_summary.summarise(records, ready.about["seed"])
        tables = attention_tables.all_tables(summary)
    return write_outcome(Outcome(summary, tables), ready.folder, "attention_error.png", plots.plot_attention_error)


def run_retrieval(ready: Ready, methods: Methods, codes: int) -> Outcome:
    """Measure how often codes are found again and write the results.

    Raises:
        UserError: if a configuration does not suit the model, or a length leaves no room for the codes.
    """
    _check_methods(ready.model, methods)
    prompts = retrieval.make_prompts(ready.windows, ready.tokenizer, codes, ready.about["seed"])
    results = ResultFile(ready.folder / ROWS)
    records = retrieval.evaluate(ready.model, ready.tokenizer, prompts, methods, results, ready.about)
    with results.summed_up():
        summary = retrieval_summary.summarise(records, ready.about["seed"])
        tables = retrieval_summary.all_tables(summary)
    return write_outcome(Outcome(summary, tables), ready.folder, "retrieval.png", plots.plot_retrieval)


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


def _check_methods(model: PreTrainedModel, methods: Mapping[str, SparseAttentionConfig | None]) -> None:
    # What depends on the model (layers, heads) is the same in all of them.
    if config := next(filter(None, methods.values()), None):
        check_config(model, config)


def _device(run: Run) -> str:
    return run.device or str(process_state().device)
