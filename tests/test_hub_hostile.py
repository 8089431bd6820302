"""Policies, models, cards and folders that mean harm: one clear error each; nothing is written, sent or executed.

What a hostile `sparse_config.json` may hold is in `test_policy`.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.hub_client import BASE, World, command, exits, load, patch, push, refused

pytest_plugins = ["tests.hub_fixture"]
pytestmark = pytest.mark.usefixtures("untouched")

POLICY = "sparse_config.json"
SIDE_EFFECT = "executed.txt"
BESIDE_OR_BASE = pytest.mark.parametrize("weights", [True, False], ids=["beside the policy", "in the base"])


def add_model(world: World, name: str, files: dict[str, bytes | None], weights: bool) -> str:
    """A model, and a policy beside it or in a repository of its own; gives where the policy is."""
    if weights:
        world.add(name, {**world.base, **files}, weights=True)
        return name
    world.hub.add(name, {**world.base, **files})
    world.add(f"{name}-policy", base_model=name, revision=None)
    return f"{name}-policy"


@pytest.mark.parametrize(("announced", "words"), [(8 << 20, "at most"), (-1, "does not say how large")])
def test_a_huge_policy_is_not_downloaded(announced: int, words: str, world: World) -> None:
    name = f"evil/huge{announced}"
    world.add(name)
    with world.hub.failing(f".*/{name}/resolve/.*/{POLICY}", announced=announced), world.hub.recording() as requests:
        refused(world.reader.attempt(load, name), name, words)
        refused(world.reader.attempt(patch, name), name, words)
        exits(world.reader.attempt(command, "publish", name, "ada/out"), name, words)
    assert not [request for request in requests if request.startswith("GET") and POLICY in request]


BASES = [
    "/etc/passwd",
    "/",
    "../base",
    "C:\\base",
    "org/base/config.json",
    "https://example.com/org/base",
    "org/base\n",
]
REVISIONS: list[Any] = ["../../x", "/etc", "", "a\nb", "x" * 10_000, 5, ["main"]]
HARMFUL: list[tuple[dict[str, Any], str]] = [
    *(({"base_model": base}, "base") for base in [*BASES, "", "x" * 10_000]),
    *(({"revision": revision}, "revision") for revision in REVISIONS),
    ({"alpha": -1}, f"evil/named/{POLICY}: alpha must be"),
    ({"base_model": "org/none", "revision": None}, "org/none"),
    ({"revision": "0" * 40}, BASE),
    # Policies that name each other.
    ({"base_model": "evil/named", "revision": None}, "evil/"),
    ({"base_model": "evil/other", "revision": None}, "evil/"),
]


@pytest.mark.parametrize(("fields", "words"), HARMFUL, ids=[str(fields)[:40] for fields, _ in HARMFUL])
def test_a_policy_that_leads_elsewhere(fields: dict[str, Any], words: str, world: World) -> None:
    files: dict[str, bytes | None] = {"config.json": world.base["config.json"]}
    world.add("evil/other", files, base_model="evil/named", revision=None)
    world.add("evil/named", files, **fields)
    with world.hub.recording() as requests:
        refused(world.reader.attempt(load, "evil/named"), words)
    assert len(requests) < 60
    if words != "evil/":
        exits(world.reader.attempt(command, "publish", "evil/named", "ada/out"))
    if words == "base":
        assert all("/evil/named/" in request for request in requests), "nothing else may be asked for"


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a/b/c", "https://example.com/x", "org/base\n", "", "~/x", ".."]
)
def test_a_repository_that_is_none(name: str, world: World) -> None:
    with world.hub.recording() as requests:
        refused(world.reader.attempt(load, name))
        refused(world.reader.attempt(patch, name))
        refused(world.writer.attempt(push, name))
        exits(world.reader.attempt(command, "publish", BASE, name))
    assert all(f"/{BASE}" in request for request in requests)


def code(world: World, model_type: str) -> dict[str, bytes | None]:
    """A configuration that names code, and the code."""
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    config = json.loads(world.base["config.json"]) | {"model_type": model_type, "auto_map": names}
    evil = f"import pathlib\npathlib.Path({str(world.folder / SIDE_EFFECT)!r}).write_text('')\n".encode()
    return {"config.json": json.dumps(config).encode(), "evil.py": evil, "custom_generate/generate.py": evil}


@pytest.mark.parametrize("model_type", ["evil", "llama"])
@BESIDE_OR_BASE
def test_code_in_a_repository_is_not_run(weights: bool, model_type: str, world: World) -> None:
    name = add_model(world, f"evil/code-{model_type}-{weights}", code(world, model_type), weights)
    loaded = world.reader.attempt(load, name)
    published = world.reader.attempt(command, "publish", name, "ada/out", "--dry-run")
    assert "[y/N]" not in published.value["out"], "nobody may be asked whether to run it"
    if model_type == "evil":  # only its own code can read it
        refused(loaded, "custom code")
        exits(published)
    else:  # what transformers knows is read by transformers
        assert loaded.error is None


def test_code_is_run_where_the_caller_wants_it(world: World) -> None:
    """So the code above would have been noticed."""
    name = add_model(world, "evil/wanted", code(world, "evil"), weights=True)
    assert world.reader.attempt(load, name, trust_remote_code=True).error  # it defines nothing
    (world.folder / SIDE_EFFECT).unlink()


class _Pickled:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@BESIDE_OR_BASE
def test_pickled_weights_are_not_opened(weights: bool, world: World) -> None:
    bomb = pickle.dumps(_Pickled(str(world.folder / SIDE_EFFECT)))
    pickle.loads(bomb).close()
    (world.folder / SIDE_EFFECT).unlink()  # it works
    base = f"evil/pickle-{weights}"
    name = add_model(world, base, {"model.safetensors": None, "pytorch_model.bin": bomb}, weights)
    with world.hub.recording() as requests:
        refused(world.reader.attempt(load, name), base, "safetensors")
    assert not [request for request in requests if request.startswith("GET") and "pytorch_model.bin" in request]


INDEX = "model.safetensors.index.json"
BROKEN: dict[str, dict[str, bytes | None]] = {
    "truncated weights": {"model.safetensors": struct.pack("<Q", 2000) + b'{"a": '},
    "a header without end": {"model.safetensors": struct.pack("<Q", 2**62) + b"{}"},
    "weights that are a web page": {"model.safetensors": b"<html>" * 100},
    "shards elsewhere": {
        "model.safetensors": None,
        INDEX: b'{"metadata": {}, "weight_map": {"lm_head.weight": "../../../x.safetensors"}}',
    },
    "an index that is none": {"model.safetensors": None, INDEX: b"[]"},
    "no weights": {"model.safetensors": None},
    "a configuration that is a web page": {"config.json": b"<html></html>"},
    "a configuration of another kind": {"config.json": b"[]"},
    "no configuration": {"config.json": None},
    "a model nobody knows": {"config.json": b'{"model_type": "unheard-of"}'},
    "no model type": {"config.json": b"{}"},
}


@pytest.mark.parametrize("kind", BROKEN)
@BESIDE_OR_BASE
def test_a_broken_model(kind: str, weights: bool, world: World) -> None:
    base = f"evil/{kind.replace(' ', '-')}-{weights}"
    name = add_model(world, base, BROKEN[kind], weights)
    refused(world.reader.attempt(load, name), base)
    exits(world.reader.attempt(command, "publish", name, "ada/out", "--weights"), base)


def test_a_model_that_cannot_be_patched(world: World, tmp_path: Path) -> None:
    tiny.unsupported("bloom").save_pretrained(tmp_path)
    files: dict[str, bytes | None] = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    name = add_model(world, "evil/bloom", files, weights=False)
    refused(world.reader.attempt(load, name), "Bloom")
    exits(world.reader.attempt(command, "publish", name, "ada/out", "--weights"), "Bloom")


@pytest.mark.parametrize("linked", ["README.md", POLICY, "config.json"])
def test_links_out_of_a_folder_are_not_followed(linked: str, world: World, tmp_path: Path) -> None:
    """Neither is what they lead to published, nor is it written over."""
    secret, folder = tmp_path / "secret", tmp_path / "folder"
    text = "---\nlicense: mit\n---\nthe secret" if linked == "README.md" else '{"architectures": ["the secret"]}'
    secret.write_text(text)
    folder.mkdir()
    (folder / POLICY).write_text(json.dumps({"base_model": BASE, "revision": world.commit}))
    (folder / linked).unlink(missing_ok=True)
    (folder / linked).symlink_to(secret)
    done = world.reader.call(command, "publish", str(folder), "ada/out", "--dry-run", "--json")
    assert "the secret" not in done["out"] + done["err"]
    if done["code"] == 0:
        shown = {file["path"]: file["bytes"] for file in json.loads(done["out"])["files"]}
        assert shown.get(linked) != len(text)
    world.reader.attempt(command, "card", str(folder))
    assert secret.read_text() == text


CARDS = {
    "binary": b"---\nlicense: mit\n---\n\xff\xfe\x00",
    "broken metadata": b"---\nlicense: [mit\n---\n# Title\n",
    "a list": b"---\n- license\n---\n# Title\n",
    "a number as licence": b"---\nlicense: 5\n---\n# Title\n",
    "a list as licence": b"---\nlicense: [{a: 1}]\n---\n# Title\n",
    "tags that are none": b"---\ntags: {a: 1}\n---\n# Title\n",
    "a number of tags": b"---\ntags: 5\n---\n# Title\n",
    "a word as tags": b"---\ntags: mine\n---\n# Title\n",
    "results that are none": b"---\nmodel-index: 7\n---\n# Title\n",
    "no end": b"---\nlicense: mit\n",
    "only metadata": b"---\nlicense: mit\n---\n",
    "nothing": b"",
    # Runs where YAML is read without care; in the place of COMMAND stands a path.
    "a command": b"---\nlicense: !!python/object/apply:pathlib.Path.touch ['COMMAND']\n---\n# Title\n",
}


@pytest.mark.parametrize("kind", CARDS)
@pytest.mark.parametrize("where", ["base", "repository"])
def test_strange_cards(where: str, kind: str, world: World) -> None:
    """A card is used, or edited, or refused in one line."""
    card = CARDS[kind].replace(b"COMMAND", str(world.folder / SIDE_EFFECT).encode())
    name = kind.replace(" ", "-")
    if where == "base":
        world.hub.add(f"evil/{name}", {**world.base, "README.md": card})
        done = world.reader.call(command, "publish", f"evil/{name}", "ada/new", "--dry-run")
        assert done["code"] == 0, "its own card is not there to be published"
    else:
        world.hub.add(f"ada/{name}", {"README.md": card})
        outcome = world.reader.attempt(command, "publish", BASE, f"ada/{name}", "--dry-run")
        if outcome.value["code"] != 0:
            exits(outcome, "README.md")


@pytest.mark.parametrize("kind", ["itself", "a folder", "a pipe", "a device"])
def test_a_policy_that_is_no_file(kind: str, world: World, tmp_path: Path) -> None:
    path = tmp_path / POLICY
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "itself" else "/dev/zero")
    for name in (str(tmp_path), str(path)):
        refused(world.reader.attempt(load, name), str(tmp_path))
        exits(world.reader.attempt(command, "publish", name, "ada/out"), str(tmp_path))


def test_names_that_lead_elsewhere(world: World) -> None:
    """Only the files that a model needs are asked for, by names that the client made itself."""
    names = ("../../../evil.txt", "/evil.txt", "..\\evil.txt", "a/../../evil.txt")
    world.add("evil/names", {**world.base, **dict.fromkeys(names, b"evil")}, weights=True)
    with world.hub.recording() as requests:
        world.reader.call(load, "evil/names")
    assert not [request for request in requests if "evil.txt" in request]
