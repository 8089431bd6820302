"""A Hub with a base model, and what a test does with it: publish, load, and be refused."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseAttentionConfig
from tests import small, tiny
from tests.hub_server import Hub

BASE = "org/base"
POLICY = "sparse_config.json"
LENGTH = 64


def push(repo_id: str, base: str = BASE, config: SparseAttentionConfig = small.CONFIG, **options: Any) -> str:
    """Patch a base model and publish it; gives the address."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return hf_sparse.push_to_hub(hf_sparse.patch(model, config), repo_id, **options)


def load(name: str, **options: Any) -> Tensor:
    """The logits of a published model."""
    return _logits(hf_sparse.from_pretrained(name, **options))


def patch(name: str, base: str = BASE) -> Tensor:
    """The logits of a base model that is patched with a published policy."""
    return _logits(hf_sparse.patch(AutoModelForCausalLM.from_pretrained(base), name))


def dense(name: str) -> Tensor:
    """The logits of what plain transformers makes of a repository."""
    return _logits(AutoModelForCausalLM.from_pretrained(name))


def command(*arguments: str) -> str:
    """What `hf-sparse` prints with these arguments; its line of error, with exit code 2, is a `ValueError`."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = small.run_command(*arguments)
    if code == 2:
        raise ValueError(err.getvalue().rpartition("hf-sparse: ")[2].removesuffix("\n"))
    assert code == 0
    return out.getvalue()


def publish(repo_id: str, *options: str, model: str = BASE) -> str:
    """What `hf-sparse publish` prints."""
    return command("publish", model, repo_id, *options)


def refused(words: str | Sequence[str], function: Callable[..., Any], *given: Any, **options: Any) -> None:
    """The call ends in one clear error: a line that holds these words."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked for below
        function(*given, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message, message
    assert len(message) < 600, message
    for word in [words] if isinstance(words, str) else words:
        assert word in message, message


def _logits(model: Any) -> Tensor:
    return tiny.logits(model.eval(), tiny.tokens(1, LENGTH))[0]


@dataclass(frozen=True)
class World:
    """A Hub, for one test that uses it as ada.

    Attributes:
        base: The base model's files.
        commit: That of the base model.
        here: The folder that the test works in, empty at first.
        monkeypatch: Of the test.
    """

    hub: Hub
    base: Mapping[str, bytes]
    commit: str
    here: Path
    monkeypatch: pytest.MonkeyPatch

    def log_in(self, token: str | None) -> None:
        """Go on as the owner of a token, or as nobody."""
        self.monkeypatch.setenv("HF_TOKEN", token or "")

    def elsewhere(self) -> None:
        """Go on with an empty cache, as on another machine."""
        caches = self.here.parent / "caches"
        caches.mkdir(exist_ok=True)
        cache = caches / str(len(list(caches.iterdir())))
        cache.mkdir()
        self.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return self.hub.repos[repo].files(revision)

    def add(self, name: str, files: Mapping[str, bytes | None] | None = None, **fields: Any) -> str:
        """Put a policy without harm, but for these fields, into a repository, with other files; gives the commit."""
        policy = {**small.CONFIG.to_dict(), "base_model": BASE, "revision": self.commit, **fields}
        return self.hub.add(name, {**(files or {}), POLICY: json.dumps(policy).encode()})
