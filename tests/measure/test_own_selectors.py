"""Selectors in a user's own file, measured and drawn like the built-in ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from hf_sparse.measure.methods import error_methods, perplexity_methods
from hf_sparse.patching import inspect
from tests import small, tiny
from tests.small import run_command

FILE = '''
from dataclasses import dataclass

import torch

import hf_sparse


@dataclass(frozen=True)
class KeyNorm(hf_sparse.ScoreSelector):
    """Keep the keys of smallest norm."""

    name: str = "key-norm"

    def score(self, query, key, call):
        return -key.float().norm(dim=-1)[:, :, None].repeat_interleave(call.group_size, dim=1)


class Grouped(KeyNorm):
    name = "key-norm"
    group_queries = 48
'''
OPTIONS = shlex.split(
    "--text texts --lengths 48,96 --device cpu --alpha 2 --min-keys 4 --sink-keys 1 --recent-keys 2 --dense-below 8 "
    "--dense-layers none --methods topk,key_norm.py:KeyNorm"
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small.save_model(Path("tiny-llama"))
    small.save_texts(Path("texts"))
    Path("key_norm.py").write_text(FILE)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("perplexity", ["--targets", "40"]),
        ("attention-error", ["--rows", "16"]),
        ("retrieval", ["--tasks", "needle-single", "--questions", "1"]),
    ],
)
def test_a_command_measures_and_draws_it(command: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [command, "tiny-llama", *OPTIONS, *more, "--output", "out"]
    assert run_command(*arguments) == 0
    assert "key-norm" in capsys.readouterr().out
    summary = json.loads(Path("out/summary.json").read_text())
    assert [row["method"] for row in summary["results"]] == ["dense"] * 2 + ["topk"] * 2 + ["key-norm"] * 2
    density = {row["method"]: row["density"] for row in summary["results"]}
    assert density["key-norm"] == density["topk"] < 1
    config = summary["configs"]["key-norm"]
    assert config["selector"]["class"] == "KeyNorm"
    assert str(Path.cwd()) not in Path("out/rows.jsonl").read_text()
    [plot] = Path("out").glob("*.png")
    assert plot.stat().st_size > 10_000
    # Interrupted runs resume, until the selector's code changes.
    before = len(Path("out/rows.jsonl").read_text().splitlines())
    assert run_command(*arguments) == 0
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == before
    Path("key_norm.py").write_text(FILE.replace("-key.float()", "key.float()"))
    assert run_command(*arguments) == 0
    assert before < len(Path("out/rows.jsonl").read_text().splitlines()) < 2 * before


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("missing.py:KeyNorm", "there is no file 'missing.py'"),
        ("key_norm.py:Missing", "key_norm.py defines no 'Missing'"),
        ("key_norm.py:torch", "must be a hf_sparse.Selector"),
        ("key_norm", "methods must be among dense, .*, or path/to/file.py:ClassName; got 'key_norm'"),
        ("key_norm.py:KeyNorm,key_norm.py:Grouped", "two different methods are called 'key-norm'"),
    ],
)
@pytest.mark.parametrize("command", ["retrieval", "attention-error"])
def test_one_that_cannot_be_used_is_refused_in_one_line(
    command: str, methods: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command, "tiny-llama", "--text", "texts", "--lengths", "96", "--methods", methods) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line


def test_groups_of_any_size_are_measured_whole(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*OPTIONS[:-1], "key_norm.py:Grouped", "--rows", "1", "--output", "out"]
    assert run_command("attention-error", "tiny-llama", *options, "--lengths", "120") == 0
    [first, *_] = Path("out/rows.jsonl").read_text().splitlines()
    assert json.loads(first)["rows"] == 120  # blocks are common multiples of 48 and 64


def test_its_fields_come_with_the_configuration() -> None:
    support = inspect(tiny.config("llama"))
    for make in (perplexity_methods, error_methods):
        config = make(["key_norm.py:KeyNorm"], small.CONFIG, [96], support)["key-norm"]
        assert config is not None
        assert config.to_dict()["selector"]["fields"] == {"name": "'key-norm'"}
