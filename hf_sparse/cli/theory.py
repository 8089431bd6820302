"""`hf-sparse theory`: the paper's claims as experiments."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse.cli.evaluate import Evaluation, check
from hf_sparse.cli.options import DataOptions, RunOptions, parse_integers
from hf_sparse.errors import UserError
from hf_sparse.measure.windows import check_lengths
from hf_sparse.results import check_folder
from hf_sparse.share.source import ModelSource

if TYPE_CHECKING:
    from hf_sparse.lab.experiment import Setting

SYNTHETIC, TINY = "synthetic", "random-tiny-model"
_LENGTHS = {"small": "256,512", "full": "512,1024,2048,4096"}
_MOST_TARGETS = 512
_LEAST = 64
"""Tokens below which queries see too few keys for the fits of the experiments on models."""


@dataclass(frozen=True)
class TheoryOptions:
    """Which experiments run, on what."""

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


def theory(options: TheoryOptions, run: RunOptions) -> None:
    """The claims about n^C-sparse attention as experiments: which hold, in which norm, for which inputs and models."""
    if find_spec("scipy") is None:
        raise UserError('the theory lab needs scipy: pip install "hf_sparse[theory]"')
    from hf_sparse.lab import run as lab
    from hf_sparse.lab.experiment import Setting

    if options.scale not in _LENGTHS:
        raise UserError(f"scale must be among {', '.join(_LENGTHS)}; got {options.scale!r}")
    if options.text and not options.model:
        raise UserError("--text needs a --model that reads it: random tiny models read random tokens")
    chosen = lab.find_experiments(options.experiment or [])
    synthetic = [experiment for experiment in chosen if not experiment.needs_model]
    on_models = [experiment for experiment in chosen if experiment.needs_model]
    if not options.model and options.scale == "full":
        if options.experiment and on_models:
            raise UserError(f"experiment {on_models[0].name!r} needs --model at full scale")
        on_models = []
    lengths = parse_integers("--lengths", options.lengths or _LENGTHS[options.scale])
    check_lengths(lengths, 1, None)
    if on_models and lengths[0] < _LEAST:
        raise UserError(f"the experiments on models need lengths of {_LEAST} tokens or more; got {lengths[0]}")
    folder = run.output or Path("results/theory")
    if synthetic:
        check_folder(folder / SYNTHETIC, "theory")
    settings = _settings(options, run, lengths, folder) if on_models else {}
    summaries = {}
    if synthetic:
        summaries[SYNTHETIC] = lab.run(synthetic, Setting(options.scale, run.seed), folder / SYNTHETIC)
    for name, load in settings.items():
        summaries[name] = lab.run(on_models, load(), folder / name)
    if run.as_json:
        print(json.dumps(summaries))
    else:
        print_theory(summaries, folder)


def _settings(
    options: TheoryOptions, run: RunOptions, lengths: list[int], folder: Path
) -> dict[str, Callable[[], Setting]]:
    """Loaders of the models with their texts, which are checked, by the name of their folder in `folder`."""
    from hf_sparse.lab.probe import check_layers
    from hf_sparse.lab.tiny import tiny_setting

    if not options.model:
        print("no --model: the experiments on models try a random tiny one", file=sys.stderr)
        check_folder(folder / TINY, "theory")
        return {TINY: partial(tiny_setting, options.scale, run.seed, lengths)}
    data = DataOptions(text=options.text, documents=options.documents)
    found: dict[str, Callable[[], Setting]] = {}
    for model in options.model:
        source = ModelSource.find(model, run.revision)
        name = source.name.rpartition("/")[2].removesuffix(".gguf")
        if name in (SYNTHETIC, *found):
            raise UserError(f"results of {model} would go into the folder {name}, which another part has: run it alone")
        own = replace(run, output=folder / name)
        checked = check(source, "theory", data, own, lengths, min(_MOST_TARGETS, lengths[0]))
        check_layers(source.config)
        found[name] = partial(_load, options.scale, checked)
    return found


def _load(scale: str, evaluation: Evaluation) -> Setting:
    from hf_sparse.lab.experiment import Setting

    return Setting(scale, evaluation.run.seed, evaluation.model, evaluation.windows, evaluation.about)


def print_theory(summaries: dict[str, Any], folder: Path) -> None:
    """Print every verdict with its evidence."""
    for name, summary in summaries.items():
        print(f"== {name}\n")
        for verdict in summary["verdicts"]:
            print(_wrapped(f"{verdict['answer'].upper()}: {verdict['claim']} (read in: {verdict['source']})"))
            for part in ("where", "evidence"):
                print(_wrapped(f"{part}: {verdict[part]}", "    "))
            print()
    print(f"records, summaries, tables and plots: {folder}")


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 110, initial_indent=indent, subsequent_indent=indent + "  ")
