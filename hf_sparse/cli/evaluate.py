"""The steps of an evaluation: check what the user gave, load the model, measure, summarise and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.cli.options import DataOptions, RunOptions
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure import attention_error, perplexity, retrieval
from hf_sparse.measure.methods import Methods
from hf_sparse.measure.retrieval_prompts import make_prompts
from hf_sparse.measure.run import ATTENTION_ERROR, PERPLEXITY, RETRIEVAL, Outcome
from hf_sparse.measure.windows import Window, check_lengths, cut_windows
from hf_sparse.results import ROWS, Record, ResultFile, check_folder, default_folder, is_main_process, provenance
from hf_sparse.share.source import ModelSource, check_config, check_loading, max_positions


@dataclass(frozen=True)
class Evaluation:
    """What was checked before the model is loaded, which happens when it is first used.

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
    run: RunOptions
    folder: Path

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, unpatched."""
        return self.source.model(dtype=self.run.dtype, device_map=self.run.place)

    @cached_property
    def about(self) -> Record:
        """Provenance of every record."""
        return provenance(self.info, self.model, self.run.seed)

    def results(self, methods: Mapping[str, SparseAttentionConfig | None], part: str) -> ResultFile:
        """The file of records in `part` of the folder.

        Raises:
            UserError: if a configuration does not suit the model.
        """
        # What depends on the model (layers, heads) is the same in all of them.
        if config := next(filter(None, methods.values()), None):
            check_config(self.model, config)
        return ResultFile(self.folder / part / ROWS)


def check(
    source: ModelSource,
    command: str,
    data: DataOptions,
    run: RunOptions,
    lengths: Sequence[int],
    targets: int,
    parts: Sequence[str] = (),
) -> Evaluation:
    """Check everything that can be checked without loading the model, cheap things first.

    Args:
        source: The model.
        command: Name of the command, for the default folder.
        data: Which texts, and where in them.
        run: How to run.
        lengths: Input tokens of the windows.
        targets: Predicted tokens of the windows.
        parts: Commands whose results go into subfolders of their names; if there are none, those of `command` go into
            the folder itself.

    Raises:
        UserError: for the first thing that is wrong.
    """
    check_lengths(lengths, targets, max_positions(source.config))
    info, folder = begin(source, command, run, parts)
    documents = data.load(tokens=data.offset + lengths[-1] + 1)
    tokenizer = source.tokenizer()
    windows = cut_windows(documents, tokenizer, lengths, targets, data.offset)
    return Evaluation(source, info, tokenizer, windows, run, folder)


def begin(source: ModelSource, command: str, run: RunOptions, parts: Sequence[str] = ()) -> tuple[Record, Path]:
    """Name and revision of a model that can be patched, and the folder for its results; see `check`.

    Raises:
        UserError: if the model cannot be patched or loaded as `run` says, or the folder cannot take the results.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    check_loading(run.dtype, run.place)
    if not source.support.supported:
        raise UserError(str(source.support))
    info = source.info()
    folder = run.output or default_folder(info["name"], command)
    # Processes that try to write into the same folder at once would be in each other's way.
    if is_main_process():
        for place, part in [(folder / part, part) for part in parts] or [(folder, command)]:
            check_folder(place, part, info)
    return info, folder


def run_perplexity(evaluation: Evaluation, methods: Methods, part: str = "") -> Outcome:
    """Measure perplexity and write the results into `part` of the folder.

    Raises:
        UserError: if a configuration does not suit the model.
    """
    results = evaluation.results(methods, part)
    records = perplexity.evaluate(evaluation.model, evaluation.windows, methods, results, evaluation.about)
    return PERPLEXITY.conclude(records, results, evaluation.run.seed)


def run_attention_error(
    evaluation: Evaluation,
    lengths: Sequence[int],
    methods: Mapping[str, SparseAttentionConfig],
    queries_per_length: int,
    part: str = "",
) -> Outcome:
    """Measure attention errors and write the results into `part` of the folder.

    Raises:
        UserError: if a configuration does not suit the model.
    """
    results = evaluation.results(methods, part)
    windows = [window for window in evaluation.windows if window.length == lengths[-1]]
    records = attention_error.evaluate(
        evaluation.model, windows, lengths, methods, results, evaluation.about, queries_per_length
    )
    return ATTENTION_ERROR.conclude(records, results, evaluation.run.seed)


def run_retrieval(
    evaluation: Evaluation, methods: Methods, tasks: Sequence[str], questions: int, modes: Sequence[str]
) -> Outcome:
    """Measure what is retrieved from texts and write the results.

    Raises:
        UserError: if a configuration does not suit the model, or no prompts can be made (`make_prompts`).
    """
    tokenizer, seed = evaluation.tokenizer, evaluation.run.seed
    prompts = make_prompts(evaluation.windows, tokenizer, tasks, questions, seed, modes)
    results = evaluation.results(methods, "")
    records = retrieval.evaluate(evaluation.model, tokenizer, prompts, methods, results, evaluation.about)
    return RETRIEVAL.conclude(records, results, evaluation.run.seed)
