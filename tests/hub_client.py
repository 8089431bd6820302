"""A Hub with a base model and processes that use it, called from tests as if they were here.

The address of the Hub is read when `huggingface_hub` is imported, tests themselves run offline, and a model that was
published is to be loaded where nothing else was done before. One process serves many calls: starting one takes long.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.cli import main
from tests import tiny
from tests.hub_server import Hub
from tests.small import CONFIG

BASE = "org/base"
LENGTH = 64
Logits = list[list[float]]  # by position and word


def push(repo_id: str, base: str = BASE, config: SparseAttentionConfig = CONFIG, **options: Any) -> str:
    """Patch a base model and publish it; gives the address."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return hf_sparse.push_to_hub(hf_sparse.patch(model, config), repo_id, **options)


def load(name: str, **options: Any) -> Logits:
    """The logits of a published model."""
    return _logits(hf_sparse.from_pretrained(name, **options))


def patch(name: str, base: str = BASE) -> Logits:
    """The logits of a base model that is patched with a published policy."""
    return _logits(hf_sparse.patch(AutoModelForCausalLM.from_pretrained(base), name))


def dense(name: str) -> Logits:
    """The logits of what plain transformers makes of a repository."""
    return _logits(AutoModelForCausalLM.from_pretrained(name))


def command(*arguments: str) -> dict[str, Any]:
    """`hf-sparse` with these arguments: exit code, stdout and stderr. Any other exception would be a traceback."""
    code: Any = None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def _logits(model: Any) -> Logits:
    out: Logits = tiny.logits(model.eval(), tiny.tokens(1, LENGTH))[0].tolist()
    return out


@dataclass(frozen=True)
class Outcome:
    """What a call gave, or the message of the `ValueError` that it ended in; any other error is the test's."""

    value: Any
    error: str | None
    warnings: list[str]


def _attempt(function: Callable[..., Any], given: Any, options: Any, token: str | None) -> Outcome | str:
    """In the process: the outcome of a call, or the traceback of an error that is none of ours."""
    value = error = None
    pause = time.sleep
    with (
        mock.patch.dict(os.environ, {} if token is None else {"HF_TOKEN": token}),
        # huggingface_hub tries again for half a minute before it gives up.
        mock.patch("time.sleep", lambda seconds: pause(min(float(seconds), 0.01))),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            value = function(*given, **options)
        except ValueError as wrong:
            error = str(wrong)
        except Exception:
            return traceback.format_exc()
    return Outcome(value, error, [str(warning.message) for warning in caught])


class Client:
    """A process that works, and keeps its cache, in the folder `home`: runs the functions above."""

    def __init__(self, url: str, home: Path) -> None:
        home.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        off = {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        ours = {"HF_ENDPOINT": url, "HF_HOME": "cache", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        # One server imports everything, once, and is forked for each client.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with mock.patch.dict(os.environ, kept | off | ours, clear=True):
            self.pool = context.Pool(1, os.chdir, [home])

    def attempt(self, function: Callable[..., Any], *given: Any, token: str | None = "hf_ada", **options: Any) -> Any:
        """The `Outcome` of a function for the owner of a token; `None` is nobody."""
        outcome = self.pool.apply(_attempt, (function, given, options, token))
        assert isinstance(outcome, Outcome), outcome
        return outcome

    def call(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """The value of a function that is to succeed."""
        outcome = self.attempt(function, *given, **options)
        assert outcome.error is None, outcome.error
        return outcome.value


@dataclass(frozen=True)
class World:
    """The Hub, a process that publishes, and another that loads.

    Attributes:
        commit: That of the base model.
        folder: Of the base model's files.
    """

    hub: Hub
    writer: Client
    reader: Client
    commit: str
    folder: Path

    def push(self, repo: str, **options: Any) -> str:
        """Publish the base model with a policy; gives the address."""
        return str(self.writer.call(push, repo, **options))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return self.hub.repos[repo].files(revision)

    @property
    def base(self) -> dict[str, bytes]:
        """The base model's files."""
        return {file.name: file.read_bytes() for file in self.folder.iterdir()}

    def add(self, name: str, files: Mapping[str, bytes | None] | None = None, **fields: Any) -> str:
        """Put a policy without harm, but for these fields, into a repository, with other files; gives the commit."""
        policy = {**CONFIG.to_dict(), "base_model": BASE, "revision": self.commit, **fields}
        return self.hub.add(name, {**(files or {}), "sparse_config.json": json.dumps(policy).encode()})


def refused(outcome: Outcome, *words: str) -> None:
    """The outcome is one clear error: a line that holds these words."""
    assert outcome.error is not None, outcome
    _one_line(outcome.error, words)


def exits(outcome: Outcome, *words: str) -> None:
    """The command ended with exit code 2 and a line that holds these words."""
    assert outcome.error is None, outcome
    assert outcome.value["code"] == 2, outcome.value
    _one_line(outcome.value["err"].rpartition("hf-sparse: ")[2].removesuffix("\n"), words)


def _one_line(message: str, words: tuple[str, ...]) -> None:
    assert message
    assert "\n" not in message, message
    assert len(message) < 600, message
    assert all(word in message for word in words), (words, message)
