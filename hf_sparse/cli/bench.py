"""`hf-sparse bench`: how fast ours is beside dense attention, and from which length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import hf_sparse
from hf_sparse.bench.plot import plot_bench
from hf_sparse.bench.run import COMMAND, KINDS, LAYER_KINDS, evaluate
from hf_sparse.bench.shapes import SHAPES, Shape, parse_shape
from hf_sparse.bench.subject import Plan, Subject
from hf_sparse.bench.summary import summarise
from hf_sparse.bench.tables import bench_tables
from hf_sparse.cli.options import Policy, RunOptions, SparseOptions, parse_integers, read_policy
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.machine import find_device, process_state
from hf_sparse.measure.run import Outcome, write_outcome
from hf_sparse.measure.windows import check_lengths
from hf_sparse.results import ROWS, ResultFile, check_folder
from hf_sparse.selectors import SELECTORS
from hf_sparse.share.source import DTYPES, ModelSource

_FULL = {
    "decode": [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144],
    "prefill": [1024, 2048, 4096, 8192, 16384, 32768],
    "cached": [8192, 32768, 131072],
    "generate": [8192, 32768],
    "padded": [],
}
_QUICK = {
    "decode": [1024, 4096, 16384],
    "prefill": [512, 1024, 2048],
    "cached": [4096, 16384],
    "generate": [1024],
    "padded": [],
}
_OPTIONAL = ("masked-sdpa", "flex", "static-cache")
_DEFAULT_SHAPE, _DEFAULT_LAYERS = "smollm2-135m", 2
_LENGTHS_HELP = "{}; none to leave it out."


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
        typer.Option(min=1, help="Layers of the model in memory, without a MODEL.", show_default=str(_DEFAULT_LAYERS)),
    ] = None
    decode: Annotated[
        str | None, typer.Option(help=_LENGTHS_HELP.format("One layer: cached keys"), show_default="1024 to 262144")
    ] = None
    prefill: Annotated[
        str | None, typer.Option(help=_LENGTHS_HELP.format("One layer: rows and keys"), show_default="1024 to 32768")
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
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a model writes.")] = 16
    repeats: Annotated[int, typer.Option(min=1, help="Fewest rounds of a measurement.")] = 3
    seconds: Annotated[float, typer.Option(min=0, help="Rounds go on for this long.")] = 5.0
    leave_out: Annotated[str, typer.Option(help=f"Dense methods not to measure: some of {', '.join(_OPTIONAL)}.")] = ""
    selector: Annotated[str, typer.Option(help=f"{', '.join(SELECTORS)}.")] = "grouped"
    text: Annotated[
        str | None,
        typer.Option(help="With a MODEL: text to read; see perplexity.", show_default="Python's language reference"),
    ] = None
    policy: Policy = None
    quick: Annotated[bool, typer.Option("--quick", help="Short lengths, nothing compiled: under two minutes.")] = False

    def plan(self, run: RunOptions, config: SparseAttentionConfig, max_positions: int | None) -> Plan:
        """What to measure.

        Args:
            run: How to run.
            config: Of the patch, but for a selector that is given.
            max_positions: Tokens that the model takes, above which no length lies; `None` for no limit.

        Raises:
            UserError: naming the option and what is allowed.
        """
        lengths = {kind: self._lengths(kind, max_positions) for kind in KINDS}
        if not any(lengths.values()):
            raise UserError(
                f"nothing is left to measure: give lengths to one of {', '.join(f'--{kind}' for kind in KINDS)}"
            )
        names = frozenset(name.strip() for name in self.leave_out.split(",") if name.strip())
        if unknown := sorted(names - set(_OPTIONAL)):
            raise UserError(f"leave-out takes some of {', '.join(_OPTIONAL)}; got {unknown[0]!r}")
        if self.selector not in SELECTORS:
            raise UserError(f"selector must be one of {', '.join(SELECTORS)}; got {self.selector!r}")
        if self.selector != SparseAttentionConfig.selector:
            config = replace(config, selector=self.selector)
        left_out = names | {"flex"} if self.quick else names
        return Plan(lengths, config, self.new_tokens, left_out, self.repeats, self.seconds, run.seed)

    def _lengths(self, kind: str, max_positions: int | None) -> list[int]:
        """The lengths of a kind that were given, or the default ones that the model takes."""
        given = getattr(self, kind)
        if given == "none":
            return []
        # A cache holds all tokens of a prompt but the last.
        after = self.new_tokens + (kind == "cached")
        most = max_positions if kind not in LAYER_KINDS else None
        if given is None:
            lengths = (_QUICK if self.quick else _FULL)[kind]
            return [n for n in lengths if most is None or n + after <= most]
        lengths = parse_integers(f"--{kind}", given)
        check_lengths(lengths, 1, None)
        if most is not None and lengths[-1] + after > most:
            raise UserError(
                f"--{kind} {lengths[-1]} and the {after} tokens that follow are above the model's maximum of {most} "
                "tokens"
            )
        return lengths


def run_bench(model: str | None, bench: BenchOptions, run: RunOptions, sparse: SparseOptions) -> Outcome:
    """Check everything that a user can get wrong, measure, and write rows, summary, tables and plot.

    Args:
        model: Hub id, folder or `.gguf` file; `None` for random weights of a shape.
        bench: What is measured.
        run: How to run.
        sparse: The configuration of the patch.

    Raises:
        UserError: for whatever is wrong.
    """
    if run.dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {run.dtype!r}")
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    _check_goes_together(model, bench, run)
    device = run.device or str(process_state().device)
    if model is None:
        plan = bench.plan(run, sparse.config(), None)
        shape = bench.shape or _DEFAULT_SHAPE
        name = shape.replace("/", "-")
        folder = _folder(run, {"name": name})
        part = parse_shape(shape).part(bench.layers or _DEFAULT_LAYERS)
        subject = _in_memory(plan, name, part, run.dtype, device)
    else:
        source = ModelSource.find(model, run.revision)
        support = hf_sparse.inspect(source.config)
        if not support.supported:
            raise UserError(str(support))
        config = sparse.config(read_policy(bench.policy, source.policy))
        info = source.info()
        plan = bench.plan(run, config, info["max_positions"])
        folder = _folder(run, info)
        subject = Subject.loaded(plan, source, bench.text, run.dtype, device)
    results = ResultFile(folder / ROWS)
    rows = evaluate(list(subject.cells(plan)), results, subject.about)
    with results.summed_up():
        summary = summarise(rows)
    outcome = Outcome(summary, [*bench_tables(summary)])
    write_outcome(outcome, folder, "bench.png", plot_bench)
    return outcome


def _folder(run: RunOptions, model: dict[str, Any]) -> Path:
    """Where results go, checked."""
    folder = run.output or Path("results") / f"{model['name'].removesuffix('.gguf')}-{COMMAND}"
    check_folder(folder, COMMAND, model)
    return folder


def _check_goes_together(model: str | None, bench: BenchOptions, run: RunOptions) -> None:
    """Refuse options that would change nothing."""
    of_a_model = {"policy": bench.policy, "text": bench.text, "revision": run.revision}
    of_a_shape = {"shape": bench.shape, "layers": bench.layers}
    rule = "needs a MODEL" if model is None else f"makes a model: leave it out with {model}"
    for name, value in (of_a_model if model is None else of_a_shape).items():
        if value is not None:
            raise UserError(f"--{name} {rule}")


def _in_memory(plan: Plan, name: str, shape: Shape, dtype: str, device: str) -> Subject:
    place = find_device(device)
    usual = torch.float32 if place.type == "cpu" else torch.bfloat16
    number = usual if dtype == "auto" else getattr(torch, dtype)
    return Subject.in_memory(plan, name, shape, number, place)
