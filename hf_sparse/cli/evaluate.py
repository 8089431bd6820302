"""`Evaluation`: what a command that measures a model was given, checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.cli.options import DataOptions, RunOptions
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.windows import Window, check_lengths, cut_windows
from hf_sparse.results import ROWS, Record, ResultFile, provenance
from hf_sparse.share.source import ModelSource, check_config, max_positions


@dataclass(frozen=True)
class Evaluation:
    """What was checked before the model is loaded, which happens when it is first used.

    Attributes:
        info: Name and revision of the model.
        windows: One for each document and length.
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

    def results(self, methods: Mapping[str, SparseAttentionConfig | None], part: str = "") -> ResultFile:
        """The file of records in `part` of the folder; a configuration that does not suit the model is refused."""
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
        command: For the default folder.
        data: Which texts, and where in them.
        run: How to run.
        lengths: Input tokens of the windows.
        targets: Predicted tokens of the windows.
        parts: Commands whose results go into subfolders of their names; if there are none, those of `command` go into
            the folder itself.
    """
    check_lengths(lengths, targets, max_positions(source.config))
    info, folder = begin(source, command, run, parts)
    documents = data.load(tokens=data.offset + lengths[-1] + 1)
    tokenizer = source.tokenizer()
    windows = cut_windows(documents, tokenizer, lengths, targets, data.offset)
    return Evaluation(source, info, tokenizer, windows, run, folder)


def begin(source: ModelSource, command: str, run: RunOptions, parts: Sequence[str] = ()) -> tuple[Record, Path]:
    """Name and revision of a model that can be patched and loaded, and the folder for its results; see `check`."""
    run.prepare()
    if not source.support.supported:
        raise UserError(str(source.support))
    info = source.info()
    return info, run.folder(info, command, parts)
