"""`sparse_config.json`: what is written, what is read back, and what is refused with one clear error."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_sparse import CalibrationRecord, SparseAttentionConfig
from hf_sparse.config import Origin, Policy
from hf_sparse.config.files import MAX_BYTES, NAME, load, read, write
from hf_sparse.errors import UserError
from hf_sparse.schema import QualityRecord

POLICY = Policy(
    SparseAttentionConfig(
        per_head={1: ((4.0, 0.5), (2.0, 0.7))},
        calibration=CalibrationRecord(
            model_type="llama",
            layers=2,
            heads={0: 2, 1: 2},
            base_model="someone/model",
            documents=("a [b].txt",),
            texts_sha256="0" * 64,
            fitted_to=8192,
            reached=0.4,
            reached_at=64,
            intervals={1: ((1.0, 2.0, 0.3, 0.4), (1.0, 2.0, 0.3, 0.4))},
            versions={"torch": "2"},
        ),
    ),
    base_model="someone/model",
    revision="0123456789abcdef0123456789abcdef01234567",
    versions={"hf_sparse": "0.1.0"},
    quality=(
        QualityRecord(metric="perplexity", method="dense", length=512, value=17.5, tokens=2048, documents=("a.txt",)),
        QualityRecord(method="grouped", length=512, value=1.01, low=1.0, high=1.02, density=0.5, model="m.gguf"),
    ),
)


def _write(folder: Path, data: Any) -> Path:
    path = folder / NAME
    if not isinstance(data, bytes):
        data = (data if isinstance(data, str) else json.dumps(data)).encode()
    path.write_bytes(data)
    return path


def test_a_policy_is_read_as_it_was_written(tmp_path: Path) -> None:
    """The file is flat, readable JSON."""
    write(POLICY, tmp_path / "new" / NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "new" / NAME) == POLICY
    assert [path.name for path in (tmp_path / "new").iterdir()] == [NAME]
    text = (tmp_path / "new" / NAME).read_text()
    data = json.loads(text)
    assert (data["alpha"], data["base_model"]) == (16.0, "someone/model")
    assert data["calibration"]["documents"] == ["a [b].txt"]
    assert "[4.0, 0.5]" in text
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize("data", [{}, {"alpha": 3}, {"schema_version": 1, "exponent": 0.5, "alpha": 3.0}])
def test_a_configuration_alone_is_a_policy_and_fields_have_defaults(data: dict[str, Any], tmp_path: Path) -> None:
    config = SparseAttentionConfig(alpha=data.get("alpha", 16.0))
    for given in (data, config.to_dict()):
        assert read(_write(tmp_path, given)) == Policy(config)


def test_other_releases(tmp_path: Path) -> None:
    """Fields of a newer one survive with a warning, and spellings of earlier ones are read."""
    data = {**POLICY.to_dict(), "schema_version": 9, "sampler": {"kind": "x", "n": [1, 2]}}
    with pytest.warns(UserWarning, match=r"sampler.*schema 9"):
        policy = read(_write(tmp_path, data))
    assert policy.to_dict() == data
    config = read(_write(tmp_path, {"engine": "native", "dense_below": None})).config
    assert (config.engine, config.dense_below) == ("cpu", SparseAttentionConfig().dense_below)


REFUSED: list[tuple[Any, str]] = [
    ("", "it must be JSON"),
    ("<!DOCTYPE html><html><body>Sign in</body></html>", "it must be JSON"),
    (b"\xff\xfe\x00\x01", "it must be UTF-8"),
    ("[1, 2]", "it must hold a JSON object; got list"),
    ('{"alpha": NaN}', "numbers must be finite; got NaN"),
    ('{"alpha": 1e999}', "alpha must be a finite number"),
    ('{"alpha": 1, "new": 1e999}', "extra must be what JSON can hold"),
    ('{"min_keys": 1' + "0" * 9999 + "}", "digits"),
    ('{"alpha": 1, "alpha": 2}', "each key must stand once; got 'alpha' 2 times"),
    ('{"new": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested at most 20 deep"),
    ('{"new": ' + "[" * 21 + "]" * 21 + "}", "nested at most 20 deep"),
    (" " * (MAX_BYTES + 1), f"must be at most {MAX_BYTES:,} bytes"),
    (
        {"config": {}, "reached": 0.15},
        "it must be a policy; none of its fields is one of a sparse_config.json",
    ),
    ({"base_model": "a/b/c"}, "base_model must be a Hub id or an absolute path; got 'a/b/c'"),
    ({"quality": [{}, {"speed": 3}]}, "quality[1]: fields must be among metric, method"),
    ({"quality": [{"metric": "My Metric"}]}, "quality[0]: metric must be a name"),
    ({"quality": [{"low": 2.0, "high": 1.0}]}, "quality[0]: low must be at most high"),
]


@pytest.mark.filterwarnings("ignore:.*this release does not know")
@pytest.mark.parametrize(("data", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_wrong_is_one_error_with_the_name_of_the_file(data: Any, message: str, tmp_path: Path) -> None:
    assert message in _refused(_write(tmp_path, data))


WRONG: list[Any] = ["../../x", "\ud800", "a\nb", "x" * 100_000, -1, 1.5, 10**400, True, None]
WRONG += [[], [[]], [None], {}, {"1": [[1]]}, {"1": [{"a": 1}]}]
# Field -> which of these are right there, or in the lists in it; for other fields, none is.
RIGHT: dict[str, Any] = {
    **dict.fromkeys(["base_model", "revision", "keys", "fraction", "max_keys", "dense_below"], (None,)),
    **dict.fromkeys(["reached_at", "tokens", "density"], (None,)),
    **dict.fromkeys(["model_type", "architecture", "selector", "method", "hf_sparse", "torch"], ("../../x",)),
    "heads": [{}],
    "versions": [{}],
    "calibration": [{}, {"1": [[1]]}, {"1": [{"a": 1}]}, None],
    "alpha": [1.5],
    "dense_layers": [[], None],
    "documents": [[]],
    "held_out": [[]],
    "high": [1.5, None],
    "intervals": [{}, [], -1, 1.5, None],
    "low": [-1, None],
    "per_head": [1.5, None],
    "quality": [{}, []],
    "reached": [1.5, None],
    "value": [-1, 1.5],
    "weights": [True],
}


@pytest.mark.filterwarnings("ignore:.*this release does not know")
def test_wrong_types_anywhere(tmp_path: Path) -> None:
    """What is right is taken; anything else is refused in one line that names the field, and no other error comes."""
    for *outer, last in _places(POLICY.to_dict()):
        field = [key for key in [*outer, last] if not str(key).isdigit()][-1]
        for value in WRONG:
            data = POLICY.to_dict()
            inner: Any = data
            for key in outer:
                inner = inner[key]
            inner[last] = value
            path = _write(tmp_path, data)
            if any(type(value) is type(right) and value == right for right in RIGHT.get(field, [])):
                with contextlib.suppress(UserError):  # by the place in the list
                    read(path)
            else:
                assert field in _refused(path)


def _refused(path: Path) -> str:
    """Reading the file is one error, a line that begins with the name of the file; gives it."""
    with pytest.raises(UserError) as caught:
        load(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    assert len(said) < 600
    return said


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from _places(inner, (*at, key))


def test_a_policy_is_found_by_folder_and_by_file(tmp_path: Path) -> None:
    write(POLICY, tmp_path / NAME)
    (tmp_path / "mine.json").write_text((tmp_path / NAME).read_text())
    for name in (tmp_path, str(tmp_path), tmp_path / NAME, str(tmp_path / "mine.json")):
        policy = load(name)
        assert policy == POLICY
        assert policy.origin == Origin(str(tmp_path))
    _write(tmp_path, "{}" + " " * (MAX_BYTES - 2))
    assert load(tmp_path) == Policy()


HUB_IDS = ["gpt2", "google/gemma-3-270m", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/_b.c"]
NOTHING = ["", "a/b/c", "/a", "a/", "../a", "a..b", "a--b", ".a/b", "a/b ", "a/b\n", "é/b", "C:\\a", "user/na me"]
NOTHING += ["./nothing", "nothing.json", "..", "~nobody/x"]


@pytest.mark.parametrize("name", HUB_IDS + NOTHING)
def test_what_a_name_stands_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = r"cannot read .*: HF_HUB_OFFLINE is set"
    with pytest.raises(UserError, match=asked if name in HUB_IDS else r"is not a policy|holds no sparse_config\.json"):
        load(name)


def test_a_name_that_is_too_long_is_one_error() -> None:
    with pytest.raises(UserError, match=r"cannot read 'x{50,}\.\.\.: File name too long"):
        load("x" * 300)


@pytest.mark.parametrize(
    ("base", "found"),
    [
        (POLICY.base, POLICY.base),
        (Origin("/"), Origin("/")),
        (Origin(), "names no base model"),
        (Origin("/gone"), "names the base model /gone, and there is no such folder"),
        (Origin("here"), "names here on the Hub, and a folder of that name is here"),
    ],
)
def test_where_to_load_the_model_from(
    base: Origin, found: Origin | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    write(replace(POLICY, base_model=base.name, revision=base.revision), tmp_path / NAME)
    if isinstance(found, Origin):
        assert load(tmp_path).model_origin() == found
    else:
        with pytest.raises(UserError, match=found):
            load(tmp_path).model_origin()
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert load(tmp_path).model_origin() == Origin(str(tmp_path)), "weights beside the policy are meant"


def test_a_policy_is_made_of_the_right_things() -> None:
    with pytest.raises(ValueError, match="config must be a SparseAttentionConfig; got dict"):
        Policy({})  # type: ignore[arg-type]
