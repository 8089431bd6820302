"""`sparse_config.json`: what is written, what is read back, and what is refused with one clear error."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse import CalibrationRecord, SparseAttentionConfig
from hf_sparse.config import Origin, Policy, is_hub_id
from hf_sparse.config.files import MAX_BYTES, NAME, load, read, write
from hf_sparse.errors import UserError
from hf_sparse.schema import QualityRecord

POLICY = Policy(
    SparseAttentionConfig(
        per_head={1: ((4.0, 0.5), (2.0, 0.7))},
        calibration=CalibrationRecord(layers=2, heads={0: 2, 1: 2}, fitted_to=8192, documents=("a [b].txt",)),
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
    write(POLICY, tmp_path / "new" / NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "new" / NAME) == POLICY
    assert [path.name for path in (tmp_path / "new").iterdir()] == [NAME]


def test_the_file_is_flat_readable_json(tmp_path: Path) -> None:
    write(POLICY, tmp_path / NAME)
    text = (tmp_path / NAME).read_text()
    data = json.loads(text)
    assert data["alpha"] == 8.0
    assert data["base_model"] == "someone/model"
    assert data["calibration"]["documents"] == ["a [b].txt"]
    assert "[4.0, 0.5]" in text
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize("data", [{}, {"alpha": 3}, {"schema_version": 1, "exponent": 0.5, "alpha": 3.0}])
def test_a_configuration_alone_is_a_policy_and_fields_have_defaults(data: dict[str, Any], tmp_path: Path) -> None:
    config = SparseAttentionConfig(alpha=data.get("alpha", 8.0))
    for given in (data, config.to_dict()):
        assert read(_write(tmp_path, given)) == Policy(config)


def test_fields_of_a_newer_release_survive_with_a_warning(tmp_path: Path) -> None:
    data = {**POLICY.to_dict(), "schema_version": 9, "sampler": {"kind": "x", "n": [1, 2]}}
    with pytest.warns(UserWarning, match=r"sampler.*schema 9"):
        policy = read(_write(tmp_path, data))
    assert policy.to_dict() == data


REFUSED: list[tuple[Any, str]] = [
    ("", "it must be JSON"),
    ("{} {}", "it must be JSON"),
    ('{"alpha": 8', "it must be JSON"),
    ("<!DOCTYPE html><html><body>Sign in</body></html>", "it must be JSON"),
    (b"\xff\xfe\x00\x01", "it must be UTF-8"),
    ("[1, 2]", "it must hold a JSON object; got list"),
    ('"x"', "it must hold a JSON object"),
    ("null", "it must hold a JSON object"),
    ('{"alpha": NaN}', "numbers must be finite; got NaN"),
    ('{"alpha": -Infinity}', "numbers must be finite; got -Infinity"),
    ('{"alpha": 1e999}', "alpha must be a finite number"),
    ('{"alpha": 1' + "0" * 400 + "}", "alpha must be a finite number"),
    ('{"new": 1e999}', "extra must be what JSON can hold"),
    ('{"min_keys": 1' + "0" * 9999 + "}", "digits"),
    ('{"alpha": 1, "alpha": 2}', "each key must stand once; got 'alpha' 2 times"),
    ('{"calibration": {"layers": 1, "layers": 2}}', "each key must stand once; got 'layers' 2 times"),
    ('{"versions": {"torch": "1", "torch": "2"}}', "each key must stand once; got 'torch' 2 times"),
    ('{"new": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested at most 20 deep"),
    ('{"new": ' + "[" * 21 + "]" * 21 + "}", "nested at most 20 deep"),
    ({"alpha": "8"}, "alpha must be a finite number above 0; got '8'"),
    ({"law": "cubic"}, "law must be one of power, fixed, fraction, log; got 'cubic'"),
    ({"schema_version": "1"}, "schema_version must be a whole number"),
    ({"base_model": 5}, "base_model must be one line of text"),
    ({"base_model": "../../etc"}, "base_model must be a Hub id or an absolute path; got '../../etc'"),
    ({"base_model": "a/b/c"}, "base_model must be a Hub id or an absolute path"),
    ({"base_model": "https://example.org/x"}, "base_model must be a Hub id or an absolute path"),
    ({"base_model": "x" * 3_000_000}, "base_model must be one line of text"),
    ({"revision": "../main"}, "revision must be a name, not a path"),
    ({"weights": "yes"}, "weights must be true or false; got 'yes'"),
    ({"versions": ["torch"]}, "versions must be a mapping"),
    ({"quality": {"value": 1}}, "quality must be a list of records"),
    ({"quality": "good"}, "quality must be a list of records"),
    ({"quality": [3]}, "quality[0]: quality record must be a mapping; got 3"),
    ({"quality": [{}, {"speed": 3}]}, "quality[1]: fields must be among metric, method"),
    ({"quality": [{"value": "1.0"}]}, "quality[0]: value must be a finite number; got '1.0'"),
    ({"quality": [{"metric": "My Metric"}]}, "quality[0]: metric must be a name"),
    ({"quality": [{"density": 1.5}]}, "quality[0]: density must be a finite number at least 0 and at most 1"),
    ({"quality": [{"low": 2.0, "high": 1.0}]}, "quality[0]: low must be at most high"),
    ({"quality": [{"model": "/home/me/model"}]}, "quality[0]: model must be a name, not a path"),
    ({"calibration": [1]}, "calibration must be a mapping"),
    ({"calibration": {"target": "speed"}}, "target must be one of density, output_error, perplexity_ratio"),
    ({"per_head": {"0": [[1.0, 2.0]]}}, "per_head[0][0] exponent must be a finite number"),
]


def _refused(path: Path, message: str) -> None:
    """Reading the file is one error: a line with the file's name and this."""
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    assert len(said) < 600


@pytest.mark.filterwarnings("ignore:.*this release does not know")
@pytest.mark.parametrize(("data", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_wrong_is_one_error_with_the_name_of_the_file(data: Any, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path, data)
    _refused(path, message)
    with pytest.raises(UserError, match=re.escape(message)):
        hf_sparse.from_pretrained(path)


WRONG: list[Any] = ["text", "", "../../x", "\ud800", "a\nb", -1, 1.5, 10**400, 2**80, True, None]
WRONG += [[], [[]], [None], {}, {"1": [[1]]}]
# Field -> which of these are right there; for other fields, none is.
RIGHT: dict[str, list[Any]] = {
    "alpha": [1.5, 2**80],
    "keys": [None],
    "fraction": [None],
    "max_keys": [None],
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


@pytest.mark.parametrize("field", POLICY.to_dict())
def test_wrong_types(field: str, tmp_path: Path) -> None:
    for value in WRONG:
        if not any(type(value) is type(right) and value == right for right in RIGHT.get(field, [])):
            _refused(_write(tmp_path, {field: value}), field)


INSIDE: dict[str, Any] = {
    "calibration": {
        "model_type": "llama",
        "layers": 2,
        "heads": {"0": 4, "1": 4},
        "base_model": "someone/model",
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


@pytest.mark.filterwarnings("ignore:.*this release does not know")
def test_wrong_types_further_in(tmp_path: Path) -> None:
    """Whatever stands where: it is taken, or refused in one line. Nothing else comes out."""
    places = [place for place in _places(INSIDE) if len(place) > 1]
    assert len(places) > 40
    refusals = 0
    for place in places:
        for value in FOREIGN:
            data = copy.deepcopy(INSIDE)
            inner: Any = data
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path = _write(tmp_path, data)
            try:
                read(path)
            except UserError:
                _refused(path, NAME)
                refusals += 1
    assert refusals > 4 * len(places)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from _places(inner, (*at, key))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = _write(tmp_path, " " * (MAX_BYTES + 1))
    with pytest.raises(UserError, match=f"must be at most {MAX_BYTES:,} bytes"):
        read(path)
    _write(tmp_path, "{}" + " " * (MAX_BYTES - 2))
    assert read(path) == Policy()


def test_a_policy_is_found_by_folder_and_by_file(tmp_path: Path) -> None:
    write(POLICY, tmp_path / NAME)
    (tmp_path / "mine.json").write_text((tmp_path / NAME).read_text())
    for name in (tmp_path, str(tmp_path), tmp_path / NAME, str(tmp_path / "mine.json")):
        policy = load(name)
        assert policy == POLICY
        assert policy.origin == Origin(str(tmp_path))


@pytest.mark.parametrize("name", ["./nothing", "nothing.json", "a/b/c", "..", "~nobody/x", "user/na me", ""])
def test_a_name_of_nothing_is_refused_before_the_hub_is_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_sparse.config.files.hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match=r"is not a policy|holds no sparse_config\.json"):
        load(name)


def test_where_to_load_the_model_from(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for base, found in (
        (POLICY.base, POLICY.base),
        (Origin(str(tmp_path / "base")), Origin(str(tmp_path / "base"))),
        (Origin(), "names no base model"),
        (Origin(str(tmp_path / "gone")), "there is no such folder"),
    ):
        write(replace(POLICY, base_model=base.name, revision=base.revision), tmp_path / NAME)
        if isinstance(found, Origin):
            assert load(tmp_path).model_origin() == found
        else:
            with pytest.raises(UserError, match=found):
                load(tmp_path).model_origin()
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert load(tmp_path).model_origin() == Origin(str(tmp_path))


def test_spellings_of_earlier_releases(tmp_path: Path) -> None:
    config = read(_write(tmp_path, {"engine": "native", "dense_below": None})).config
    assert (config.engine, config.dense_below) == ("cpu", SparseAttentionConfig().dense_below)


HUB_IDS = ["gpt2", "google/gemma-3-270m", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/_b.c"]
NO_HUB_IDS = ["", "a/b/c", "/a", "a/", "../a", "a..b", "a--b", ".a/b", "a/b ", "a/b\n", "é/b", "C:\\a"]


@pytest.mark.parametrize("name", HUB_IDS + NO_HUB_IDS)
def test_hub_ids(name: str) -> None:
    assert is_hub_id(name) == (name in HUB_IDS)


def test_a_policy_is_made_of_the_right_things() -> None:
    with pytest.raises(ValueError, match="config must be a SparseAttentionConfig; got dict"):
        Policy({})  # type: ignore[arg-type]
