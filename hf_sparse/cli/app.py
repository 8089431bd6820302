"""The command `hf-sparse`: results on stdout, progress on stderr, exit code 2 and one line for a user's mistake."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import hf_sparse
from hf_sparse.cli.bench import BenchOptions, run_bench
from hf_sparse.cli.calibrate import CalibrationOptions, run_calibrate
from hf_sparse.cli.demo import DEMO_MODEL, run_demo
from hf_sparse.cli.evaluate import Evaluation, check, run_attention_error, run_perplexity, run_retrieval
from hf_sparse.cli.memory import MemoryOptions, run_memory
from hf_sparse.cli.options import (
    DataOptions,
    Json,
    Model,
    Policy,
    RetrievalData,
    Revision,
    RunOptions,
    SparseOptions,
    parse_shares,
    read_policy,
    share_options,
)
from hf_sparse.cli.prompt import show_prompt
from hf_sparse.cli.publish import BundleOptions, run_card, run_publish
from hf_sparse.cli.report import run_report, write_page
from hf_sparse.cli.theory import TheoryOptions, print_theory, run_theory
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure import attention_error as errors
from hf_sparse.measure import perplexity as perplexities
from hf_sparse.measure import retrieval as retrievals
from hf_sparse.measure.methods import (
    CALIBRATED,
    OTHER_METHODS,
    PERPLEXITY_METHODS,
    error_methods,
    perplexity_methods,
    split_names,
)
from hf_sparse.measure.retrieval_methods import DEFAULT, retrieval_methods
from hf_sparse.measure.retrieval_prompts import MODES
from hf_sparse.measure.retrieval_tasks import MAX_QUESTIONS, TASKS
from hf_sparse.measure.run import Outcome
from hf_sparse.results import is_main_process
from hf_sparse.share.publish import MESSAGE
from hf_sparse.share.remote import Remote
from hf_sparse.share.source import ModelSource

_OWN_SELECTOR = "or a selector as path/to/file.py:ClassName"

app = typer.Typer(
    name="hf-sparse",
    help="Sparse attention for Hugging Face causal language models, and what it costs.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 for a negative answer, 2 for a user's mistake.

    Args:
        arguments: What follows the name of the program; `sys.argv[1:]` if `None`.
    """
    # A Hub out of reach is one line, not one for every retry.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # Bad options: Typer's own exceptions, whose classes moved between releases.
        describe = getattr(error, "format_message", None)
        if not isinstance(error, UserError) and describe is None:
            raise
        message = str(error) if describe is None else describe()
        print("hf-sparse:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


@app.command()
def inspect(
    model: Model,
    prompt: Annotated[
        Path | None, typer.Option(help="Load the model, and show which keys the last token of this text keeps.")
    ] = None,
    page: Annotated[Path, typer.Option(help="HTML page for that.")] = Path("results/prompt.html"),
    policy: Policy = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")] = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say whether a model can be patched, from its configuration alone; exit code 1 if not.

    With --prompt: what sparse attention does to that text.
    """
    source = ModelSource.find(model, revision)
    support = hf_sparse.inspect(source.config)
    if prompt is not None and support.supported:
        show_prompt(source, read_policy(policy, source.policy), prompt, page, dtype, as_json=as_json)
        return
    print(json.dumps(asdict(support)) if as_json else support)
    raise typer.Exit(0 if support.supported else 1)


@app.command()
@share_options
def perplexity(
    model: Model,
    data: DataOptions,
    run: RunOptions,
    sparse: SparseOptions,
    targets: Annotated[int, typer.Option(min=1, help="Last tokens of each window, the same at every length.")] = 512,
    methods: Annotated[
        str, typer.Option(help=f"What to compare with dense: also {', '.join(OTHER_METHODS)}, {_OWN_SELECTOR}.")
    ] = ",".join(PERPLEXITY_METHODS),
    policy: Policy = None,
) -> None:
    """Perplexity of the same tokens across context lengths: dense, adaptive, and fixed at equal cost."""
    evaluation, config = _checked(model, perplexities.COMMAND, data, run, sparse, policy, targets)
    compared = perplexity_methods(split_names(methods), config, data.parsed_lengths(), evaluation.source.support)
    _print(run_perplexity(evaluation, compared), evaluation)


@app.command("attention-error")
@share_options
def attention_error(
    model: Model,
    data: DataOptions,
    run: RunOptions,
    sparse: SparseOptions,
    rows: Annotated[int, typer.Option(min=1, help="Queries measured before each length.")] = (
        errors.QUERIES_PER_LENGTH
    ),
    methods: Annotated[
        str | None,
        typer.Option(help=f"Selectors and laws, {_OWN_SELECTOR}.", show_default="all laws, then all selectors"),
    ] = None,
    policy: Policy = None,
) -> None:
    """How far sparse attention is from dense attention across context lengths, every law at equal cost."""
    evaluation, config = _checked(model, errors.COMMAND, data, run, sparse, policy)
    lengths, names = data.parsed_lengths(), None if methods is None else split_names(methods)
    compared = error_methods(names, config, lengths, evaluation.source.support)
    _print(run_attention_error(evaluation, lengths, compared, rows), evaluation)


@app.command()
@share_options
def retrieval(
    model: Model,
    data: RetrievalData,
    run: RunOptions,
    sparse: SparseOptions,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = ",".join(TASKS),
    questions: Annotated[
        int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions of each task about each text, at even depths.")
    ] = 5,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"What to compare with dense: {DEFAULT} (the law of the options), {CALIBRATED} (the policy), "
            f"{_OWN_SELECTOR}.",
            show_default=f"{DEFAULT}; with a policy also {CALIBRATED}",
        ),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Also fixed shares of the keys, such as 0.5,0.25,0.125,0.0625.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Questions read in one pass with the text, or token by token: prefill, decode or both.")
    ] = "prefill",
    policy: Policy = None,
) -> None:
    """What is retrieved from long texts, on tasks in the manner of RULER: by likelihood, and by what is written."""
    modes = MODES if mode == "both" else (mode,)
    evaluation, config = _checked(model, retrievals.COMMAND, data, run, sparse, policy)
    compared = retrieval_methods(
        None if methods is None else split_names(methods),
        parse_shares("--budgets", budgets),
        config,
        sparse.config(),
        data.parsed_lengths(),
        evaluation.source.support,
    )
    _print(run_retrieval(evaluation, compared, split_names(tasks), questions, modes), evaluation)


@app.command()
@share_options
def calibrate(model: Model, options: CalibrationOptions, run: RunOptions) -> None:
    """Fit a law for every head to a target, and check it on held-out texts; exit code 1 if the target is not met."""
    result, outcome, folder = run_calibrate(model, options, run)
    if run.as_json:
        print(json.dumps(outcome.summary))
    else:
        print(f"{outcome}\n\nintervals: 95 %, bootstrap over {result.check['resampled']}")
        print(f"measurements, calibration.json and sparse_config.json: {folder}")
    raise typer.Exit(0 if result.met else 1)


@app.command()
@share_options
def memory(options: MemoryOptions, sparse: SparseOptions) -> None:
    """Peak memory of one attention call, of a whole prefill, and of caches, dense and sparse (Linux, CPU)."""
    run_memory(options, sparse)


@app.command()
@share_options
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder or .gguf file.", show_default="random weights of --shape")
    ] = None,
    *,
    bench: BenchOptions,
    run: RunOptions,
    sparse: SparseOptions,
) -> None:
    """Time sparse beside dense attention, in one layer and in generation; from which length is it faster?"""
    run_bench(model, bench, run, sparse)


@app.command()
@share_options
def card(
    model: Model,
    bundle: BundleOptions,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="MODEL, if it is a folder with a policy")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write sparse_config.json, model card and plots from results; on a folder that has them, write them anew."""
    run_card(model, bundle, output, as_json)


@app.command()
@share_options
def publish(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name, or name.", show_default=False)],
    bundle: BundleOptions,
    weights: Annotated[bool, typer.Option("--weights", help="Publish weights and tokenizer, too.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = MESSAGE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a policy and its model card on the Hub, in one commit."""
    remote = Remote(repo_id, revision=revision, create_pr=create_pr, private=private or None)
    run_publish(model, bundle, remote, message, weights=weights, dry_run=dry_run, as_json=as_json)


@app.command()
@share_options
def theory(options: TheoryOptions, run: RunOptions) -> None:
    """The claims about n^C-sparse attention as experiments: which hold, in which norm, for which inputs and models."""
    summaries, folder = run_theory(options, run)
    if run.as_json:
        print(json.dumps(summaries))
    else:
        print_theory(summaries, folder)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder that a command wrote its results into.", show_default=False)],
    write: Annotated[bool, typer.Option("--write", help="Write summary, tables and plots anew.")] = False,
    page: Annotated[
        Path | None,
        typer.Option(help="Write a self-contained HTML page of all results in the folder and those inside it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the tables of a folder of results again, made anew from its records; or make a page of them."""
    if page is None:
        run_report(run_dir, write=write, as_json=as_json)
    elif write or as_json:
        raise UserError("--page takes neither --write nor --json")
    else:
        write_page(run_dir, page)


@app.command()
@share_options
def demo(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.")] = DEMO_MODEL, *, run: RunOptions
) -> None:
    """Patch a model in one line, let it write, and measure what the patch costs; minutes on a small CPU."""
    run_demo(model, run)


def _checked(
    model: str,
    command: str,
    data: DataOptions,
    run: RunOptions,
    sparse: SparseOptions,
    policy: str | None,
    targets: int = 1,
) -> tuple[Evaluation, SparseAttentionConfig]:
    """An evaluation whose arguments are right, and the configuration that it is about."""
    source = ModelSource.find(model, run.revision)
    config = sparse.config(read_policy(policy, source.policy))
    return check(source, command, data, run, data.parsed_lengths(), targets), config


def _print(outcome: Outcome, evaluation: Evaluation) -> None:
    if not is_main_process():
        return
    if evaluation.run.as_json:
        print(json.dumps(outcome.summary))
    else:
        print(f"{outcome}\n\nintervals: 95 %, bootstrap over {outcome.summary['resampled']}")
        print(f"records, summary, tables and plot: {evaluation.folder}")
