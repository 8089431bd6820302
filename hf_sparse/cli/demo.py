"""`hf-sparse demo`: the one line, and what it costs, on a real model in a few minutes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

import hf_sparse
from hf_sparse.cli.evaluate import Evaluation, check, run_attention_error, run_perplexity
from hf_sparse.cli.options import DataOptions, RunOptions
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.machine import is_main_process
from hf_sparse.measure import attention_error, perplexity
from hf_sparse.measure.methods import error_methods, perplexity_methods
from hf_sparse.share.source import ModelSource
from hf_sparse.tables import text_table

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Chosen so that two cores need a few minutes with 135 million parameters.
_LENGTHS = [512, 1024, 2048, 4096]
_TARGETS = 256
_DOCUMENTS = 2
_METHODS = ("topk", "grouped")
_QUERIES_PER_LENGTH = 64
_NEW_TOKENS = 24


def run_demo(name: str, run: RunOptions) -> None:
    """Patch, generate, report, and measure perplexity and attention error; print all of it.

    Args:
        name: The model.
        run: How to run.

    Raises:
        UserError: if the model cannot be found, reached, read or patched, or takes less than 4,096 tokens.
    """
    source = ModelSource.find(name, run.revision)
    data = DataOptions(documents=_DOCUMENTS)
    parts = (perplexity.COMMAND, attention_error.COMMAND)
    evaluation = check(source, "demo", data, run, _LENGTHS, _TARGETS, parts)

    def say(text: str) -> None:
        if is_main_process() and not run.as_json:
            print(text, flush=True)

    say(f"model: {evaluation.info.name}, {evaluation.about['dtype']} on {evaluation.about['device']}")
    say("\n>>> model = hf_sparse.patch(model)")
    texts, report = _generate(evaluation)
    say(f"{report}\n\nafter {texts['prompt']!r} it writes")
    say(f"  dense:  {texts['dense']!r}\n  sparse: {texts['sparse']!r}")
    config = SparseAttentionConfig()
    methods = perplexity_methods(_METHODS, config, _LENGTHS, source.support)
    say(f"\nperplexity of the same {_TARGETS} tokens of {_DOCUMENTS} documents, after more and more context:\n")
    likelihood = run_perplexity(evaluation, methods, parts[0])
    say(f"{text_table(*likelihood.tables[0])}\n\nattention error against dense, every law at equal cost:\n")
    compared = error_methods(None, config, _LENGTHS, source.support)
    error = run_attention_error(evaluation, _LENGTHS, compared, _QUERIES_PER_LENGTH, parts[1])
    say(f"{text_table(*error.tables[0])}\n\nrecords, summaries, tables and plots: {evaluation.folder}")
    if run.as_json and is_main_process():
        everything = {"report": asdict(report), "perplexity": likelihood.summary, "attention_error": error.summary}
        print(json.dumps({"texts": texts, **everything}))


def _generate(evaluation: Evaluation) -> tuple[dict[str, str], hf_sparse.SparsityReport]:
    """What the model writes after a text, dense and patched, and the report of the latter."""
    tokenizer = evaluation.tokenizer
    model: Any = evaluation.model
    prompt = next(window.input_ids for window in evaluation.windows if window.length == _LENGTHS[1])

    def write() -> str:
        ids = prompt[None].to(model.device)
        options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "do_sample": False}
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.eos_token_id}
        written = model.generate(ids, **options)
        return str(tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True))

    texts = {"prompt": "..." + str(tokenizer.decode(prompt[-24:])), "dense": write()}
    hf_sparse.patch(model)
    try:
        texts["sparse"] = write()
        return texts, hf_sparse.report(model)
    finally:
        hf_sparse.unpatch(model)
