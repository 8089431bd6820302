"""`hf-sparse theory`: the paper's claims as experiments."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse.cli.options import DataOptions, RunOptions, parse_integers
from hf_sparse.cli.runs import prepare
from hf_sparse.errors import UserError
from hf_sparse.evaluation.models import ModelSource
from hf_sparse.evaluation.windows import check_lengths

if TYPE_CHECKING:
    from hf_sparse.theory.experiment import Subject

SYNTHETIC = "synthetic"
_LENGTHS = {"small": "256,512", "full": "512,1024,2048,4096"}
_MOST_TARGETS = 512
_PAGE = 110


@dataclass(frozen=True)
class TheoryOptions:
    """What the lab runs."""

    scale: Annotated[str, typer.Option(help="small: a check of minutes; full: figures to quote.")] = "small"
    experiment: Annotated[
        list[str] | None, typer.Option(help="Name of an experiment. May be repeated.", show_default="all")
    ] = None
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Hub id, folder or .gguf file for the experiments on models. May be repeated.",
            show_default="at small scale a random tiny model, at full scale none",
        ),
    ] = None
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="What the models read, as for the other commands. May be repeated.",
            show_default="the language reference in Python's standard library",
        ),
    ] = None
    documents: Annotated[int, typer.Option(min=1, help="Documents that the models read.")] = 4
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens that the models read, rising.",
            show_default="; ".join(f"{lengths} at {scale} scale" for scale, lengths in _LENGTHS.items()),
        ),
    ] = None

    def lengths_at_scale(self) -> list[int]:
        """The lengths as numbers."""
        return parse_integers("--lengths", self.lengths or _LENGTHS[self.scale])


def run_theory(options: TheoryOptions, run: RunOptions) -> tuple[dict[str, Any], Path]:
    """Run the experiments: the synthetic ones, and those on models for each model.

    Args:
        options: Which.
        run: How.

    Returns:
        The summary of each part by its name, `synthetic` or that of a model, and the folder with a folder for each.

    Raises:
        UserError: for whatever is wrong, before anything is measured.
    """
    if find_spec("scipy") is None:
        raise UserError('the theory lab needs scipy: pip install "hf_sparse[theory]"')
    from hf_sparse.theory import lab  # needs scipy
    from hf_sparse.theory.experiment import SCALES, Setting
    from hf_sparse.theory.model_experiments import EXPERIMENTS

    if options.scale not in SCALES:
        raise UserError(f"scale must be among {', '.join(SCALES)}; got {options.scale!r}")
    chosen = lab.find_experiments(options.experiment or [], (*lab.SYNTHETIC, *EXPERIMENTS))
    synthetic = [experiment for experiment in chosen if not experiment.needs_model]
    on_models = [experiment for experiment in chosen if experiment.needs_model]
    without_model = not options.model and options.scale == "full"
    if without_model and options.experiment and on_models:
        raise UserError(f"experiment {on_models[0].name!r} needs --model at full scale")
    check_lengths(options.lengths_at_scale(), 1, None)
    for name in options.model or []:
        ModelSource.find(name, run.revision)
    folder = run.output or Path("results/theory")
    summaries = {}
    if synthetic:
        setting = Setting(options.scale, run.seed)  # type: ignore[arg-type]
        summaries[SYNTHETIC] = lab.run(synthetic, setting, folder / SYNTHETIC)
    if on_models and not without_model:
        for name, subject in _subjects(options, run):
            setting = Setting(options.scale, run.seed, subject)  # type: ignore[arg-type]
            summaries[name] = lab.run(on_models, setting, folder / name)
    return summaries, folder


def print_theory(summaries: dict[str, Any], folder: Path) -> None:
    """Print every verdict with its evidence."""
    for name, summary in summaries.items():
        print(f"== {name}\n")
        for verdict in summary["verdicts"]:
            print(_wrapped(f"{verdict['answer'].upper()}: {verdict['claim']} (read in: {verdict['source']})", ""))
            print(_wrapped(f"where: {verdict['where']}", "    "))
            print(_wrapped(f"evidence: {verdict['evidence']}", "    "))
            print()
    print(f"rows, summaries, tables and plots: {folder}")


def _subjects(options: TheoryOptions, run: RunOptions) -> Iterator[tuple[str, Subject]]:
    """The models with their texts, one loaded at a time, each with the name of its folder."""
    from hf_sparse.theory.experiment import Subject
    from hf_sparse.theory.subject import tiny_subject

    lengths = options.lengths_at_scale()
    if not options.model:
        print("no --model: the experiments on models try a random tiny one", file=sys.stderr)
        yield "random-tiny-model", tiny_subject(run.seed, lengths)
        return
    data = DataOptions(text=options.text, documents=options.documents)
    for name in options.model:
        source = ModelSource.find(name, run.revision)
        ready = prepare(source, "theory", data, run, lengths, min(_MOST_TARGETS, lengths[0]))
        folder = ready.about["model"]["name"].rpartition("/")[2].removesuffix(".gguf")
        yield folder, Subject(ready.model, ready.windows, ready.about)


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, _PAGE, initial_indent=indent, subsequent_indent=indent + "  ")
