"""Repositories that mean harm: one clear error each, and nothing written, sent or executed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.hub_world import BASE, FIELDS, World, exits, refused

SIDE_EFFECT = "executed.txt"


pytest_plugins = ["tests.hub_fixture"]


@pytest.fixture(autouse=True)
def _nothing_happens(world: World) -> Iterator[None]:
    """No file appears but in the cache, and nothing is changed on the Hub."""
    before = _files(world)
    start = len(world.hub.requests)
    yield
    assert _files(world) == before
    assert not [request for request in world.hub.requests[start:] if request.split()[0] in ("POST", "PUT")]


def _files(world: World) -> dict[str, int]:
    top = world.folder.parent
    found = [path for path in top.rglob("*") if not {"cache", "stderr.txt"} & set(path.relative_to(top).parts)]
    return {str(path): path.lstat().st_size for path in found}


def policy(world: World, **fields: Any) -> dict[str, Any]:
    return {"schema_version": 1, "base_model": BASE, "revision": world.commit, **FIELDS, **fields}


def attempts(world: World, name: str, *words: str) -> None:
    """Neither loading, nor patching with it, nor the command line has anything but one error for this repository."""
    refused(world.reader.attempt("load", name=name), *words)
    refused(world.reader.attempt("patch", base=BASE, name=name), *words)
    exits(world.reader.attempt("command", arguments=["publish", name, "ada/out"]), *words)


TEXTS = {
    "nothing": (b"", "JSON"),
    "a web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "JSON"),
    "no object": (b"[1, 2]", "object"),
    "null": (b"null", "object"),
    "binary": (b"\xff\xfe\x00\x01", "UTF-8"),
    "two values": (b"{} {}", "JSON"),
    "nan": (b'{"alpha": NaN}', "NaN"),
    "infinity": (b'{"alpha": -Infinity}', "Infinity"),
    "overflow": (b'{"alpha": 1e999}', "alpha"),
    "400 digits": (b'{"alpha": 1' + b"0" * 400 + b"}", "alpha"),
    "9999 digits": (b'{"min_keys": 1' + b"0" * 9999 + b"}", "digits"),
    "duplicate keys": (b'{"alpha": 2.0, "alpha": 3.0}', "alpha"),
    "duplicate keys inside": (b'{"versions": {"torch": "1", "torch": "2"}}', "torch"),
    "nested deeply": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    "nested": (b'{"x": ' + b"[" * 50 + b"]" * 50 + b"}", "nested"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_no_policy_in_the_file(kind: str, world: World) -> None:
    content, word = TEXTS[kind]
    name = f"evil/{kind.replace(' ', '-')}"
    world.hub.add(name, {"sparse_config.json": content})
    attempts(world, name, name, word)


def test_truncated(world: World) -> None:
    world.hub.add("evil/truncated", {"sparse_config.json": json.dumps(policy(world)).encode()[:-9]})
    attempts(world, "evil/truncated", "JSON")


def test_huge_and_announced(world: World) -> None:
    world.hub.add("evil/huge", {"sparse_config.json": b"{}" + b" " * (64 << 20)})
    attempts(world, "evil/huge", "bytes")
    assert sum(sent for path, sent in world.hub.sent.items() if "evil/huge" in path) < 1 << 16


def test_huge_and_not_announced(world: World) -> None:
    world.hub.add("evil/endless", {"sparse_config.json": b"{}"})
    with world.hub.failing(".*/evil/endless/resolve/.*sparse_config", endless=True):
        attempts(world, "evil/endless", "evil/endless")
    assert sum(sent for path, sent in world.hub.sent.items() if "evil/endless" in path) < 32 << 20


def test_shorter_than_announced(world: World) -> None:
    world.hub.add("evil/short", {"sparse_config.json": json.dumps(policy(world)).encode()})
    with world.hub.failing("GET /evil/short/resolve/.*sparse_config", announced=40):
        attempts(world, "evil/short", "evil/short")


WRONG: list[Any] = [
    "text",
    "",
    "../../x",
    "\ud800",
    "a\nb",
    -1,
    1.5,
    10**400,
    2**80,
    True,
    [],
    [[]],
    [None],
    {},
    {"1": [[1]]},
]
ALLOWED: dict[str, list[Any]] = {
    "alpha": [1.5, 2**80],
    "exponent": [],
    "law": [],
    "keys": [None],
    "fraction": [None],
    "min_keys": [],
    "max_keys": [None],
    "sink_keys": [],
    "recent_keys": [],
    "selector": [],
    "engine": [],
    "dense_layers": [[], None],
    "dense_below": [],
    "per_head": [None],
    "calibration": [{}, {"1": [[1]]}, None],
    "base_model": [None],
    "weights": [True],
    "versions": [{}],
    "quality": [[]],
    "schema_version": [],
}


@pytest.mark.parametrize("field", ALLOWED)
def test_wrong_types(field: str, world: World) -> None:
    name = f"evil/wrong-{field.replace('_', '-')}"
    for value in [*WRONG, None]:
        if any(type(value) is type(allowed) and value == allowed for allowed in ALLOWED[field]):
            continue
        if value is None and field not in ("alpha", "law"):
            continue
        if field == "base_model" and value == "text":
            continue
        world.hub.add(name, {"sparse_config.json": json.dumps(policy(world, **{field: value})).encode()})
        outcome = world.reader.attempt("load", name=name)
        assert outcome.errors, f"{field}={value!r:.50} was taken"
        refused(outcome, field if field not in ("calibration", "schema_version") else "")


INSIDE: dict[str, Any] = {
    "calibration": {
        "model_type": "llama",
        "layers": 2,
        "heads": {"0": 4, "1": 4},
        "base_model": BASE,
        "documents": ["a"],
        "texts_sha256": "0" * 64,
        "fitted_from": 1,
        "fitted_to": 9,
        "target_value": 0.5,
        "reached": 0.4,
        "reached_at": 64,
        "intervals": {"1": [[1.0, 2.0, 0.3, 0.4]] * 4},
        "versions": {"torch": "2"},
    },
    "per_head": {"1": [[2.0, 0.5]] * 4},
    "quality": [{"metric": "perplexity", "length": 64, "value": 2.0, "low": 1.0, "high": 3.0, "density": 0.5}],
    "versions": {"torch": "2"},
}


FOREIGN: list[Any] = [10**400, "x" * 100_000, "\ud800", [[]], {"1": [{"a": 1}]}, True]


def test_wrong_types_further_in(world: World) -> None:
    """Whatever stands where: it is taken, or refused in one line. Nothing else comes out."""
    name = "evil/inside"
    whole = policy(world, **INSIDE)
    places = [place for place in _places(whole) if len(place) > 1]
    assert len(places) > 40
    refusals = 0
    for place in places:
        for value in FOREIGN:
            data = copy.deepcopy(whole)
            inner: Any = data
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            world.hub.add(name, {"sparse_config.json": json.dumps(data).encode()})
            outcome = world.reader.attempt("policy", name=name)
            if outcome.errors:
                refused(outcome, name)
                refusals += 1
    assert refusals > 4 * len(places)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from _places(inner, (*at, key))


@pytest.mark.parametrize(
    "base",
    [
        "/etc/passwd",
        "/",
        "../../base",
        "../base",
        "./base",
        "~/base",
        "C:\\base",
        "\\\\host\\share",
        "org/base/../../x",
        "org/base/config.json",
        "file:///etc/passwd",
        "https://example.com/org/base",
        "org/base@main",
        "org--base",
        "org/base\n",
        "",
        "x" * 10_000,
    ],
)
def test_a_base_that_is_no_hub_id(base: str, world: World) -> None:
    world.hub.add("evil/base", {"sparse_config.json": json.dumps(policy(world, base_model=base)).encode()})
    with world.hub.recording() as requests:
        refused(world.reader.attempt("load", name="evil/base"), "base")
        exits(world.reader.attempt("command", arguments=["publish", "evil/base", "ada/out"]), "base")
    assert all("/evil/base/" in request for request in requests), "nothing else may be asked for"


@pytest.mark.parametrize("revision", ["../../x", "/etc", "refs/../x", "", "a\nb", "x" * 10_000, 5, ["main"]])
def test_a_revision_that_is_none(revision: Any, world: World) -> None:
    world.hub.add("evil/revision", {"sparse_config.json": json.dumps(policy(world, revision=revision)).encode()})
    refused(world.reader.attempt("load", name="evil/revision"), "revision")


def test_a_base_that_does_not_exist(world: World) -> None:
    world.hub.add("evil/nowhere", {"sparse_config.json": json.dumps(policy(world, base_model="org/none")).encode()})
    refused(world.reader.attempt("load", name="evil/nowhere"), "org/none")
    world.hub.add("evil/never", {"sparse_config.json": json.dumps(policy(world, revision="0" * 40)).encode()})
    refused(world.reader.attempt("load", name="evil/never"), BASE)


def test_policies_that_name_each_other(world: World) -> None:
    config = world.base["config.json"]
    for name, base in (("evil/self", "evil/self"), ("evil/one", "evil/two"), ("evil/two", "evil/one")):
        content = json.dumps(policy(world, base_model=base, revision=None)).encode()
        world.hub.add(name, {"sparse_config.json": content, "config.json": config})
    for name in ("evil/self", "evil/one"):
        with world.hub.recording() as requests:
            refused(world.reader.attempt("load", name=name), "evil/")
        assert len(requests) < 60


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


class _Pickled:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("weights", [True, False], ids=["beside the policy", "in the base"])
def test_pickled_weights_are_not_opened(weights: bool, world: World) -> None:
    bomb = pickle.dumps(_Pickled(str(world.folder / SIDE_EFFECT)))
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


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"layers": 3}, "3"),
        ({"heads": {"1": 8}}, "8"),
        ({"heads": {"7": 4}}, "7"),
    ],
)
def test_calibrated_for_another_model(record: dict[str, Any], word: str, world: World) -> None:
    world.hub.add("evil/other", {"sparse_config.json": json.dumps(policy(world, calibration=record)).encode()})
    refused(world.reader.attempt("load", name="evil/other"), word)
    refused(world.reader.attempt("patch", base=BASE, name="evil/other"), word)


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


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a/b/c", "https://example.com/x", "org/base\n", "", "~/x", ".."]
)
def test_a_repository_that_is_none(name: str, world: World) -> None:
    with world.hub.recording() as requests:
        refused(world.reader.attempt("load", name=name))
        refused(world.reader.attempt("patch", base=BASE, name=name))
        refused(world.writer.attempt("push", base=BASE, repo_id=name, fields=FIELDS))
        exits(world.reader.attempt("command", arguments=["publish", BASE, name]))
    assert all(f"/{BASE}" in request for request in requests)
