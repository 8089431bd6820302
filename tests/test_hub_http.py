"""Publish and load over HTTP, with the real client: what was published is what another process loads, or one error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests import tiny
from tests.hub_calls import LENGTH
from tests.hub_client import environment
from tests.hub_world import BASE, FIELDS, World, exits, refused

pytest_plugins = ["tests.hub_fixture"]


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    """Of the base model: dense, and patched as everything that is published here."""
    model = tiny.model("llama")
    ids = tiny.tokens(1, LENGTH)
    dense = tiny.logits(model, ids)[0]
    sparse = tiny.logits(hf_sparse.patch(model, **FIELDS), ids)[0]
    assert (dense - sparse).abs().max() > 1e-2
    return dense, sparse


def publish(repo: str, *options: str) -> list[str]:
    """Arguments that publish the base model with a policy."""
    return ["publish", BASE, repo, *options]


def same(given: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(given), expected, rtol=0, atol=1e-6)


def test_policy_only(world: World, logits: tuple[Tensor, Tensor]) -> None:
    with world.hub.recording() as requests:
        address = world.push("ada/policy")
    assert address.startswith(f"{world.hub.url}/ada/policy/commit/")
    assert sum("/commit/" in request for request in requests) == 1
    files = world.files("ada/policy")
    assert {"sparse_config.json", "README.md"} <= set(files)
    assert not [name for name in files if name.endswith((".safetensors", ".bin"))]
    if "config.json" in files:
        assert files["config.json"] == world.base["config.json"]
    policy = json.loads(files["sparse_config.json"])
    assert (policy["base_model"], policy["revision"]) == (BASE, world.commit)
    same(world.reader.call("load", name="ada/policy"), logits[1])
    same(world.reader.call("patch", base=BASE, name="ada/policy"), logits[1])
    assert world.files(BASE)["config.json"] == world.base["config.json"]


def test_with_weights(world: World, logits: tuple[Tensor, Tensor]) -> None:
    world.push("ada/whole", weights=True)
    files = world.files("ada/whole")
    assert files["config.json"] == world.base["config.json"]
    assert {"model.safetensors", "tokenizer.json", "sparse_config.json", "README.md"} <= set(files)
    same(world.reader.call("dense", name="ada/whole"), logits[0])
    with world.hub.recording() as requests:
        same(world.reader.call("load", name="ada/whole"), logits[1])
    assert not [request for request in requests if BASE in request], "its own weights are to be loaded"
    same(world.reader.call("patch", base=BASE, name="ada/whole"), logits[1])


def test_the_base_model_stays_the_one_it_was(world: World, logits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    tiny.model("llama", seed=1).save_pretrained(folder)
    world.hub.add("org/moving", world.base)
    world.push("ada/pinned", base="org/moving")
    moved = world.hub.add("org/moving", {"model.safetensors": (folder / "model.safetensors").read_bytes()})
    newer = world.reader.attempt("patch", base="org/moving", name="ada/pinned")
    assert [text for text in newer.warnings if "revision" in text and moved in text], newer
    assert (torch.tensor(newer.value) - logits[1]).abs().max() > 1e-2
    same(world.reader.call("load", name="ada/pinned"), logits[1])
    # With both in the cache, transformers does not say which one a model is of.
    unsure = world.reader.attempt("push", base="org/moving", repo_id="ada/moved", fields=FIELDS)
    revision = json.loads(world.files("ada/moved")["sparse_config.json"])["revision"]
    assert revision == moved or [text for text in unsure.warnings if "base_revision" in text], unsure
    world.push("ada/moved", base="org/moving", base_revision=moved)
    assert json.loads(world.files("ada/moved")["sparse_config.json"])["revision"] == moved


def test_private(world: World, logits: tuple[Tensor, Tensor]) -> None:
    world.push("ada/secret", private=True)
    assert world.hub.repos["ada/secret"].private
    for token in ("hf_bob", None):
        refused(world.reader.attempt("load", name="ada/secret", token=token), "ada/secret", "token")
    same(world.reader.call("load", name="ada/secret"), logits[1])


def test_a_branch(world: World, logits: tuple[Tensor, Tensor]) -> None:
    world.push("ada/branches", revision="v1")
    assert world.files("ada/branches") == {}
    assert "sparse_config.json" in world.files("ada/branches", "v1")
    same(world.reader.call("load", name="ada/branches", revision="v1"), logits[1])
    refused(world.reader.attempt("load", name="ada/branches"), "ada/branches")
    refused(world.reader.attempt("load", name="ada/branches", revision="v2"), "ada/branches", "v2")
    world.push("ada/branches", revision="v1", weights=True)
    assert "model.safetensors" in world.files("ada/branches", "v1")


def test_a_pull_request(world: World, logits: tuple[Tensor, Tensor]) -> None:
    world.hub.add("ada/asked", {"notes.txt": b"mine"})
    address = world.push("ada/asked", create_pr=True, token="hf_bob")
    assert address == f"{world.hub.url}/ada/asked/discussions/1"
    assert world.files("ada/asked") == {"notes.txt": b"mine"}
    assert {"sparse_config.json", "notes.txt"} <= set(world.files("ada/asked", "refs/pr/1"))
    same(world.reader.call("load", name="ada/asked", revision="refs/pr/1"), logits[1])
    arguments = publish("ada/asked", "--create-pr", "--weights", "--json")
    outcome = world.writer.call("command", arguments=arguments, token="hf_bob")
    assert json.loads(outcome["out"])["url"] == f"{world.hub.url}/ada/asked/discussions/2"
    assert world.files("ada/asked", "refs/pr/2")["model.safetensors"] == world.base["model.safetensors"]


def test_a_card_is_edited_not_replaced(world: World) -> None:
    theirs = "---\nlicense: mit\ntags: [mine]\n---\n# My title\n\nMy words.\n"
    world.hub.add("ada/card", {"README.md": theirs.encode()})
    world.push("ada/card")
    card = world.files("ada/card")["README.md"].decode()
    for kept in ("license: mit", "mine", "# My title", "My words.", "sparse-attention"):
        assert kept in card
    before = world.hub.repos["ada/card"]["main"].oid
    world.push("ada/card")
    assert world.files("ada/card")["README.md"].decode() == card
    assert world.hub.repos["ada/card"]["main"].oid == before, "nothing changed, so there is nothing to commit"


def test_files_that_are_not_ours_stay(world: World) -> None:
    world.push("ada/mixed")
    world.hub.add("ada/mixed", {"notes.txt": b"mine"})
    world.writer.call("push", base=BASE, repo_id="ada/mixed", fields={**FIELDS, "alpha": 3.0})
    files = world.files("ada/mixed")
    assert files["notes.txt"] == b"mine"
    assert json.loads(files["sparse_config.json"])["alpha"] == 3.0


def test_a_repository_of_something_else(world: World) -> None:
    world.hub.add("ada/taken", {"weights.gguf": b"mine"})
    refused(world.writer.attempt("push", base=BASE, repo_id="ada/taken", fields=FIELDS), "ada/taken", "exists")
    exits(world.writer.attempt("command", arguments=publish("ada/taken")), "ada/taken", "exists")
    assert world.files("ada/taken") == {"weights.gguf": b"mine"}


def test_dry_run(world: World) -> None:
    with world.hub.recording() as requests:
        outcome = world.writer.call("command", arguments=publish("ada/dry", "--dry-run"))
    assert outcome["code"] == 0, outcome
    for word in ("sparse_config.json", "README.md", "base_model: org/base", "sparse-attention"):
        assert word in outcome["out"]
    assert not [request for request in requests if request.split()[0] in ("POST", "PUT")]
    assert "ada/dry" not in world.hub.repos


def test_the_command_in_a_process_of_its_own(world: World, logits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps(FIELDS))
    arguments = publish("ada/command", "--policy", "policy.json", "--private", "--revision", "v1")
    done = subprocess.run(
        [sys.executable, "-m", "hf_sparse.cli", *arguments],
        env=environment(world.hub.url, tmp_path, "hf_ada"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"{world.hub.url}/ada/command/commit/" in done.stdout
    assert world.hub.repos["ada/command"].private
    assert world.files("ada/command") == {}
    same(world.reader.call("load", name="ada/command", revision="v1"), logits[1])


INTERRUPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "commit-cut": ("POST .*/commit/", {"cut": True}),
    "commit-500": ("POST .*/commit/", {"status": 500}),
    "weights-403": ("PUT /lfs/", {"status": 403}),
    "weights-cut": ("PUT /lfs/", {"cut": True}),
    "batch-500": ("POST .*/info/lfs/", {"status": 500}),
    "preupload-429": ("POST .*/preupload/", {"status": 429}),
}


@pytest.mark.parametrize("kind", INTERRUPTED)
def test_an_interrupted_upload(kind: str, world: World, logits: tuple[Tensor, Tensor]) -> None:
    where, fault = INTERRUPTED[kind]
    repo = f"ada/interrupted-{kind}"
    world.hub.stored.clear()
    with world.hub.failing(where, **fault):
        refused(world.writer.attempt("push", base=BASE, repo_id=repo, fields=FIELDS, weights=True), repo)
    assert world.files(repo) == {}
    world.push(repo, weights=True)
    same(world.reader.call("load", name=repo), logits[1])
    assert len(list(world.hub.repos[repo].history())) == 2  # and the first one, which the Hub makes


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
        refused(world.writer.attempt("push", base=BASE, repo_id=repo, fields=FIELDS), repo, str(status), word)
        exits(world.writer.attempt("command", arguments=publish(repo)), repo, str(status), word)
    if "commit" in where:
        assert world.files(repo) == {}
    else:
        assert repo not in world.hub.repos


def test_who_may_publish(world: World) -> None:
    world.push("ada/rights")
    before = world.hub.repos["ada/rights"]["main"].oid
    for repo, token, word in (
        ("ada/new", None, "token"),
        ("ada/new", "hf_expired", "token"),
        ("bob/new", "hf_ada", "right"),
        ("ada/rights", "hf_bob", "right"),
    ):
        outcome = world.writer.attempt("push", base=BASE, repo_id=repo, fields={**FIELDS, "alpha": 3.0}, token=token)
        refused(outcome, repo, word)
        exits(world.writer.attempt("command", arguments=publish(repo), token=token), repo, word)
    assert world.hub.repos["ada/rights"]["main"].oid == before
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
@pytest.mark.parametrize("file", ["sparse_config.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_errors_of_loading(method: str, file: str, kind: str, world: World, logits: tuple[Tensor, Tensor]) -> None:
    if method == "HEAD" and kind in ("cut", "long", "short"):
        return  # there is nothing to cut
    base, name = (f"org/{part}-{file}-{kind}-{method}" for part in ("base", "policy"))
    policy = {**FIELDS, "base_model": base, "revision": world.hub.add(base, world.base)}
    world.hub.add(name, {"sparse_config.json": json.dumps(policy).encode()})
    with world.hub.failing(f"{method} /.*{kind}-{method}/resolve/.*/{file}", **READING[kind]):
        refused(world.reader.attempt("load", name=name), name if file == "sparse_config.json" else base)
    same(world.reader.call("load", name=name), logits[1])


def test_what_was_downloaded_before_is_enough(world: World, logits: tuple[Tensor, Tensor]) -> None:
    world.push("ada/offline")
    same(world.reader.call("load", name="ada/offline"), logits[1])
    with world.hub.failing(".*", 500):
        same(world.reader.call("load", name="ada/offline"), logits[1])
    with world.hub.recording() as requests:
        same(world.reader.call("load", name="ada/offline", local_files_only=True), logits[1])
    assert not requests
    refused(world.reader.attempt("load", name="ada/unseen", local_files_only=True), "ada/unseen")
