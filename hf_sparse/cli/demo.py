"""`hf-sparse demo`: the one-line patch on a real model, and what it costs, in a few minutes on two CPU cores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import hf_sparse
from hf_sparse.cli.evaluate import Evaluation, check
from hf_sparse.cli.measure import run_attention_error, run_perplexity
from hf_sparse.cli.options import DataOptions, RunOptions
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure.methods import error_methods, perplexity_methods
from hf_sparse.results import Table, is_main_process, text_table
from hf_sparse.share.source import ModelSource

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Chosen so that two slow cores need less than four minutes with 135 million parameters.
_LENGTHS = [1024, 2048, 4096]
_TARGETS = 256
_METHODS = ("grouped", "window")
_ERROR_METHODS = ("topk", "grouped", "window", "fixed")
_QUERIES_PER_LENGTH = 64
_NEW_TOKENS = 24

# The commands that it runs, and the folders of their results.
_PERPLEXITY, _ATTENTION_ERROR = "perplexity", "attention-error"


def demo(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.")] = DEMO_MODEL, *, run: RunOptions
) -> None:
    """Patch a model in one line, let it write, and measure what the patch costs; minutes on a small CPU."""
    source = ModelSource.find(model, run.revision)
    data = DataOptions(documents=1)
    evaluation = check(source, "demo", data, run, _LENGTHS, _TARGETS, (_PERPLEXITY, _ATTENTION_ERROR))
    silent = run.as_json or not is_main_process()

    def say(text: str) -> None:
        if not silent:
            print(text, flush=True)

    say(f"model: {evaluation.info['name']}, {evaluation.about['dtype']} on {evaluation.about['device_name']}\n")
    prompt = next(window.input_ids for window in evaluation.windows if window.length == _LENGTHS[0])
    with hf_sparse.patched(evaluation.model):
        sparse = _continuation(evaluation, prompt)
        report = hf_sparse.report(evaluation.model)
    say(f">>> model = hf_sparse.patch(model)\n>>> print(hf_sparse.report(model))\n{report}\n")
    texts = {"prompt": "..." + str(evaluation.tokenizer.decode(prompt[-16:])), "sparse": sparse}
    say(f"after {_LENGTHS[0]:,} tokens that end with {texts['prompt']!r}\n  sparse writes  {sparse!r}")
    texts["dense"] = _continuation(evaluation, prompt)
    say(f"  dense writes   {texts['dense']!r}\n")
    config = SparseAttentionConfig()
    methods = perplexity_methods(_METHODS, config, _LENGTHS, source.support)
    perplexity = run_perplexity(evaluation, methods, _PERPLEXITY)
    say(f"perplexity of the same {_TARGETS} tokens after more and more context, and its ratio to dense:\n")
    say(f"{text_table(*_perplexities(perplexity.summary))}\n")
    compared = error_methods(_ERROR_METHODS, config, _LENGTHS, source.support)
    error = run_attention_error(evaluation, _LENGTHS, compared, _QUERIES_PER_LENGTH, _ATTENTION_ERROR)
    say("attention mass that is lost (mean query / worst 1 %), every method at equal cost over these lengths:\n")
    say(f"{text_table(*_lost_masses(error.summary))}\n")
    say(f"results and plots: {evaluation.folder}")
    if run.as_json and is_main_process():
        everything = {"report": asdict(report), "perplexity": perplexity.summary, "attention_error": error.summary}
        print(json.dumps({"texts": texts, **everything}))


def _continuation(evaluation: Evaluation, prompt: Tensor) -> str:
    """What the model, as it is, writes greedily after a prompt, int64 `(tokens,)`."""
    model: Any = evaluation.model
    ids = prompt[None].to(model.device)
    options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": evaluation.tokenizer.eos_token_id}
    written = model.generate(ids, **options)
    return str(evaluation.tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True))


def _perplexities(summary: Mapping[str, Any]) -> Table:
    """A line per method, a column per length: perplexity, then ratio to dense at a density."""

    def cell(row: Mapping[str, Any]) -> str:
        if row["method"] == "dense":
            return f"{row['perplexity']:.2f}"
        return f"{row['ratio']:.3f} (reads {100 * row['density']:.0f} %)"

    return _by_length(summary["results"], cell)


def _lost_masses(summary: Mapping[str, Any]) -> Table:
    """A line per method, a column per length: attention mass of the dropped keys."""

    def cell(row: Mapping[str, Any]) -> str:
        mean, worst = (row["lost_mass"][name]["value"] for name in ("mean", "worst"))
        return f"{mean:.3f} / {worst:.3f} (reads {100 * row['density']:.0f} %)"

    return _by_length([row for row in summary["results"] if row["method"] != "dense"], cell)


def _by_length(rows: list[dict[str, Any]], cell: Callable[[Mapping[str, Any]], str]) -> Table:
    lengths = sorted({row["length"] for row in rows})
    cells = [
        [method, *(cell(row) for row in rows if row["method"] == method)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return ["method", *(f"{length:,} tokens" for length in lengths)], cells
