"""`CalibrationRecord`: JSON in and out, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse import CalibrationRecord
from hf_sparse.schema import TARGETS

_NAMES = st.lists(st.text("abc_-.0", min_size=1, max_size=8).filter(lambda x: ".." not in x), max_size=3).map(tuple)
_POSITIVE = st.floats(1e-3, 1.0)


@st.composite
def records(draw: st.DrawFn) -> CalibrationRecord:
    layers = draw(st.lists(st.integers(0, 40), unique=True, max_size=3))
    first = draw(st.integers(0, 1000))
    interval = st.tuples(st.floats(0, 1), st.floats(1, 9), st.floats(-1, 0.5), st.floats(0.5, 2))
    rows = st.lists(interval, min_size=1, max_size=3).map(tuple)
    return CalibrationRecord(
        model_type=draw(st.sampled_from(["", "llama"])),
        architecture=draw(st.sampled_from(["", "LlamaForCausalLM"])),
        layers=len(layers),
        heads={layer: draw(st.integers(1, 64)) for layer in layers},
        base_model=draw(st.none() | st.just("someone/model")),
        revision=draw(st.none() | st.just("0" * 40)),
        selector="grouped",
        documents=draw(_NAMES),
        texts_sha256=draw(st.sampled_from(["", "0f" * 32])),
        held_out=draw(_NAMES),
        fitted_from=first,
        fitted_to=first + draw(st.integers(0, 10_000)),
        target=draw(st.sampled_from(TARGETS)),
        target_value=draw(_POSITIVE),
        reached=draw(st.none() | _POSITIVE),
        reached_at=draw(st.none() | st.integers(1, 10_000)),
        intervals=draw(st.none() | st.fixed_dictionaries(dict.fromkeys(layers, rows))),
        versions={"torch": "2.13.0"},
    )


@given(records())
def test_json_round_trip(record: CalibrationRecord) -> None:
    text = json.dumps(record.to_dict(), allow_nan=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = CalibrationRecord.from_dict(json.loads(text))
    assert again == record
    assert json.dumps(again.to_dict()) == text


def test_fields_of_a_newer_release_are_kept_with_a_warning() -> None:
    data = CalibrationRecord(layers=3).to_dict() | {"schema_version": 7, "mood": {"of": ["the", 1]}}
    with pytest.warns(UserWarning, match="calibration has fields.*mood.*schema 7"):
        record = CalibrationRecord.from_dict(data)
    assert record.to_dict() == data
    assert dataclasses.replace(record, extra={}) == CalibrationRecord(layers=3)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("model_type", 3, "one line of text"),
        ("architecture", "a\nb", "one line of text"),
        ("selector", "x" * 101, "at most 100 characters"),
        ("layers", -1, "whole number, at least 0"),
        ("layers", 1.0, "whole number, at least 0"),
        ("heads", [4], "mapping"),
        ("heads", {0: 0}, "at least 1"),
        ("heads", {"x": 1}, "whole number"),
        ("heads", {"²": 1}, "whole number"),
        ("heads", {0: 4, "0": 4}, "each layer once"),
        ("base_model", "/home/me/model", "not a path"),
        ("base_model", "../model", "not a path"),
        ("revision", 5, "one line of text"),
        ("documents", "one.txt", "list of names"),
        ("documents", ["a.txt", "/data/b.txt"], "not a path"),
        ("documents", ["C:\\b.txt"], "not a path"),
        ("held_out", ["a/../../b"], "not a path"),
        ("texts_sha256", "abc", "64 hexadecimal digits"),
        ("texts_sha256", "X" * 64, "64 hexadecimal digits"),
        ("fitted_from", True, "whole number"),
        ("fitted_to", "4096", "whole number"),
        ("target", "speed", "density, output_error, perplexity_ratio, retrieval_loss"),
        ("target", ["density"], "density, output_error, perplexity_ratio, retrieval_loss"),
        ("target_value", 1.5, "at most 1"),
        ("target_value", 0, "above 0"),
        ("target_value", math.nan, "finite"),
        ("reached", math.inf, "finite"),
        ("reached", -0.5, "at least 0"),
        ("reached_at", 0, "at least 1"),
        ("intervals", 3, "mapping"),
        ("intervals", {0: 3}, "one interval per head"),
        ("intervals", {0: [(1.0, 2.0, 0.1)]}, "alpha low, alpha high, exponent low, exponent high"),
        ("intervals", {0: [(2.0, 1.0, 0.1, 0.2)]}, "at least 2"),
        ("intervals", {0: [(1.0, 2.0, 0.3, 0.2)]}, "at least 0.3"),
        ("intervals", {0: [("1", 2.0, 0.3, 0.2)]}, "finite number"),
        ("intervals", {0: [], "0": []}, "each layer once"),
        ("versions", ["torch"], "mapping"),
        ("versions", {"torch": 2}, "one line of text"),
        ("extra", {"layers": 1}, "names of fields"),
    ],
)
def test_what_is_refused(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        CalibrationRecord(**{field: value})
    assert allowed in str(caught.value)


def test_fields_that_go_together() -> None:
    with pytest.raises(ValueError, match=r"fitted_to must be at least fitted_from \(512\); got 256"):
        CalibrationRecord(fitted_from=512, fitted_to=256)
    assert CalibrationRecord(target="perplexity_ratio", target_value=1.01).target_value == 1.01
    assert CalibrationRecord.from_dict({}) == CalibrationRecord()
