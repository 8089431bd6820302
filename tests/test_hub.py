"""Publish and load over HTTP, with the real client: what was published is what another process loads, or one error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests import small, tiny
from tests.hub_client import BASE, LENGTH, World, command, dense, exits, load, patch, push, refused

pytest_plugins = ["tests.hub_fixture"]

POLICY = "sparse_config.json"
OTHER = replace(small.CONFIG, alpha=3.0)


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    """Of the base model: dense, and patched as everything that is published here."""
    model = tiny.model("llama")
    ids = tiny.tokens(1, LENGTH)
    dense = tiny.logits(model, ids)[0]
    sparse = tiny.logits(hf_sparse.patch(model, small.CONFIG), ids)[0]
    assert (dense - sparse).abs().max() > 1e-2
    return dense, sparse


def same(given: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(given), expected, rtol=0, atol=1e-6)


def not_published(world: World, repo: str, *words: str, token: str | None = "hf_ada") -> None:
    """Neither the function nor the command publishes: one error with the name of the repository and these words."""
    refused(world.writer.attempt(push, repo, config=OTHER, token=token), repo, *words)
    exits(world.writer.attempt(command, "publish", BASE, repo, token=token), repo, *words)


def test_policy_only(world: World, logits: tuple[Tensor, Tensor]) -> None:
    with world.hub.recording() as requests:
        address = world.push("policy")
    assert address.startswith(f"{world.hub.url}/ada/policy/commit/"), "a name alone is one of one's own"
    assert sum("/commit/" in request for request in requests) == 1
    files = world.files("ada/policy")
    assert set(files) == {POLICY, "README.md", "config.json"}
    assert files["config.json"] == world.base["config.json"]
    policy = json.loads(files[POLICY])
    assert (policy["base_model"], policy["revision"]) == (BASE, world.commit)
    same(world.reader.call(load, "ada/policy"), logits[1])
    same(world.reader.call(patch, "ada/policy"), logits[1])
    assert world.files(BASE) == world.base


def test_with_weights(world: World, logits: tuple[Tensor, Tensor]) -> None:
    world.push("ada/whole", weights=True)
    files = world.files("ada/whole")
    assert files["config.json"] == world.base["config.json"]
    assert {"model.safetensors", "tokenizer.json", POLICY, "README.md"} <= set(files)
    same(world.reader.call(dense, "ada/whole"), logits[0])
    with world.hub.recording() as requests:
        same(world.reader.call(load, "ada/whole"), logits[1])
    assert not [request for request in requests if BASE in request], "its own weights are to be loaded"
    same(world.reader.call(patch, "ada/whole"), logits[1])


@pytest.mark.parametrize("more", [[], ["--weights"]], ids=["light", "whole"])
def test_the_command_publishes_the_same_files(more: list[str], world: World, tmp_path: Path) -> None:
    """For the default configuration."""
    results = str(small.save_results(tmp_path, hf_sparse.SparseAttentionConfig()))
    (tmp_path / "perplexity.png").write_bytes(b"a plot")
    by_function, by_command = (f"ada/{kind}{len(more)}" for kind in ("function", "command"))
    world.push(by_function, config=hf_sparse.SparseAttentionConfig(), results=[results], weights=bool(more))
    done = world.writer.call(command, "publish", BASE, by_command, "--results", results, *more)
    assert done["code"] == 0, done
    files = world.files(by_function)
    card = files["README.md"].decode().replace("function", "command")
    assert world.files(by_command) == files | {"README.md": card.encode()}
    assert {"perplexity/summary.json", "perplexity/perplexity.png"} <= set(files)
    assert len(json.loads(files[POLICY])["quality"]) == 15


def test_the_base_model_stays_the_one_it_was(world: World, logits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    tiny.model("llama", seed=1).save_pretrained(tmp_path)
    world.hub.add("org/moving", world.base)
    world.push("ada/pinned", base="org/moving")
    moved = world.hub.add("org/moving", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    newer = world.reader.attempt(patch, "ada/pinned", base="org/moving")
    assert [text for text in newer.warnings if "revision" in text and moved in text], newer
    assert (torch.tensor(newer.value) - logits[1]).abs().max() > 1e-2
    same(world.reader.call(load, "ada/pinned"), logits[1])
    # With both in the cache, transformers does not say which one a model is of.
    unsure = world.reader.attempt(push, "ada/moved", base="org/moving")
    revision = json.loads(world.files("ada/moved")[POLICY])["revision"]
    assert revision == moved or [text for text in unsure.warnings if "base_revision" in text], unsure
    world.push("ada/moved", base="org/moving", base_revision=moved)
    assert json.loads(world.files("ada/moved")[POLICY])["revision"] == moved


def test_private(world: World, logits: tuple[Tensor, Tensor]) -> None:
    world.push("ada/secret", private=True)
    assert world.hub.repos["ada/secret"].private
    for token in ("hf_bob", None):
        refused(world.reader.attempt(load, "ada/secret", token=token), "ada/secret", "token")
    same(world.reader.call(load, "ada/secret"), logits[1])
    refused(world.writer.attempt(push, BASE, private=True, create_pr=True), BASE, "exists and is public")


def test_a_branch(world: World, logits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps(small.CONFIG.to_dict()))
    options = ["--policy", str(tmp_path / "policy.json"), "--private", "--revision", "v1"]
    done = world.writer.call(command, "publish", BASE, "ada/branches", *options)
    assert f"{world.hub.url}/ada/branches/commit/" in done["out"]
    assert world.hub.repos["ada/branches"].private
    assert world.files("ada/branches") == {}
    assert POLICY in world.files("ada/branches", "v1")
    same(world.reader.call(load, "ada/branches", revision="v1"), logits[1])
    refused(world.reader.attempt(load, "ada/branches"), "ada/branches")
    refused(world.reader.attempt(load, "ada/branches", revision="v2"), "ada/branches", "v2")
    world.push("ada/branches", revision="v1", weights=True)
    assert "model.safetensors" in world.files("ada/branches", "v1")


def test_a_pull_request(world: World, logits: tuple[Tensor, Tensor]) -> None:
    """To a repository of something else, which is not published in."""
    world.hub.add("ada/asked", {"weights.gguf": b"mine"})
    not_published(world, "ada/asked", "exists")
    address = world.push("ada/asked", create_pr=True, token="hf_bob")
    assert address == f"{world.hub.url}/ada/asked/discussions/1"
    assert world.files("ada/asked") == {"weights.gguf": b"mine"}
    assert {POLICY, "weights.gguf"} <= set(world.files("ada/asked", "refs/pr/1"))
    same(world.reader.call(load, "ada/asked", revision="refs/pr/1"), logits[1])
    options = ["--create-pr", "--weights", "--json"]
    done = world.writer.call(command, "publish", BASE, "ada/asked", *options, token="hf_bob")
    assert json.loads(done["out"])["url"] == f"{world.hub.url}/ada/asked/discussions/2"
    assert world.files("ada/asked", "refs/pr/2")["model.safetensors"] == world.base["model.safetensors"]


def test_a_card_is_edited_and_other_files_stay(world: World) -> None:
    world.hub.add("ada/card", {"README.md": b"---\nlicense: mit\n---\n# My title\n\nMy words.\n"})
    world.push("ada/card")
    card = world.files("ada/card")["README.md"].decode()
    for kept in ("license: mit", "# My title\n\nMy words.", "sparse-attention"):
        assert kept in card
    before = dict(world.hub.repos["ada/card"].refs)
    world.push("ada/card")
    assert world.hub.repos["ada/card"].refs == before, "nothing changed, so there is nothing to commit"
    world.hub.add("ada/card", {"notes.txt": b"mine"})
    world.push("ada/card", config=OTHER)
    assert world.files("ada/card")["notes.txt"] == b"mine"
    assert json.loads(world.files("ada/card")[POLICY])["alpha"] == 3.0


@pytest.mark.usefixtures("untouched")
def test_dry_run(world: World) -> None:
    done = world.writer.call(command, "publish", BASE, "ada/dry", "--dry-run", token=None)
    assert done["code"] == 0, done
    for word in (POLICY, "README.md", "ada/dry (new)", "base_model: org/base", "sparse-attention"):
        assert word in done["out"]
    assert "ada/dry" not in world.hub.repos


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("POST .*/commit/", {"cut": True}),
        ("POST .*/commit/", {"status": 500}),
        ("PUT /lfs/", {"status": 403}),
        ("PUT /lfs/", {"cut": True}),
        ("POST .*/info/lfs/", {"status": 500}),
        ("POST .*/preupload/", {"status": 429}),
    ],
    ids=["commit-cut", "commit-500", "weights-403", "weights-cut", "batch-500", "preupload-429"],
)
def test_an_interrupted_upload(
    where: str, fault: dict[str, Any], world: World, logits: tuple[Tensor, Tensor], request: pytest.FixtureRequest
) -> None:
    repo = f"ada/interrupted-{request.node.callspec.id}"
    world.hub.stored.clear()
    with world.hub.failing(where, **fault):
        refused(world.writer.attempt(push, repo, weights=True), repo)
    assert world.files(repo) == {}
    with world.hub.failing("PUT /lfs/", cut=True, times=1):  # a connection that breaks once does no harm
        world.push(repo, weights=True)
    same(world.reader.call(load, repo), logits[1])
    assert len(world.hub.repos[repo].commits) == 2  # with the first one, which the Hub makes


@pytest.mark.parametrize(
    ("status", "word"),
    [(401, "token"), (403, "right"), (404, ""), (409, "again"), (412, "again"), (429, "requests"), (500, "later")],
)
@pytest.mark.parametrize("where", ["POST /api/repos/create", "POST .*/commit/"], ids=["create", "commit"])
def test_errors_of_publishing(where: str, status: int, word: str, world: World) -> None:
    repo = f"ada/error-{status}-{len(where)}"
    with world.hub.failing(where, status):
        not_published(world, repo, str(status), word)
    if "commit" in where:
        assert world.files(repo) == {}
    else:
        assert repo not in world.hub.repos


def test_who_may_publish(world: World) -> None:
    world.push("ada/rights")
    before = dict(world.hub.repos["ada/rights"].refs)
    not_published(world, "ada/new", "token", token=None)
    not_published(world, "ada/new", "token", token="hf_expired")
    not_published(world, "bob/new", "right")
    not_published(world, "ada/rights", "right", token="hf_bob")
    assert world.hub.repos["ada/rights"].refs == before
    assert not {"ada/new", "bob/new"} & set(world.hub.repos)


READING: dict[str, dict[str, Any]] = {
    **{str(status): {"status": status} for status in (401, 403, 404, 429, 500)},
    "cut": {"cut": True},
    "long": {"announced": 10**6},
    "short": {"announced": 40},
}
METHODS = [("GET", kind) for kind in READING] + [("HEAD", kind) for kind in READING if kind.isdigit()]


@pytest.mark.parametrize(("method", "kind"), METHODS)
@pytest.mark.parametrize("file", [POLICY, "config.json", "model.safetensors"])
def test_errors_of_loading(file: str, method: str, kind: str, world: World, logits: tuple[Tensor, Tensor]) -> None:
    base, name = (f"org/{part}-{file}-{kind}-{method}" for part in ("base", "policy"))
    world.add(name, base_model=base, revision=world.hub.add(base, world.base))
    with world.hub.failing(f"{method} /.*{kind}-{method}/resolve/.*/{file}", **READING[kind]):
        refused(world.reader.attempt(load, name), name if file == POLICY else base)
    same(world.reader.call(load, name), logits[1])


def test_what_was_downloaded_before_is_enough(world: World, logits: tuple[Tensor, Tensor]) -> None:
    world.push("ada/offline")
    same(world.reader.call(load, "ada/offline"), logits[1])
    with world.hub.failing(".*", 500):
        same(world.reader.call(load, "ada/offline"), logits[1])
    with world.hub.recording() as requests:
        same(world.reader.call(load, "ada/offline", local_files_only=True), logits[1])
        refused(world.reader.attempt(load, "ada/unseen", local_files_only=True), "ada/unseen")
    assert not requests
