"""The command `hf-sparse calibrate`: a law for every head, written as a configuration that `patch` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from hf_sparse.calibration.calibrate import Calibration, run_calibration
from hf_sparse.calibration.tables import calibration_tables
from hf_sparse.calibration.target import Target
from hf_sparse.calibration.texts import LONGEST, split
from hf_sparse.cli.options import Documents, KeyOptions, RunOptions, TextOptions
from hf_sparse.errors import UserError
from hf_sparse.machine import process_state
from hf_sparse.measure.data import load_documents
from hf_sparse.measure.run import Outcome
from hf_sparse.results import CALIBRATE, TABLES, check_folder
from hf_sparse.share.source import ModelSource, check_loading
from hf_sparse.tables import markdown_table


@dataclass(frozen=True)
class CalibrationOptions(KeyOptions, TextOptions):
    """What to fit laws to, and for what."""

    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts to check laws on, named like --text. May be repeated.", show_default="a quarter of --text"
        ),
    ] = None
    documents: Documents = 8
    target: Annotated[
        str, typer.Option(help="METRIC=VALUE[@LENGTH] with the metric density, output_error or perplexity_ratio.")
    ] = "density=0.15"
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each text.", show_default=f"as many as all have, up to {LONGEST}"),
    ] = None
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Accept a target at more tokens than laws are fitted to.")
    ] = False
    selector: Annotated[str, typer.Option(help="grouped, topk, window or FILE.py:CLASS.")] = "grouped"
    dense_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers left dense, such as 0,1, besides sliding-window ones.", show_default="those that need it"
        ),
    ] = None


def run_calibrate(name: str, options: CalibrationOptions, run: RunOptions) -> tuple[Calibration, Outcome, Path]:
    """Check all arguments, the cheap first, then load the model, calibrate it and write the result.

    Args:
        name: The model.
        options: What to fit laws to, and for what.
        run: How to run.

    Returns:
        The result, the same as tables, and the folder with all files.

    Raises:
        UserError: for a user's mistake.
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
    folder = run.output or Path("results") / f"{info['name'].rpartition('/')[2].removesuffix('.gguf')}-{CALIBRATE}"
    check_folder(folder, CALIBRATE, info)
    check_loading(run.dtype, device := run.device or str(process_state().device))
    tokens = 1 + max(options.length or LONGEST, target.length or 0)
    texts, held_out = (
        load_documents(names, count=options.documents, column=options.column, tokens=tokens)
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
    outcome = Outcome(result.to_dict(), calibration_tables(result))
    markdown = "\n\n".join(markdown_table(*table) for table in outcome.tables)
    (folder / TABLES).write_text(markdown + "\n", encoding="utf-8")
    return result, outcome, folder
