"""`SparseAttentionConfig`: what it refuses and how it says so, what it hands to the laws, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse import CalibrationRecord, SparseAttentionConfig
from hf_sparse.engines import ENGINES
from hf_sparse.laws import LAWS
from hf_sparse.selectors import SELECTORS

# Every field that a release may never lose: published files carry them.
FIELDS = {
    "alpha",
    "exponent",
    "law",
    "keys",
    "fraction",
    "min_keys",
    "max_keys",
    "sink_keys",
    "recent_keys",
    "selector",
    "engine",
    "dense_layers",
    "dense_below",
    "per_head",
}


@st.composite
def configs(draw: st.DrawFn) -> SparseAttentionConfig:
    law = draw(st.sampled_from(LAWS))
    least = draw(st.integers(1, 1000))
    pairs = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 1)), min_size=1, max_size=4)
    return SparseAttentionConfig(
        alpha=draw(st.floats(1e-3, 1e3)),
        exponent=draw(st.floats(0, 1)),
        law=law,
        keys=draw(st.integers(1, 10_000)) if law == "fixed" else None,
        fraction=draw(st.floats(1e-3, 1)) if law == "fraction" else None,
        min_keys=least,
        max_keys=draw(st.none() | st.integers(least, 10_000)),
        sink_keys=draw(st.integers(0, 100)),
        recent_keys=draw(st.integers(0, 1000)),
        selector=draw(st.sampled_from(sorted(SELECTORS))),
        engine=draw(st.sampled_from(["auto", *ENGINES])),
        dense_layers=draw(st.none() | st.lists(st.integers(0, 100), max_size=5).map(tuple)),
        dense_below=draw(st.integers(0, 5000)),
        per_head=draw(st.none() | st.dictionaries(st.integers(0, 50), pairs.map(tuple), min_size=1, max_size=3))
        if law == "power"
        else None,
    )


def test_fields_are_all_there_and_have_defaults() -> None:
    assert {f.name for f in dataclasses.fields(SparseAttentionConfig)} >= FIELDS
    SparseAttentionConfig()


@given(configs())
def test_json_round_trip(config: SparseAttentionConfig) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = SparseAttentionConfig.from_dict(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert json.dumps(again.to_dict()) == text


def test_a_file_that_leaves_fields_out_gets_the_defaults() -> None:
    assert SparseAttentionConfig.from_dict({"schema_version": 1, "alpha": 3.0}) == SparseAttentionConfig(alpha=3.0)
    assert SparseAttentionConfig.from_dict({}) == SparseAttentionConfig()


def test_a_newer_file_is_read_with_a_warning_and_written_again_as_it_was() -> None:
    data = {**SparseAttentionConfig(alpha=3.0).to_dict(), "schema_version": 99, "zeta": [1, {"a": None}], "beta": 2}
    with pytest.warns(UserWarning, match=r"beta, zeta.*99"):
        config = SparseAttentionConfig.from_dict(data)
    assert dataclasses.replace(config, extra={}) == SparseAttentionConfig(alpha=3.0)
    assert config.to_dict() == data


@pytest.mark.parametrize("value", [3, {"alpha": 1}, {"a": math.nan}, {"a": object()}])
def test_extra_is_json_and_no_second_field(value: Any) -> None:
    with pytest.raises(ValueError, match="extra"):
        SparseAttentionConfig(extra=value)


@pytest.mark.parametrize("value", ["1", None, 0, True, 1.5])
def test_the_schema_version_is_a_number(value: Any) -> None:
    with pytest.raises(ValueError, match="schema_version"):
        SparseAttentionConfig.from_dict({"schema_version": value})


def test_the_calibration_goes_with_the_config() -> None:
    record = CalibrationRecord(layers=2, heads={0: 4, 1: 4}, fitted_to=4096)
    config = SparseAttentionConfig(calibration=record)
    assert SparseAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(SparseAttentionConfig())
    with pytest.raises(ValueError, match="calibration must be a CalibrationRecord"):
        SparseAttentionConfig(calibration=record.to_dict())  # type: ignore[arg-type]


def test_a_wrong_value_in_a_file_is_an_error_too() -> None:
    with pytest.raises(ValueError, match=r"alpha.*'8'"):
        SparseAttentionConfig.from_dict({"alpha": "8"})


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseAttentionConfig().alpha = 1.0


_NUMBERS = ["alpha", "exponent", "fraction"]
_COUNTS_FROM_ONE = ["min_keys", "max_keys", "keys"]
_COUNTS_FROM_ZERO = ["sink_keys", "recent_keys", "dense_below"]
_LAW_OF = {"fraction": {"law": "fraction"}, "keys": {"law": "fixed"}}


def assert_refused(field: str, value: Any, allowed: str) -> None:
    """The message names the field, the value and what is allowed."""
    with pytest.raises(ValueError, match=field) as caught:
        SparseAttentionConfig(**{**_LAW_OF.get(field, {}), field: value})
    assert repr(value) in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("field", _NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -1e-9, True, "1", 1j, [1.0]])
def test_numbers(field: str, value: Any) -> None:
    assert_refused(field, value, "finite number")


@pytest.mark.parametrize("field", ["alpha", "fraction"])
def test_zero_is_no_factor(field: str) -> None:
    assert_refused(field, 0, "above 0")
    assert_refused(field, 0.0, "above 0")


@pytest.mark.parametrize("field", ["exponent", "fraction"])
@pytest.mark.parametrize("value", [1.0000001, 2, 1e300])
def test_at_most_one(field: str, value: float) -> None:
    assert_refused(field, value, "at most 1")


def test_none_is_no_number() -> None:
    assert_refused("alpha", None, "finite number")
    assert_refused("exponent", None, "finite number")
    assert_refused("min_keys", None, "whole number")


@pytest.mark.parametrize("field", _COUNTS_FROM_ONE + _COUNTS_FROM_ZERO)
@pytest.mark.parametrize("value", [-1, 1.5, 2.0, math.nan, True, "3"])
def test_counts(field: str, value: Any) -> None:
    assert_refused(field, value, "whole number")


@pytest.mark.parametrize("field", _COUNTS_FROM_ONE)
def test_at_least_one_key(field: str) -> None:
    assert_refused(field, 0, "at least 1")


@pytest.mark.parametrize("field", _COUNTS_FROM_ZERO)
def test_zero_switches_off(field: str) -> None:
    assert getattr(SparseAttentionConfig(**{field: 0}), field) == 0


@pytest.mark.parametrize(("field", "allowed"), [("law", LAWS), ("selector", SELECTORS), ("engine", ENGINES)])
@pytest.mark.parametrize("value", ["Power", "", None, 3])
def test_names(field: str, allowed: tuple[str, ...], value: Any) -> None:
    for name in allowed:
        assert_refused(field, value, name)


def test_a_list_as_a_name_is_refused_like_any_other_value() -> None:
    assert_refused("law", ["power"], "fraction")


def test_limits_must_not_cross() -> None:
    with pytest.raises(ValueError, match=r"max_keys.*min_keys.*200.*100"):
        SparseAttentionConfig(min_keys=200, max_keys=100)


@pytest.mark.parametrize(
    "fields",
    [
        {"law": "fixed"},
        {"law": "fraction"},
        {"keys": 3},
        {"fraction": 0.5},
        {"law": "fixed", "fraction": 0.5},
        {"law": "fixed", "keys": 3, "fraction": 0.5},
        {"law": "log", "keys": 3},
    ],
)
def test_parameters_go_with_their_law(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(keys|fraction) goes with law='(fixed|fraction)'"):
        SparseAttentionConfig(**fields)


@pytest.mark.parametrize("value", ["01", 3, [1.5], [-1], [True], ["0"], [None]])
def test_dense_layers(value: Any) -> None:
    with pytest.raises(ValueError, match="dense_layers"):
        SparseAttentionConfig(dense_layers=value)


def test_dense_layers_are_sorted_and_named_once() -> None:
    assert SparseAttentionConfig(dense_layers=[3, 1, 3]).dense_layers == (1, 3)
    assert SparseAttentionConfig(dense_layers=()).dense_layers == ()


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {0: []},
        {0: [(1.0,)]},
        {0: [(1.0, 0.5, 2.0)]},
        {0: [(0.0, 0.5)]},
        {0: [(math.nan, 0.5)]},
        {0: [(1.0, 1.5)]},
        {0: [(1.0, "x")]},
        {0: 5},
        {-1: [(1.0, 0.5)]},
        {"first": [(1.0, 0.5)]},
    ],
)
def test_per_head(value: Any) -> None:
    with pytest.raises(ValueError, match="per_head"):
        SparseAttentionConfig(per_head=value)


def test_per_head_needs_the_power_law() -> None:
    with pytest.raises(ValueError, match=r"per_head needs law='power'.*'log'"):
        SparseAttentionConfig(law="log", per_head={0: ((1.0, 0.5),)})


def test_two_spellings_of_one_layer_are_an_error() -> None:
    """JSON keys are strings: a file must not silently lose the laws of a layer that it names twice."""
    with pytest.raises(ValueError, match="per_head"):
        SparseAttentionConfig(per_head={1: ((1.0, 0.5),), "1": ((2.0, 0.5),)})


def test_a_fractional_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="per_head"):
        SparseAttentionConfig(per_head={1.7: ((1.0, 0.5),)})


def test_later_changes_of_the_mapping_do_not_reach_the_config() -> None:
    laws: dict[int, Any] = {0: ((1.0, 0.5),)}
    config = SparseAttentionConfig(per_head=laws)
    laws[0] = ((9.0, 0.9),)
    assert config.per_head == {0: ((1.0, 0.5),)}


@given(configs(), st.integers(0, 20_000))
def test_budget_follows_the_fields(config: SparseAttentionConfig, n: int) -> None:
    budget = config.budget()
    k = int(budget(torch.tensor(n)))
    if n < config.budget().dense_below:
        assert k == n
    else:
        assert min(n, config.min_keys) <= k <= min(n, config.max_keys or n)
    raw = {
        "power": config.alpha * n**config.exponent,
        "fixed": config.keys,
        "fraction": (config.fraction or 0) * n,
        "log": config.alpha * math.log(max(n, 1)),
    }[config.law]
    assert raw is not None
    if config.min_keys < k < min(n, config.max_keys or n):
        assert raw * (1 - 1e-8) <= k < raw * (1 + 1e-8) + 1


def test_budget_of_a_calibrated_layer() -> None:
    config = SparseAttentionConfig(alpha=2.0, min_keys=1, dense_below=0, per_head={1: ((1.0, 0.5), (4.0, 0.5))})
    n = torch.tensor([100])
    assert config.budget(1)(n).tolist() == [[10], [40]]
    assert config.budget(0)(n).tolist() == [20]
    assert config.budget()(n).tolist() == [20]
