"""`hf-sparse calibrate`: a law for every head, written as a configuration that `patch` takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from hf_sparse.calibration.calibrate import Calibration, run_calibration
from hf_sparse.calibration.target import Target
from hf_sparse.calibration.texts import LONGEST, split
from hf_sparse.cli.options import DenseBelow, MinKeys, RecentKeys, RunOptions, SinkKeys, SparseOptions
from hf_sparse.cli.runs import Outcome
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.data import load_documents
from hf_sparse.measure.perplexity_tables import perplexity_cells
from hf_sparse.measure.processes import process_state
from hf_sparse.measure.tables import Table, markdown_table
from hf_sparse.results import CALIBRATE, TABLES, check_folder
from hf_sparse.share.source import ModelSource, check_loading

# Enough rows of a data set are joined for a text of so many characters a token.
_CHARS_PER_TOKEN = 8

_TEXT = "Text file, folder of .txt and .md, .parquet file, or Hub data set id[:config][@split]. May be repeated."


@dataclass(frozen=True)
class CalibrationOptions:
    """What to fit laws to, and for what."""

    text: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What laws are fitted to. {_TEXT}", show_default="the language reference in Python's standard library"
        ),
    ] = None
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="What they are checked on, named like --text. May be repeated.", show_default="a quarter of --text"
        ),
    ] = None
    documents: Annotated[
        int, typer.Option(min=1, help="Documents taken from a data set, parquet file or the default text.")
    ] = 8
    column: Annotated[str, typer.Option(help="Column of a data set that holds the text.")] = "text"
    target: Annotated[
        str, typer.Option(help="METRIC=VALUE[@LENGTH] with the metric density, output_error or perplexity_ratio.")
    ] = "density=0.15"
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each text.", show_default=f"what all texts have, up to {LONGEST}"),
    ] = None
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Accept a target at more tokens than laws are fitted to.")
    ] = False
    selector: Annotated[str, typer.Option(help="grouped, topk or window.")] = "grouped"
    min_keys: MinKeys = SparseAttentionConfig.min_keys
    sink_keys: SinkKeys = SparseAttentionConfig.sink_keys
    recent_keys: RecentKeys = SparseAttentionConfig.recent_keys
    dense_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers left dense, such as 0,1, besides sliding-window ones.", show_default="those that need it"
        ),
    ] = None
    dense_below: DenseBelow = SparseAttentionConfig.dense_below

    def config(self) -> SparseAttentionConfig:
        """Everything but the laws.

        Raises:
            UserError: if a value is not allowed.
        """
        names = ("min_keys", "sink_keys", "recent_keys", "dense_layers", "dense_below")
        config = SparseOptions(**{name: getattr(self, name) for name in names}).config()
        try:
            return replace(config, selector=self.selector)
        except ValueError as error:
            raise UserError(str(error)) from error


def run_calibrate(name: str, options: CalibrationOptions, run: RunOptions) -> tuple[Calibration, Outcome, Path]:
    """Check everything that a user can get wrong, the cheap first, load the model, calibrate it, and write the result.

    Args:
        name: The model.
        options: What to fit laws to, and for what.
        run: How to run.

    Returns:
        What was found, the same as tables, and the folder with all files.

    Raises:
        UserError: for whatever is wrong.
    """
    if process_state().num_processes > 1:
        raise UserError("calibrate runs in one process: leave the launcher out")
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    target, config = Target.parse(options.target), options.config()
    source = ModelSource.find(name, run.revision)
    info = source.info()
    if not source.support.supported:
        raise UserError(str(source.support))
    folder = run.output or Path("results") / f"{info.name.rpartition('/')[2].removesuffix('.gguf')}-{CALIBRATE}"
    check_folder(folder, CALIBRATE, info.to_dict())
    check_loading(run.dtype, device := run.device or str(process_state().device))
    characters = _CHARS_PER_TOKEN * (1 + max(options.length or LONGEST, target.length or 0))
    texts, held_out = (
        load_documents(names, count=options.documents, column=options.column, min_chars=characters)
        if names is not None
        else None
        for names in (options.text or [], options.held_out)
    )
    split(texts or [], held_out)
    tokenizer = source.tokenizer()
    model = source.model(dtype=run.dtype, device_map=device)
    result = run_calibration(
        model,
        tokenizer,
        texts or [],
        target,
        config=config,
        held_out=held_out,
        length=options.length,
        folder=folder,
        extrapolate=options.extrapolate,
        seed=run.seed,
        info=info,
    )
    tables = [target_cells(result), perplexity_cells(result.check), family_cells(result), law_cells(result)]
    outcome = Outcome(result.to_dict(), [table for table in tables if table[1]])
    markdown = "\n\n".join(markdown_table(*table) for table in outcome.tables)
    (folder / TABLES).write_text(markdown + "\n", encoding="utf-8")
    return result, outcome, folder


def target_cells(result: Calibration) -> Table:
    """What was to be reached, and what was."""
    record = result.config.calibration
    assert record is not None
    header = ["target", "reached", "met", "density", "at tokens", "fitted to"]
    line = [f"{result.reached:.4g}", "yes" if result.met else "no", f"{result.density:.3f}"]
    return header, [[str(result.target), *line, str(record.reached_at), str(record.fitted_to)]]


def family_cells(result: Calibration) -> Table:
    """Shapes of law by what they cost on documents left out of the fit: lost nats, and keys at their price."""
    power = result.families["power"]
    header = ["law, on documents left out", "cost of a head (nats a token)", "against power"]
    cells = [[name, f"{cost:.3g}", f"{cost / power:.3f}" if power else "-"] for name, cost in result.families.items()]
    return header, cells


def law_cells(result: Calibration) -> Table:
    """Quartiles of the heads' alphas and exponents, and how many exponents are surely not the default one."""
    record, laws = result.config.calibration, result.config.per_head or {}
    heads = [law for layer in laws.values() for law in layer]
    if record is None or not heads:
        return [], []
    rows = [interval for layer in (record.intervals or {}).values() for interval in layer]
    default = SparseAttentionConfig.exponent
    certain = sum(not low <= default <= high for _, _, low, high in rows)
    cells = []
    for name, values in zip(("alpha", "exponent"), zip(*heads, strict=True), strict=True):
        quartiles = [f"{value:.3g}" for value in np.quantile(values, [0.25, 0.5, 0.75])]
        cells.append([name, *quartiles, f"{certain} of {len(rows)}" if name == "exponent" else "-"])
    header = ["law of a head", "first quartile", "median", "third quartile", f"interval excludes {default:g}"]
    return header, cells
