"""Policies that mean harm: one clear error each, and nothing written or sent."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hub_world import BASE, FIELDS, World, exits, policy, refused

pytest_plugins = ["tests.hub_fixture"]
pytestmark = pytest.mark.usefixtures("untouched")


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


WRONG: list[Any] = ["text", "", "../../x", "\ud800", "a\nb", -1, 1.5, 10**400, 2**80, True, None]
WRONG += [[], [[]], [None], {}, {"1": [[1]]}]
# field -> what of these is right there
RIGHT: dict[str, list[Any]] = {
    "schema_version": [],
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
    "dense_below": [None],
    "per_head": [None],
    "calibration": [{}, {"1": [[1]]}, None],
    "base_model": ["text", None],
    "revision": ["text", None],
    "weights": [True],
    "versions": [{}],
    "quality": [[]],
}


@pytest.mark.parametrize("field", RIGHT)
def test_wrong_types(field: str, world: World) -> None:
    name = f"evil/wrong-{field.replace('_', '-')}"
    for value in WRONG:
        if not any(type(value) is type(right) and value == right for right in RIGHT[field]):
            world.hub.add(name, {"sparse_config.json": json.dumps(policy(world, **{field: value})).encode()})
            outcome = world.reader.attempt("load", name=name)
            assert outcome.errors, f"{field}={value!r:.50} was taken"
            refused(outcome, field)


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
        pytest.param("x" * 10_000, id="long"),
    ],
)
def test_a_base_that_is_no_hub_id(base: str, world: World) -> None:
    world.hub.add("evil/base", {"sparse_config.json": json.dumps(policy(world, base_model=base)).encode()})
    with world.hub.recording() as requests:
        refused(world.reader.attempt("load", name="evil/base"), "base")
        exits(world.reader.attempt("command", arguments=["publish", "evil/base", "ada/out"]), "base")
    assert all("/evil/base/" in request for request in requests), "nothing else may be asked for"


@pytest.mark.parametrize(
    "revision", ["../../x", "/etc", "refs/../x", "", "a\nb", pytest.param("x" * 10_000, id="long"), 5, ["main"]]
)
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
