"""Publish and load over HTTP, with the real client: what was published is what another process loads, or one error."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests import small, tiny
from tests.hub_client import BASE, LENGTH, POLICY, World, dense, load, patch, publish, push, refused

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


def same(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


def not_published(repo: str, *words: str) -> None:
    """Neither the function nor the command publishes: one error with the name of the repository and these words."""
    refused([repo, *words], push, repo, config=OTHER)
    refused([repo, *words], publish, repo)


def test_policy_only(world: World, logits: tuple[Tensor, Tensor]) -> None:
    with world.hub.recording() as requests:
        address = push("policy")
    assert address.startswith(f"{world.hub.url}/ada/policy/commit/"), "a name alone is one of one's own"
    assert sum("/commit/" in request for request in requests) == 1
    files = world.files("ada/policy")
    assert set(files) == {POLICY, "README.md", "config.json"}
    assert files["config.json"] == world.base["config.json"]
    policy = json.loads(files[POLICY])
    assert (policy["base_model"], policy["revision"]) == (BASE, world.commit)
    world.elsewhere()
    same(load("ada/policy"), logits[1])
    same(patch("ada/policy"), logits[1])
    assert world.files(BASE) == world.base


def test_with_weights(world: World, logits: tuple[Tensor, Tensor]) -> None:
    push("ada/whole", weights=True)
    files = world.files("ada/whole")
    assert files["config.json"] == world.base["config.json"]
    assert {"model.safetensors", "tokenizer.json", POLICY, "README.md"} <= set(files)
    world.elsewhere()
    same(dense("ada/whole"), logits[0])
    with world.hub.recording() as requests:
        same(load("ada/whole"), logits[1])
    assert not [request for request in requests if BASE in request], "its own weights are to be loaded"
    same(patch("ada/whole"), logits[1])


@pytest.mark.parametrize("more", [[], ["--weights"]], ids=["light", "whole"])
def test_the_command_publishes_the_same_files(more: list[str], world: World, tmp_path: Path) -> None:
    """For the default configuration."""
    results = str(small.save_results(tmp_path, hf_sparse.SparseAttentionConfig()))
    (tmp_path / "perplexity.png").write_bytes(b"a plot")
    by_function, by_command = (f"ada/{kind}{len(more)}" for kind in ("function", "command"))
    push(by_function, config=hf_sparse.SparseAttentionConfig(), results=[results], weights=bool(more))
    publish(by_command, "--results", results, *more)
    files = world.files(by_function)
    card = files["README.md"].decode().replace("function", "command")
    assert world.files(by_command) == files | {"README.md": card.encode()}
    assert {"perplexity/summary.json", "perplexity/perplexity.png"} <= set(files)
    assert len(json.loads(files[POLICY])["quality"]) == 20


def test_the_base_model_stays_the_one_it_was(world: World, logits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    tiny.model("llama", seed=1).save_pretrained(tmp_path)
    world.hub.add("org/moving", world.base)
    push("ada/pinned", base="org/moving")
    moved = world.hub.add("org/moving", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    world.elsewhere()
    with pytest.warns(UserWarning, match=f"made for revision .* at {moved}"):
        newer = patch("ada/pinned", base="org/moving")
    assert (newer - logits[1]).abs().max() > 1e-2
    same(load("ada/pinned"), logits[1])
    # With both in the cache, transformers does not say which one a model is of.
    with pytest.warns(UserWarning, match="does not pin it: pass base_revision="):
        push("ada/moved", base="org/moving")
    push("ada/moved", base="org/moving", base_revision=moved)
    assert json.loads(world.files("ada/moved")[POLICY])["revision"] == moved


def test_private(world: World, logits: tuple[Tensor, Tensor]) -> None:
    push("ada/secret", private=True)
    assert world.hub.repos["ada/secret"].private
    same(load("ada/secret"), logits[1])
    refused("exists and is public", push, BASE, private=True, create_pr=True)
    world.elsewhere()
    for token in ("hf_bob", None):
        world.log_in(token)
        refused(["ada/secret", "token"], load, "ada/secret")


def test_a_branch(world: World, logits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps(small.CONFIG.to_dict()))
    done = publish("ada/branches", "--policy", str(tmp_path / "policy.json"), "--private", "--revision", "v1")
    assert f"{world.hub.url}/ada/branches/commit/" in done
    assert world.hub.repos["ada/branches"].private
    assert world.files("ada/branches") == {}
    assert POLICY in world.files("ada/branches", "v1")
    same(load("ada/branches", revision="v1"), logits[1])
    refused("ada/branches", load, "ada/branches")
    refused(["ada/branches", "v2"], load, "ada/branches", revision="v2")
    push("ada/branches", revision="v1", weights=True)
    assert "model.safetensors" in world.files("ada/branches", "v1")


def test_a_pull_request(world: World, logits: tuple[Tensor, Tensor]) -> None:
    """To a repository of something else, which is not published in."""
    world.hub.add("ada/asked", {"weights.gguf": b"mine"})
    not_published("ada/asked", "exists")
    world.log_in("hf_bob")
    address = push("ada/asked", create_pr=True)
    assert address == f"{world.hub.url}/ada/asked/discussions/1"
    assert world.files("ada/asked") == {"weights.gguf": b"mine"}
    files = set(world.files("ada/asked", "refs/pr/1"))
    assert files == {POLICY, "README.md", "weights.gguf"}, "a configuration would be that of the weights that are there"
    same(load("ada/asked", revision="refs/pr/1"), logits[1])
    done = json.loads(publish("ada/asked", "--create-pr", "--weights", "--json"))
    assert done["url"] == f"{world.hub.url}/ada/asked/discussions/2"
    assert world.files("ada/asked", "refs/pr/2")["model.safetensors"] == world.base["model.safetensors"]


def test_a_card_is_edited_and_other_files_stay(world: World) -> None:
    world.hub.add("ada/card", {"README.md": b"---\nlicense: mit\n---\n# My title\n\nMy words.\n"})
    push("ada/card")
    card = world.files("ada/card")["README.md"].decode()
    for kept in ("license: mit", "# My title\n\nMy words.", "sparse-attention"):
        assert kept in card
    before = dict(world.hub.repos["ada/card"].refs)
    push("ada/card")
    assert world.hub.repos["ada/card"].refs == before, "nothing changed, so there is nothing to commit"
    world.hub.add("ada/card", {"notes.txt": b"mine"})
    push("ada/card", config=OTHER)
    assert world.files("ada/card")["notes.txt"] == b"mine"
    assert json.loads(world.files("ada/card")[POLICY])["alpha"] == 3.0


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits for seconds before it tries again."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(time=time.time, sleep=lambda _: None))


CREATE, COMMIT = "POST /api/repos/create", "POST .*/commit/"
STATUS = {401: "token", 403: "right", 404: "", 409: "again", 412: "again", 429: "requests", 500: "later"}
FAULTS: list[tuple[str, dict[str, Any], str]] = [
    *((where, {"status": status}, word) for where in (CREATE, COMMIT) for status, word in STATUS.items()),
    (COMMIT, {"cut": True}, ""),
    ("PUT /lfs/", {"status": 403}, ""),
    ("PUT /lfs/", {"cut": True}, ""),
    ("POST .*/info/lfs/", {"status": 500}, ""),
    ("POST .*/preupload/", {"status": 429}, ""),
]


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize(("where", "fault", "word"), FAULTS)
def test_an_upload_that_fails(
    where: str, fault: dict[str, Any], word: str, world: World, logits: tuple[Tensor, Tensor]
) -> None:
    repo = f"ada/failing-{len(world.hub.repos)}"
    world.hub.stored.clear()
    with world.hub.failing(where, **fault):
        refused([repo, word, str(fault.get("status", ""))], push, repo, weights=True)
        refused([repo, word], publish, repo, "--weights")
    assert repo not in world.hub.repos if where == CREATE else world.files(repo) == {}
    push(repo, weights=True)
    same(load(repo), logits[1])
    assert len(world.hub.repos[repo].commits) == 2  # with the first one, which the Hub makes


def test_who_may_publish(world: World) -> None:
    push("ada/rights")
    before = dict(world.hub.repos["ada/rights"].refs)
    for token, repo, word in (
        ("hf_ada", "bob/new", "right"),
        ("hf_bob", "ada/rights", "right"),
        ("hf_expired", "ada/new", "token"),
        (None, "ada/new", "token"),
    ):
        world.log_in(token)
        not_published(repo, word)
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
        refused(name if file == POLICY else base, load, name)
    same(load(name), logits[1])


def test_what_was_downloaded_before_is_enough(world: World, logits: tuple[Tensor, Tensor]) -> None:
    push("ada/offline")
    same(load("ada/offline"), logits[1])
    with world.hub.failing(".*", 500):
        same(load("ada/offline"), logits[1])
    with world.hub.recording() as requests:
        same(load("ada/offline", local_files_only=True), logits[1])
        refused("ada/unseen", load, "ada/unseen", local_files_only=True)
    assert not requests
