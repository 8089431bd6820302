"""`hf-sparse perplexity`, `attention-error` and `retrieval`: a model under several methods, beside dense attention."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from hf_sparse.cli.evaluate import Evaluation, check
from hf_sparse.cli.options import (
    DataOptions,
    Model,
    Policy,
    RetrievalData,
    RunOptions,
    SparseOptions,
    parse_shares,
    read_policy,
)
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure import attention_error as errors
from hf_sparse.measure import perplexity as perplexities
from hf_sparse.measure import retrieval as retrievals
from hf_sparse.measure.methods import (
    CALIBRATED,
    OTHER_METHODS,
    PERPLEXITY_METHODS,
    Methods,
    error_methods,
    perplexity_methods,
    split_names,
)
from hf_sparse.measure.retrieval_methods import DEFAULT, retrieval_methods
from hf_sparse.measure.retrieval_prompts import MODES, make_prompts
from hf_sparse.measure.retrieval_tasks import MAX_QUESTIONS, TASKS
from hf_sparse.measure.run import ATTENTION_ERROR, PERPLEXITY, RETRIEVAL, Outcome
from hf_sparse.results import is_main_process
from hf_sparse.share.source import ModelSource

_OWN_SELECTOR = "or a selector as path/to/file.py:ClassName"


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


def run_perplexity(evaluation: Evaluation, methods: Methods, part: str = "") -> Outcome:
    """Measure perplexity and write the results into `part` of the folder."""
    results = evaluation.results(methods, part)
    records = perplexities.evaluate(evaluation.model, evaluation.windows, methods, results, evaluation.about)
    return PERPLEXITY.conclude(records, results, evaluation.run.seed)


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


def run_attention_error(
    evaluation: Evaluation,
    lengths: Sequence[int],
    methods: Mapping[str, SparseAttentionConfig],
    queries_per_length: int,
    part: str = "",
) -> Outcome:
    """Measure attention errors and write the results into `part` of the folder."""
    results = evaluation.results(methods, part)
    windows = [window for window in evaluation.windows if window.length == lengths[-1]]
    records = errors.evaluate(
        evaluation.model, windows, lengths, methods, results, evaluation.about, queries_per_length
    )
    return ATTENTION_ERROR.conclude(records, results, evaluation.run.seed)


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
    evaluation, config = _checked(model, retrievals.COMMAND, data, run, sparse, policy)
    compared = retrieval_methods(
        None if methods is None else split_names(methods),
        parse_shares("--budgets", budgets),
        config,
        sparse.config(),
        data.parsed_lengths(),
        evaluation.source.support,
    )
    tokenizer, modes = evaluation.tokenizer, MODES if mode == "both" else (mode,)
    prompts = make_prompts(evaluation.windows, tokenizer, split_names(tasks), questions, run.seed, modes)
    results = evaluation.results(compared)
    records = retrievals.evaluate(evaluation.model, tokenizer, prompts, compared, results, evaluation.about)
    _print(RETRIEVAL.conclude(records, results, run.seed), evaluation)


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
