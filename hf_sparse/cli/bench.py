"""`hf-sparse bench`: times of sparse and dense attention side by side, and the length from which sparse is faster."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import typer

from hf_sparse.bench.plot import plot_bench
from hf_sparse.bench.run import evaluate, loaded, with_random_weights
from hf_sparse.bench.shapes import SHAPES, parse_shape
from hf_sparse.bench.summary import summarise
from hf_sparse.bench.tables import bench_tables
from hf_sparse.bench.tasks import COMMAND, FLEX, LAYER_TASKS, OPTIONAL, TASKS, BenchSettings, task_lengths
from hf_sparse.bench.timing import Rounds
from hf_sparse.cli.evaluate import begin
from hf_sparse.cli.options import Policy, RunOptions, SparseOptions, parse_integers, read_policy
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.run import Kind
from hf_sparse.results import ROWS, ResultFile, Summary, find_device
from hf_sparse.selectors import SELECTORS, parse_selector
from hf_sparse.share.source import ModelSource, max_positions

_DEFAULT_SHAPE, _DEFAULT_LAYERS = "smollm2-135m", 2
_LENGTHS_HELP = "{}; none to leave it out."

BENCH = Kind(COMMAND, lambda records, _: summarise(records), bench_tables, plot_bench)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often."""

    shape: Annotated[
        str | None,
        typer.Option(
            help=f"Without a MODEL: {', '.join(SHAPES)}, or heads/kv-heads/head-dim.", show_default=_DEFAULT_SHAPE
        ),
    ] = None
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Without a MODEL: layers of random weights.", show_default=str(_DEFAULT_LAYERS)),
    ] = None
    decode: Annotated[
        str | None, typer.Option(help=_LENGTHS_HELP.format("One layer: cached keys"), show_default="1024 to 262144")
    ] = None
    prefill: Annotated[
        str | None, typer.Option(help=_LENGTHS_HELP.format("One layer: queries and keys"), show_default="1024 to 32768")
    ] = None
    cached: Annotated[
        str | None,
        typer.Option(help=_LENGTHS_HELP.format("Model: cached tokens before new ones"), show_default="8192 to 131072"),
    ] = None
    generate: Annotated[
        str | None,
        typer.Option(help=_LENGTHS_HELP.format("Model: tokens of the prompt"), show_default="8192, 32768"),
    ] = None
    padded: Annotated[
        str | None,
        typer.Option(help=_LENGTHS_HELP.format("Model: the same, behind a pad token"), show_default="none"),
    ] = None
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16
    repeats: Annotated[int, typer.Option(min=1, help="Fewest rounds of a measurement.")] = 3
    seconds: Annotated[float, typer.Option(min=0, help="Seconds after which no other round begins.")] = 5.0
    leave_out: Annotated[str, typer.Option(help=f"Dense methods not to measure: some of {', '.join(OPTIONAL)}.")] = ""
    selector: Annotated[str, typer.Option(help=f"{', '.join(SELECTORS)}, or file.py:ClassName.")] = "grouped"
    text: Annotated[
        str | None,
        typer.Option(help="With a MODEL: text to read; see perplexity.", show_default="Python's language reference"),
    ] = None
    policy: Policy = None
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Model: also lossless generation, and dense with the cache it uses.")
    ] = False
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Model, after cached tokens: also under torch.compile, dense and sparse.")
    ] = False
    quick: Annotated[bool, typer.Option("--quick", help="Short lengths, nothing compiled: under two minutes.")] = False

    def settings(self, config: SparseAttentionConfig, seed: int, max_positions: int | None = None) -> BenchSettings:
        """The settings of the run, checked: a selector that is given goes before that of `config`."""
        lengths = {}
        for task in TASKS:
            text = getattr(self, task)
            given = [] if text == "none" else None if text is None else parse_integers(f"--{task}", text)
            lengths[task] = task_lengths(task, given, self.new_tokens, max_positions, quick=self.quick)
        left_out = {name.strip() for name in self.leave_out.split(",") if name.strip()}
        if self.quick:
            left_out.add(FLEX)
        selector = parse_selector(self.selector)
        if selector != SparseAttentionConfig.selector:
            config = replace(config, selector=selector)
        rounds = Rounds(self.repeats, self.seconds)
        options = (frozenset(left_out), rounds, seed, self.lossless, self.compiled)
        return BenchSettings(lengths, config, self.new_tokens, *options)


def bench(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder or .gguf file.", show_default="random weights of --shape")
    ] = None,
    *,
    options: BenchOptions,
    run: RunOptions,
    sparse: SparseOptions,
) -> None:
    """Time sparse beside dense attention, in one layer and in generation; from which length is it faster?"""
    _refuse_unused(model, options, run)
    run.prepare()
    if model is None:
        settings = options.settings(sparse.config(), run.seed)
        shape, device = options.shape or _DEFAULT_SHAPE, find_device(run.place)
        part = parse_shape(shape).part(options.layers or _DEFAULT_LAYERS)
        name = shape.replace("/", "-")
        folder = run.folder({"name": name}, COMMAND)
        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        dtype = usual if run.dtype == "auto" else getattr(torch, run.dtype)
        measured = with_random_weights(settings, name, part, dtype, device)
    else:
        source = ModelSource.find(model, run.revision)
        _, folder = begin(source, COMMAND, run)
        config = sparse.config(read_policy(options.policy, source.policy))
        settings = options.settings(config, run.seed, max_positions(source.config))
        measured = loaded(settings, source, options.text, run.dtype, run.place)
    results = ResultFile(folder / ROWS)
    records = evaluate(measured, results)
    outcome = BENCH.conclude(records, results, run.seed)
    summary = outcome.summary
    print(json.dumps(summary) if run.as_json else outcome)
    if "dense_below" in summary and not run.as_json:
        print(f"\nhf_sparse.patch(model, dense_below={summary['dense_below']})  # {_comment(summary)}")


def _comment(summary: Summary) -> str:
    slower = [task for task in LAYER_TASKS if summary["break_even"][task]["length"] is None]
    return (
        f"slower at the longest length measured: {', '.join(slower)}" if slower else "dense where that is faster here"
    )


def _refuse_unused(name: str | None, options: BenchOptions, run: RunOptions) -> None:
    """Refuse options that would change nothing."""
    of_a_model = {"policy": options.policy, "text": options.text, "revision": run.revision}
    of_a_shape = {"shape": options.shape, "layers": options.layers}
    rule = "needs a MODEL" if name is None else f"makes a model: leave it out with {name}"
    for option, value in (of_a_model if name is None else of_a_shape).items():
        if value is not None:
            raise UserError(f"--{option} {rule}")
