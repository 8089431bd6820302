"""`hf-sparse demo`: the one line, and what it costs, on a real model in a few minutes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import torch

import hf_sparse
from hf_sparse.cli.options import DataOptions, RunOptions
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.machine import is_main_process
from hf_sparse.measure.methods import error_methods, perplexity_methods
from hf_sparse.measure.run import Ready, check, run_attention_error, run_perplexity
from hf_sparse.share.source import ModelSource
from hf_sparse.tables import text_table

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Chosen so that two cores need a few minutes with 135 million parameters.
_LENGTHS = [512, 1024, 2048, 4096]
_TARGETS = 256
_DOCUMENTS = 2
_METHODS = ("topk", "grouped")
_ROWS_PER_LENGTH = 64
_NEW_TOKENS = 24

# The commands that it runs, and the folders of their results.
_PERPLEXITY, _ATTENTION_ERROR = "perplexity", "attention-error"


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
    ready = check(source, "demo", data, run, _LENGTHS, _TARGETS, (_PERPLEXITY, _ATTENTION_ERROR)).load()
    say = _Speaker(silent=run.as_json or not is_main_process())
    say(f"model: {ready.about['model']['name']}, {ready.about['dtype']} on {ready.about['device']}")
    say("\n>>> model = hf_sparse.patch(model)")
    texts, report = _generate(ready)
    say(f"{report}\n\nafter {texts['prompt']!r} it writes")
    say(f"  dense:  {texts['dense']!r}\n  sparse: {texts['sparse']!r}")
    config = SparseAttentionConfig()
    methods = perplexity_methods(_METHODS, config, _LENGTHS, source.support)
    say(f"\nperplexity of the same {_TARGETS} tokens of {_DOCUMENTS} documents, after more and more context:\n")
    perplexity = run_perplexity(_in(ready, _PERPLEXITY), methods)
    say(f"{text_table(*perplexity.tables[0])}\n\nattention error against dense, every law at equal cost:\n")
    compared = error_methods(None, config, _LENGTHS, source.support)
    error = run_attention_error(_in(ready, _ATTENTION_ERROR), _LENGTHS, compared, _ROWS_PER_LENGTH)
    say(f"{text_table(*error.tables[0])}\n\nrows, summaries, tables and plots: {ready.folder}")
    if run.as_json and is_main_process():
        everything = {"report": asdict(report), "perplexity": perplexity.summary, "attention_error": error.summary}
        print(json.dumps({"texts": texts, **everything}))


class _Speaker:
    """`print`, unless nobody should hear."""

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent

    def __call__(self, text: str) -> None:
        if not self.silent:
            print(text, flush=True)


def _in(ready: Ready, folder: str) -> Ready:
    return replace(ready, folder=ready.folder / folder)


def _generate(ready: Ready) -> tuple[dict[str, str], hf_sparse.SparsityReport]:
    """What the model writes after a text, dense and patched, and the report of the latter."""
    tokenizer = ready.tokenizer
    model: Any = ready.model
    prompt = next(window.input_ids for window in ready.windows if window.length == _LENGTHS[1])

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
