"""A tiny model with a tokenizer and texts, in a folder as users have them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hf_sparse import SparseAttentionConfig
from hf_sparse.cli import main
from tests import tiny

BOS_ID = 1
# What makes a difference within the few tokens that a tiny model takes.
CONFIG = SparseAttentionConfig(alpha=2.0, min_keys=4, sink_keys=1, recent_keys=2, dense_below=8, dense_layers=())


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per word `w2` ... `w96`, whose id is the number in it; optionally `<s>` with id 1."""
    vocab = {"<unk>": 0, "<s>": BOS_ID} | {f"w{i}": i for i in range(2, tiny.VOCAB)}
    inner = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "<unk>"} | ({"bos_token": "<s>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)  # type: ignore[no-untyped-call]


def word_ids(count: int, seed: int = 0) -> list[int]:
    """Token ids of a random text."""
    return random.Random(seed).choices(range(2, tiny.VOCAB), k=count)


def words(count: int, seed: int = 0) -> str:
    """The text with the tokens `word_ids`."""
    return " ".join(f"w{i}" for i in word_ids(count, seed))


def save_model(folder: Path) -> Path:
    """A Llama and the tokenizer, saved; gives `folder`."""
    tiny.model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_texts(folder: Path, count: int = 2, tokens: int = 150) -> Path:
    """`count` text files; gives `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"text{i}.txt").write_text(words(tokens, seed=i), encoding="utf-8")
    return folder


def save_results(folder: Path, config: SparseAttentionConfig) -> Path:
    """A published summary of `hf-sparse perplexity`, of the configuration `config`; gives `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    published = Path(__file__).parents[1] / "model_cards" / "SmolLM2-135M-Instruct" / "perplexity" / "summary.json"
    summary = json.loads(published.read_text(encoding="utf-8"))
    summary["configs"]["grouped"] = config.to_dict()
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def run_command(*arguments: str) -> int:
    """Run `hf-sparse` with `arguments`; gives its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which `hf-sparse` refuses `arguments`, printing nothing else."""
    assert run_command(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in re.split(r"[\r\n]+", printed.err) if line and not line.startswith("no --model")]
    [line] = [line for line in lines if not line.startswith("Loading weights")]
    assert line.startswith("hf-sparse: ")
    return line
