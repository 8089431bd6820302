"""Policies, models, cards and folders that mean harm: one clear error each; nothing is written, sent or executed.

What a hostile `sparse_config.json` may hold is in `test_policy`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.hub_client import BASE, POLICY, World, command, load, patch, publish, push, refused

pytestmark = pytest.mark.usefixtures("untouched")

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
        refused([name, words], load, name)
        refused([name, words], patch, name)
        refused([name, words], publish, "ada/out", model=name)
    assert not [request for request in requests if request.startswith("GET") and POLICY in request]


BASES = ["/etc/passwd", "/", "../base", "C:\\base", "org/base/config.json", "https://example.com/org/base", ""]
REVISIONS: list[Any] = ["../../x", "/etc", "", "a\nb", "x" * 10_000, 5, ["main"]]
HARMFUL: list[tuple[dict[str, Any], str]] = [
    *(({"base_model": base}, "must be a Hub id") for base in BASES),
    *(({"base_model": base}, "base_model must be one line of text") for base in ("org/base\n", "x" * 10_000)),
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
        refused(words, load, "evil/named")
    assert len(requests) < 60
    if words != "evil/":
        refused("", publish, "ada/out", model="evil/named")
    if "must be" in words:
        assert all("/evil/named/" in request for request in requests), "nothing else may be asked for"


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a/b/c", "https://example.com/x", "org/base\n", "", "~/x", ".."]
)
def test_a_repository_that_is_none(name: str, world: World) -> None:
    with world.hub.recording() as requests:
        for function in (load, patch, push, publish):
            refused("", function, name)
    assert all(f"/{BASE}" in request for request in requests)


def code(world: World, model_type: str) -> dict[str, bytes | None]:
    """A configuration that names code, and the code."""
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    config = json.loads(world.base["config.json"]) | {"model_type": model_type, "auto_map": names}
    evil = f"import pathlib\npathlib.Path({str(world.here / SIDE_EFFECT)!r}).write_text('')\n".encode()
    return {"config.json": json.dumps(config).encode(), "evil.py": evil, "custom_generate/generate.py": evil}


@pytest.mark.parametrize("model_type", ["evil", "llama"])
@BESIDE_OR_BASE
def test_code_in_a_repository_is_not_run(
    weights: bool, model_type: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = add_model(world, f"evil/code-{model_type}-{weights}", code(world, model_type), weights)
    if model_type == "llama":  # what transformers knows is read by transformers
        load(name)
        publish("ada/out", "--dry-run", model=name)
    else:  # only its own code can read it, and nobody may be asked whether to run it
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        refused("custom code", load, name)
        refused("custom code", publish, "ada/out", "--dry-run", model=name)
        assert list(world.here.iterdir()) == []
        with pytest.raises(ValueError):  # noqa: PT011 - the code defines nothing
            load(name, trust_remote_code=True)
        (world.here / SIDE_EFFECT).unlink()  # it would have been noticed


class _Pickled:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@BESIDE_OR_BASE
def test_pickled_weights_are_not_opened(weights: bool, world: World) -> None:
    bomb = pickle.dumps(_Pickled(str(world.here / SIDE_EFFECT)))
    pickle.loads(bomb).close()
    (world.here / SIDE_EFFECT).unlink()  # it works
    base = f"evil/pickle-{weights}"
    name = add_model(world, base, {"model.safetensors": None, "pytorch_model.bin": bomb}, weights)
    with world.hub.recording() as requests:
        refused([base, "safetensors"], load, name)
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
    refused(base, load, name)
    refused(base, publish, "ada/out", "--weights", model=name)


@pytest.mark.filterwarnings("ignore:.*this release does not know")
@pytest.mark.parametrize(
    ("linked", "words"),
    [("README.md", "is a link that leads out of"), (POLICY, "name it with base_model"), ("config.json", "")],
)
def test_links_out_of_a_folder_are_not_followed(linked: str, words: str, world: World, tmp_path: Path) -> None:
    """Neither is what they lead to published, nor is it written over."""
    secret, folder = tmp_path / "secret", tmp_path / "folder"
    text = '{"alpha": 3.0, "architectures": ["the secret"]}'
    secret.write_text(text)
    folder.mkdir()
    (folder / POLICY).write_text(json.dumps({"base_model": BASE, "revision": world.commit}))
    (folder / linked).unlink(missing_ok=True)
    (folder / linked).symlink_to(secret)
    if words:
        refused(words, publish, "ada/out", "--dry-run", model=str(folder))
    else:  # that of the base model is published
        shown = json.loads(publish("ada/out", "--dry-run", "--json", model=str(folder)))
        assert {"path": linked, "bytes": len(world.base[linked])} in shown["files"]
    with contextlib.suppress(ValueError):
        command("card", str(folder))
    assert secret.read_text() == text


CARDS = {
    "binary": b"---\nlicense: mit\n---\n\xff\xfe\x00",
    "broken metadata": b"---\nlicense: [mit\n---\n# Title\n",
    "a list": b"---\n- license\n---\n# Title\n",
    "a number as licence": b"---\nlicense: 5\n---\n# Title\n",
    "a list as licence": b"---\nlicense: [{a: 1}]\n---\n# Title\n",
    "tags that are none": b"---\ntags: {a: 1}\n---\n# Title\n",
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
    card = CARDS[kind].replace(b"COMMAND", str(world.here / SIDE_EFFECT).encode())
    name = kind.replace(" ", "-")
    if where == "base":
        world.hub.add(f"evil/{name}", {**world.base, "README.md": card})
        publish("ada/new", "--dry-run", model=f"evil/{name}")  # its own card is not there to be published
    else:
        world.hub.add(f"ada/{name}", {"README.md": card})
        try:
            publish(f"ada/{name}", "--dry-run")
        except ValueError:
            refused("README.md", publish, f"ada/{name}", "--dry-run")


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
        refused(str(tmp_path), load, name)
        refused(str(tmp_path), publish, "ada/out", model=name)
