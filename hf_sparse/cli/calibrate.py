"""The command `hf-sparse calibrate`: a law for every head, written as a configuration that `patch` takes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from hf_sparse.calibration.calibrate import run_calibration
from hf_sparse.calibration.tables import calibration_tables
from hf_sparse.calibration.target import Target
from hf_sparse.calibration.texts import LONGEST, split
from hf_sparse.cli.evaluate import begin
from hf_sparse.cli.options import Documents, KeyOptions, Model, RunOptions, TextOptions
from hf_sparse.errors import UserError
from hf_sparse.measure.run import Outcome
from hf_sparse.results import CALIBRATE, process_state, write_tables
from hf_sparse.schema import TARGETS
from hf_sparse.share.source import ModelSource


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
        str, typer.Option(help=f"METRIC=VALUE[@LENGTH] with one of the metrics {', '.join(TARGETS)}.")
    ] = "density=0.15"
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each text.", show_default=f"as many as all have, up to {LONGEST}"),
    ] = None
    lookups: Annotated[
        bool,
        typer.Option("--lookups", help="Fit to each text with notes in it, too, that are repeated later: look-ups."),
    ] = False
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


def calibrate(model: Model, options: CalibrationOptions, run: RunOptions) -> None:
    """Fit a law for every head to a target, and check it on held-out texts; exit code 1 if the target is not met."""
    if process_state().num_processes > 1:
        raise UserError("calibrate runs in one process: leave the launcher out")
    target, config = Target.parse(options.target), options.config()
    source = ModelSource.find(model, run.revision)
    info, folder = begin(source, CALIBRATE, run)
    tokens = 1 + max(options.length or LONGEST, target.length or 0)
    texts = options.load(tokens)
    held_out = None if options.held_out is None else replace(options, text=options.held_out).load(tokens)
    split(texts, held_out)
    tokenizer = source.tokenizer()
    result = run_calibration(
        source.model(dtype=run.dtype, device_map=run.place),
        tokenizer,
        texts,
        target,
        config=config,
        held_out=held_out,
        length=options.length,
        lookups=options.lookups,
        folder=folder,
        extrapolate=options.extrapolate,
        seed=run.seed,
        info=info,
    )
    outcome = Outcome(result.to_dict(), calibration_tables(result))
    write_tables(folder, outcome.tables)
    if run.as_json:
        print(json.dumps(outcome.summary))
    else:
        print(f"{outcome}\n\nintervals: 95 %, bootstrap over {result.check['resampled']}")
        policy = "no sparse_config.json, which holds no code" if config.code else "sparse_config.json"
        print(f"measurements, calibration.json and {policy}: {folder}")
    raise typer.Exit(0 if result.met else 1)
