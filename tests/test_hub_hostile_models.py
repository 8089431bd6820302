"""Models, cards and folders that mean harm: one clear error each, and nothing written, sent or executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.hub_world import BASE, FIELDS, World, exits, policy, refused

pytest_plugins = ["tests.hub_fixture"]
pytestmark = pytest.mark.usefixtures("untouched")

SIDE_EFFECT = "executed.txt"


def evil_code(world: World) -> bytes:
    return f"import pathlib\npathlib.Path({str(world.folder / SIDE_EFFECT)!r}).write_text('')\n".encode()


@pytest.mark.parametrize("model_type", ["evil", "llama"])
@pytest.mark.parametrize("where", ["beside the policy", "in the base"])
def test_code_in_a_repository_is_not_run(where: str, model_type: str, world: World) -> None:
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    config = json.loads(world.base["config.json"]) | {"model_type": model_type, "auto_map": names}
    code = evil_code(world)
    files = {
        **world.base,
        "config.json": json.dumps(config).encode(),
        "evil.py": code,
        "custom_generate/generate.py": code,
    }
    base = f"evil/code-{model_type}"
    world.hub.add(base, files)
    name = base
    if where == "beside the policy":
        fields = {"weights": True, "base_model": BASE}
    else:
        name, fields = f"{base}-policy", {"base_model": base, "revision": None}
    world.hub.add(name, {"sparse_config.json": json.dumps(policy(world, **fields)).encode()})
    loaded = world.reader.attempt("load", name=name)
    command = world.reader.attempt("command", arguments=["publish", name, "ada/out", "--dry-run"])
    assert "[y/N]" not in command.value["out"], "nobody may be asked whether to run it"
    if model_type == "evil":  # only its own code can read it
        refused(loaded, "custom code")
        exits(command)
    else:  # what transformers knows is read by transformers
        assert not loaded.errors, loaded.traceback


def test_code_is_run_where_the_caller_wants_it(world: World) -> None:
    """So the code above would have been noticed."""
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config = json.loads(world.base["config.json"]) | {"model_type": "evil", "auto_map": auto_map}
    files = {**world.base, "config.json": json.dumps(config).encode(), "evil.py": evil_code(world)}
    world.hub.add("evil/wanted", {**files, "sparse_config.json": json.dumps(policy(world, weights=True)).encode()})
    assert world.reader.attempt("load", name="evil/wanted", trust_remote_code=True).errors  # it defines nothing
    (world.folder / SIDE_EFFECT).unlink()


class _Pickled:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("weights", [True, False], ids=["beside the policy", "in the base"])
def test_pickled_weights_are_not_opened(weights: bool, world: World) -> None:
    bomb = pickle.dumps(_Pickled(str(world.folder / SIDE_EFFECT)))
    pickle.loads(bomb).close()
    (world.folder / SIDE_EFFECT).unlink()  # it works
    base = {name: content for name, content in world.base.items() if not name.endswith(".safetensors")}
    world.hub.add("evil/pickle", {**base, "pytorch_model.bin": bomb})
    fields: dict[str, Any] = {"weights": True} if weights else {"base_model": "evil/pickle", "revision": None}
    name = "evil/pickle" if weights else "evil/pickle-policy"
    world.hub.add(name, {"sparse_config.json": json.dumps(policy(world, **fields)).encode()})
    with world.hub.recording() as requests:
        refused(world.reader.attempt("load", name=name), "evil/pickle", "safetensors")
    assert not [request for request in requests if request.startswith("GET") and "pytorch_model.bin" in request]


BROKEN: dict[str, dict[str, bytes | None]] = {
    "truncated weights": {"model.safetensors": struct.pack("<Q", 2000) + b'{"a": '},
    "a header without end": {"model.safetensors": struct.pack("<Q", 2**62) + b"{}"},
    "weights that are a web page": {"model.safetensors": b"<html>" * 100},
    "shards elsewhere": {
        "model.safetensors": None,
        "model.safetensors.index.json": b'{"metadata": {}, "weight_map": {"lm_head.weight": "../../../x.safetensors"}}',
    },
    "an index that is none": {"model.safetensors": None, "model.safetensors.index.json": b"[]"},
    "no weights": {"model.safetensors": None},
    "a configuration that is a web page": {"config.json": b"<html></html>"},
    "a configuration of another kind": {"config.json": b"[]"},
    "no configuration": {"config.json": None},
    "a model nobody knows": {"config.json": b'{"model_type": "unheard-of"}'},
    "no model type": {"config.json": b"{}"},
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("weights", [True, False], ids=["beside", "base"])
def test_a_broken_model(kind: str, weights: bool, world: World) -> None:
    base = f"evil/{kind.replace(' ', '-')}"
    world.hub.add(base, {**world.base, **BROKEN[kind]})
    fields: dict[str, Any] = {"weights": True} if weights else {"base_model": base, "revision": None}
    name = base if weights else f"{base}-policy"
    world.hub.add(name, {"sparse_config.json": json.dumps(policy(world, **fields)).encode()})
    refused(world.reader.attempt("load", name=name), base)
    exits(world.reader.attempt("command", arguments=["publish", name, "ada/out", "--weights"]), base)


def test_a_model_that_cannot_be_patched(world: World, tmp_path: Path) -> None:
    tiny.unsupported("bloom").save_pretrained(tmp_path)
    world.hub.add("evil/bloom", {file.name: file.read_bytes() for file in tmp_path.iterdir()})
    fields = {"base_model": "evil/bloom", "revision": None}
    world.hub.add("evil/bloom-policy", {"sparse_config.json": json.dumps(policy(world, **fields)).encode()})
    refused(world.reader.attempt("load", name="evil/bloom-policy"), "Bloom")


@pytest.mark.parametrize("linked", ["README.md", "sparse_config.json", "config.json"])
def test_links_out_of_a_folder_are_not_followed(linked: str, world: World, tmp_path: Path) -> None:
    """Neither is what they lead to published, nor is it written over."""
    secret = tmp_path / "secret"
    text = "---\nlicense: mit\n---\nthe secret" if linked == "README.md" else '{"architectures": ["the secret"]}'
    secret.write_text(text)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "sparse_config.json").write_text(json.dumps(policy(world)))
    (folder / linked).unlink(missing_ok=True)
    (folder / linked).symlink_to(secret)
    outcome = world.reader.attempt("command", arguments=["publish", str(folder), "ada/out", "--dry-run", "--json"])
    assert not outcome.errors, outcome.traceback
    assert "the secret" not in outcome.value["out"] + outcome.value["err"]
    if outcome.value["code"] == 0:
        shown = {file["path"]: file["bytes"] for file in json.loads(outcome.value["out"])["files"]}
        assert shown.get(linked) != len(text)
    world.reader.attempt("save", base=BASE, fields=FIELDS, folder=str(folder))
    assert secret.read_text() == text


def executed(world: World) -> bytes:
    """Metadata that runs a command where YAML is read without care."""
    return f"license: !!python/object/apply:pathlib.Path.touch ['{world.folder / SIDE_EFFECT}']".encode()


CARDS = {
    "binary": b"---\nlicense: mit\n---\n\xff\xfe\x00",
    "broken metadata": b"---\nlicense: [mit\n---\n# Title\n",
    "a list": b"---\n- license\n---\n# Title\n",
    "a number as licence": b"---\nlicense: 5\n---\n# Title\n",
    "a list as licence": b"---\nlicense: [{a: 1}]\n---\n# Title\n",
    "tags that are none": b"---\ntags: {a: 1}\n---\n# Title\n",
    "results that are none": b"---\nmodel-index: 7\n---\n# Title\n",
    "no end": b"---\nlicense: mit\n",
    "only metadata": b"---\nlicense: mit\n---\n",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", [*CARDS, "a command"])
@pytest.mark.parametrize("where", ["the base", "the repository"])
def test_strange_cards(where: str, kind: str, world: World) -> None:
    """A card is used, or edited, or refused in one line."""
    card = CARDS.get(kind) or b"---\n" + executed(world) + b"\n---\n# Title\n"
    name = f"{kind.replace(' ', '-')}-{where[-4:]}"
    base, repo = (f"evil/{name}", "ada/new") if where == "the base" else (BASE, f"ada/{name}")
    world.hub.add(
        base if where == "the base" else repo,
        {**world.base, "README.md": card} if base != BASE else {"README.md": card},
    )
    outcome = world.reader.attempt("command", arguments=["publish", base, repo, "--dry-run"])
    assert not outcome.errors, outcome.traceback
    if outcome.value["code"] != 0:
        assert where == "the repository", "its own card is not there to be published"
        exits(outcome, "card")


@pytest.mark.parametrize("kind", ["itself", "a folder", "a pipe", "a device"])
def test_a_policy_that_is_no_file(kind: str, world: World, tmp_path: Path) -> None:
    path = tmp_path / "sparse_config.json"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "itself" else "/dev/zero")
    for name in (tmp_path, path):
        refused(world.reader.attempt("load", name=str(name)), str(tmp_path))
        exits(world.reader.attempt("command", arguments=["publish", str(name), "ada/out"]), str(tmp_path))


def test_names_that_lead_elsewhere(world: World) -> None:
    """Only the files that a model needs are asked for, by names that the client made itself."""
    elsewhere = dict.fromkeys(("../../../evil.txt", "/evil.txt", "..\\evil.txt", "a/../../evil.txt"), b"evil")
    world.hub.add(
        "evil/names",
        {**world.base, **elsewhere, "sparse_config.json": json.dumps(policy(world, weights=True)).encode()},
    )
    with world.hub.recording() as requests:
        world.reader.call("load", name="evil/names")
    assert not [request for request in requests if "evil.txt" in request]
