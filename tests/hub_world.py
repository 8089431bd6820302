"""A Hub with a base model, two processes that use it, and what a refusal looks like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hub_client import Client, Outcome
from tests.hub_server import Hub

BASE = "org/base"
CARD = b"---\nlicense: apache-2.0\ntags: [theirs]\n---\n# The base model\n"
# What makes a difference within the few tokens that a tiny model takes.
FIELDS: dict[str, Any] = {
    "alpha": 2.0,
    "min_keys": 4,
    "sink_keys": 1,
    "recent_keys": 2,
    "dense_below": 8,
    "dense_layers": [],
    "selector": "topk",
}


@dataclass(frozen=True)
class World:
    """The Hub, a process that publishes as ada, and another that loads.

    Attributes:
        commit: That of the base model.
        folder: Of the base model's files.
    """

    hub: Hub
    writer: Client
    reader: Client
    commit: str
    folder: Path

    def push(self, repo: str, base: str = BASE, **arguments: Any) -> str:
        """Publish the base model with a policy; gives the address."""
        return str(self.writer.call("push", base=base, repo_id=repo, fields=FIELDS, **arguments))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return self.hub.repos[repo].files(revision)

    @property
    def base(self) -> dict[str, bytes]:
        """The base model's files."""
        return {file.name: file.read_bytes() for file in self.folder.iterdir()}


def policy(world: World, **fields: Any) -> dict[str, Any]:
    """The policy of a repository without harm, with these fields."""
    return {"schema_version": 1, "base_model": BASE, "revision": world.commit, **FIELDS, **fields}


def refused(outcome: Outcome, *words: str) -> None:
    """The outcome is one clear error: a line that holds these words."""
    assert "ValueError" in outcome.errors, outcome.traceback or outcome
    _one_line(outcome.message, words)


def exits(outcome: Outcome, *words: str) -> None:
    """The command ended with exit code 2 and a line that holds these words."""
    assert not outcome.errors, outcome.traceback
    assert outcome.value["code"] == 2, outcome.value
    start, _, message = outcome.value["err"].rpartition("hf-sparse: ")
    assert "Traceback" not in start
    _one_line(message.removesuffix("\n"), words)


def _one_line(message: str, words: tuple[str, ...]) -> None:
    assert message
    assert "\n" not in message, message
    assert len(message) < 600, message
    for word in words:
        assert word in message, message
