"""Publish and load over HTTP, with the real client: what was published is what another process loads, or one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests import tiny
from tests.hub_client import BASE, FIELDS, LENGTH, World, command, dense, exits, load, patch, push, refused

pytest_plugins = ["tests.hub_fixture"]

POLICY = "sparse_config.json"


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    """Of the base model: dense, and patched as everything that is published here."""
    model = tiny.model("llama")
    ids = tiny.tokens(1, LENGTH)
    dense = tiny.logits(model, ids)[0]
    sparse = tiny.logits(hf_sparse.patch(model, **FIELDS), ids)[0]
    assert (dense - sparse).abs().max() > 1e-2
    return dense, sparse


def same(given: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(given), expected, rtol=0, atol=1e-6)


def writes(requests: list[str]) -> list[str]:
    return [request for request in requests if request.split()[0] in ("POST", "PUT")]


def test_policy_only(world: World, logits: tuple[Tensor, Tensor]) -> None:
    with world.hub.recording() as requests:
        address = world.push("ada/policy")
    assert address.startswith(f"{world.hub.url}/ada/policy/commit/")
    assert sum("/commit/" in request for request in requests) == 1
    files = world.files("ada/policy")
    assert set(files) == {POLICY, "README.md", "config.json"}
    assert files["config.json"] == world.base["config.json"]
    policy = json.loads(files[POLICY])
    assert (policy["base_model"], policy["revision"]) == (BASE, world.commit)
    same(world.reader.call(load, "ada/policy"), logits[1])
    same(world.reader.call(patch, "ada/policy"), logits[1])
    assert world.files(BASE)["config.json"] == world.base["config.json"]


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


def test_the_command_publishes_the_same_files(world: World, tmp_path: Path) -> None:
    """For the default configuration, without and with weights."""
    summary = {
        "command": "perplexity",
        "configs": {"grouped": hf_sparse.SparseAttentionConfig().to_dict()},
        "documents": [{"document": "a.txt"}],
        "about": {"model": {"name": "base"}, "dtype": "float32", "device": "cpu"},
        "results": [
            {"method": method, "length": 64, "density": density, "tokens": 40, "perplexity": 2.0, "ratio": 1.0}
            | {"low": 0.9, "high": 1.1}
            for method, density in (("dense", 1.0), ("grouped", 0.5))
        ],
        "adaptive_vs_fixed": [],
    }
    results = tmp_path / "results"
    results.mkdir()
    (results / "summary.json").write_text(json.dumps(summary))
    (results / "perplexity.png").write_bytes(b"a plot")
    for name, more in (("light", []), ("whole", ["--weights"])):
        names = (f"ada/{name}-function", f"ada/{name}-command")
        world.push(names[0], fields={}, results=[str(results)], weights=bool(more))
        done = world.writer.call(command, "publish", BASE, names[1], "--results", str(results), *more)
        assert done["code"] == 0, done
        function, by_command = map(world.files, names)
        card = function["README.md"].decode().replace(f"{name}-function", f"{name}-command")
        assert by_command == function | {"README.md": card.encode()}
        assert {"perplexity/summary.json", "perplexity/perplexity.png"} <= set(function)
        assert len(json.loads(function[POLICY])["quality"]) == 3


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


def test_a_branch(world: World, logits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps(FIELDS))
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
    world.hub.add("ada/asked", {"notes.txt": b"mine"})
    address = world.push("ada/asked", create_pr=True, token="hf_bob")
    assert address == f"{world.hub.url}/ada/asked/discussions/1"
    assert world.files("ada/asked") == {"notes.txt": b"mine"}
    assert {POLICY, "notes.txt"} <= set(world.files("ada/asked", "refs/pr/1"))
    same(world.reader.call(load, "ada/asked", revision="refs/pr/1"), logits[1])
    options = ["--create-pr", "--weights", "--json"]
    done = world.writer.call(command, "publish", BASE, "ada/asked", *options, token="hf_bob")
    assert json.loads(done["out"])["url"] == f"{world.hub.url}/ada/asked/discussions/2"
    assert world.files("ada/asked", "refs/pr/2")["model.safetensors"] == world.base["model.safetensors"]


def test_a_card_is_edited_and_other_files_stay(world: World) -> None:
    theirs = "---\nlicense: mit\ntags: [mine]\n---\n# My title\n\nMy words.\n"
    world.hub.add("ada/card", {"README.md": theirs.encode()})
    world.push("ada/card")
    card = world.files("ada/card")["README.md"].decode()
    for kept in ("license: mit", "mine", "# My title", "My words.", "sparse-attention"):
        assert kept in card
    before = dict(world.hub.repos["ada/card"].refs)
    world.push("ada/card")
    assert world.files("ada/card")["README.md"].decode() == card
    assert world.hub.repos["ada/card"].refs == before, "nothing changed, so there is nothing to commit"
    world.hub.add("ada/card", {"notes.txt": b"mine"})
    world.push("ada/card", fields={**FIELDS, "alpha": 3.0})
    assert world.files("ada/card")["notes.txt"] == b"mine"
    assert json.loads(world.files("ada/card")[POLICY])["alpha"] == 3.0


def test_a_repository_of_something_else(world: World) -> None:
    world.hub.add("ada/taken", {"weights.gguf": b"mine"})
    refused(world.writer.attempt(push, "ada/taken"), "ada/taken", "exists")
    exits(world.writer.attempt(command, "publish", BASE, "ada/taken"), "ada/taken", "exists")
    assert world.files("ada/taken") == {"weights.gguf": b"mine"}


def test_dry_run(world: World) -> None:
    with world.hub.recording() as requests:
        done = world.writer.call(command, "publish", BASE, "ada/dry", "--dry-run")
    assert done["code"] == 0, done
    for word in (POLICY, "README.md", "base_model: org/base", "sparse-attention"):
        assert word in done["out"]
    assert not writes(requests)
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
    world.push(repo, weights=True)
    same(world.reader.call(load, repo), logits[1])
    assert len(world.hub.repos[repo].commits) == 2  # with the first one, which the Hub makes


def test_an_upload_survives_a_connection_that_breaks_once(world: World) -> None:
    world.hub.stored.clear()
    with world.hub.failing("PUT /lfs/", cut=True, times=1):
        world.push("ada/lucky", weights=True)
    assert world.files("ada/lucky")["model.safetensors"] == world.base["model.safetensors"]


@pytest.mark.parametrize(
    ("status", "word"),
    [(401, "token"), (403, "right"), (404, ""), (409, "again"), (412, "again"), (429, "requests"), (500, "later")],
)
@pytest.mark.parametrize("where", ["POST /api/repos/create", "POST .*/commit/"], ids=["create", "commit"])
def test_errors_of_publishing(where: str, status: int, word: str, world: World) -> None:
    repo = f"ada/error-{status}-{len(where)}"
    with world.hub.failing(where, status, headers={"Retry-After": "0"}):
        refused(world.writer.attempt(push, repo), repo, str(status), word)
        exits(world.writer.attempt(command, "publish", BASE, repo), repo, str(status), word)
    if "commit" in where:
        assert world.files(repo) == {}
    else:
        assert repo not in world.hub.repos


def test_who_may_publish(world: World) -> None:
    world.push("ada/rights")
    before = dict(world.hub.repos["ada/rights"].refs)
    for repo, token, word in (
        ("ada/new", None, "token"),
        ("ada/new", "hf_expired", "token"),
        ("bob/new", "hf_ada", "right"),
        ("ada/rights", "hf_bob", "right"),
    ):
        outcome = world.writer.attempt(push, repo, fields={**FIELDS, "alpha": 3.0}, token=token)
        refused(outcome, repo, word)
        exits(world.writer.attempt(command, "publish", BASE, repo, token=token), repo, word)
    assert world.hub.repos["ada/rights"].refs == before
    assert not {"ada/new", "bob/new"} & set(world.hub.repos)


READING: dict[str, dict[str, Any]] = {
    "401": {"status": 401},
    "403": {"status": 403},
    "404": {"status": 404},
    "429": {"status": 429, "headers": {"Retry-After": "0"}},
    "500": {"status": 500},
    "cut": {"cut": True},
    "long": {"announced": 10**6},
    "short": {"announced": 40},
}


@pytest.mark.parametrize("kind", READING)
@pytest.mark.parametrize("file", [POLICY, "config.json", "model.safetensors"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_errors_of_loading(method: str, file: str, kind: str, world: World, logits: tuple[Tensor, Tensor]) -> None:
    if method == "HEAD" and kind in ("cut", "long", "short"):
        return  # there is nothing to cut
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
    assert not requests
    refused(world.reader.attempt(load, "ada/unseen", local_files_only=True), "ada/unseen")
