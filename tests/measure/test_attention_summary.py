from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from hf_sparse.measure.attention_summary import ERRORS, NEEDED, SHAPES, STATISTICS, summarise
from hf_sparse.measure.attention_tables import comparison_cells, error_cells, layer_cells, shape_cells, slope_cells
from hf_sparse.results import Record, text_table
from tests.measure.attention_rows import DENSITY, EXPONENTS, LENGTHS, rows


def slope(summary: dict[str, Any], method: str, metric: str, statistic: str = "mean") -> dict[str, Any]:
    (found,) = (
        row
        for row in summary["slopes"]
        if (row["method"], row["metric"], row["statistic"]) == (method, metric, statistic)
    )
    return dict(found)


def result(summary: dict[str, Any], method: str, length: int) -> dict[str, Any]:
    (found,) = (row for row in summary["results"] if (row["method"], row["length"]) == (method, length))
    return dict(found)


def test_slopes_are_those_of_the_power_law_in_the_rows() -> None:
    summary = summarise(rows(), seed=0)
    for method, exponent in EXPONENTS.items():
        for metric in ERRORS:
            for statistic in STATISTICS:
                fit = slope(summary, method, metric, statistic)
                assert fit["slope"] == pytest.approx(exponent, abs=1e-9)
                assert fit["low"] <= fit["slope"] + 1e-9
                assert fit["high"] >= fit["slope"] - 1e-9
    assert slope(summary, "dense", "keys_95")["slope"] == pytest.approx(0.6, abs=1e-9)
    assert {row["metric"] for row in summary["slopes"]} == {*ERRORS, *NEEDED}


def test_the_line_goes_through_the_values() -> None:
    summary = summarise(rows(), seed=0)
    fit = slope(summary, "topk", "output_error")
    row = result(summary, "topk", 1024)
    assert math.exp(fit["intercept"]) * row["visible"] ** fit["slope"] == pytest.approx(
        row["output_error"]["mean"]["value"]
    )


def test_values_are_means_over_documents_and_heads() -> None:
    given = rows(noise=0.3)
    summary = summarise(given, seed=0)
    for length in LENGTHS:
        own = [row for row in given if row["method"] == "fixed" and row["length"] == length]
        expected = np.mean([row["columns"]["max_entry_worst"] for row in own])
        found = result(summary, "fixed", length)
        assert found["max_entry"]["worst"]["value"] == pytest.approx(expected)
        assert found["lost_mass"]["mean"]["value"] == pytest.approx(found["l1"]["mean"]["value"] / 2)
        assert found["rows"] == 128


def test_intervals_are_about_documents_where_there_are_several() -> None:
    alike = summarise(rows(documents=4, noise=0.0), seed=0)
    different = summarise(rows(documents=4, noise=0.3), seed=0)
    assert alike["resampled"] == different["resampled"] == "documents"
    for summary, spread in ((alike, False), (different, True)):
        value = result(summary, "topk", 512)["l1"]["mean"]
        assert (value["high"] - value["low"] > 1e-9) == spread
        assert value["low"] - 1e-12 <= value["value"] <= value["high"] + 1e-12


def test_the_bootstrap_spreads_as_a_mean_of_few_documents_does() -> None:
    given = rows(documents=12, noise=0.2)
    found = result(summarise(given, seed=0), "topk", 512)["l1"]["mean"]
    means = [np.mean(row["columns"]["l1_mean"]) for row in given if row["method"] == "topk" and row["length"] == 512]
    # A normal distribution has 95 % of its mass within 1.96 standard deviations.
    assert (found["high"] - found["low"]) / (2 * 1.96) == pytest.approx(np.std(means, ddof=1) / math.sqrt(12), rel=0.02)


def test_intervals_of_one_document_are_about_heads() -> None:
    summary = summarise(rows(documents=1, noise=0.3), seed=0)
    assert summary["resampled"] == "layers and heads"
    value = result(summary, "topk", 512)["l1"]["mean"]
    assert value["low"] < value["value"] < value["high"]


def test_windowed_layers_are_shown_and_not_averaged() -> None:
    given = rows()
    for row in given:
        columns = row["columns"]
        columns["windowed"] = [layer == 1 for layer in columns["layer"]]
        for name, column in columns.items():
            if name.endswith(("_mean", "_worst")):
                columns[name] = [
                    999.0 if windowed else value for value, windowed in zip(column, columns["windowed"], strict=True)
                ]
    summary = summarise(given, seed=0)
    assert slope(summary, "topk", "l1")["slope"] == pytest.approx(EXPONENTS["topk"], abs=1e-9)
    layers = {row["layer"]: row for row in summary["layers"] if row["method"] == "topk"}
    assert [layers[layer]["windowed"] for layer in (0, 1)] == [False, True]
    assert layers[1]["l1_mean"] == 999.0
    for row in given:
        row["columns"]["windowed"] = [True] * len(row["columns"]["layer"])
    with pytest.raises(ValueError, match="sliding window"):
        summarise(given, seed=0)


def _change(given: list[Record], method: str, lengths: list[int], columns: dict[str, float]) -> None:
    for row in given:
        if row["method"] == method and row["length"] in lengths:
            for name in row["columns"]:
                for ending, value in columns.items():
                    if name.endswith(ending):
                        row["columns"][name] = [value] * len(row["columns"][name])


def test_lengths_with_nothing_to_leave_out_are_not_fitted() -> None:
    given = rows()
    _change(given, "fixed", [512], {"density": 0.9, "_mean": 1e-5, "_worst": 1e-5})
    _change(given, "log", [512, 1024], {"_mean": 0.0, "_worst": 0.0})
    _change(given, "fraction", LENGTHS[:-1], {"_mean": 0.0, "_worst": 0.0})
    summary = summarise(given, seed=0)
    assert slope(summary, "fixed", "l1")["lengths"] == LENGTHS[1:]
    assert slope(summary, "fixed", "l1")["slope"] == pytest.approx(EXPONENTS["fixed"], abs=1e-9)
    assert slope(summary, "log", "l1")["lengths"] == LENGTHS[2:]
    assert slope(summary, "fraction", "l1") | {"lengths": None} == {
        "method": "fraction", "metric": "l1", "statistic": "mean", "lengths": None,
        "slope": None, "low": None, "high": None, "intercept": None,
    }  # fmt: skip
    assert ["fraction", "lost mass", "-", "-", "4096"] in slope_cells(summary)[1]


def test_comparisons_are_ratios_to_topk() -> None:
    summary = summarise(rows(), seed=0)
    n = np.array(LENGTHS) - 63.5
    for row in summary["comparisons"]:
        mine, other = (n ** EXPONENTS[method] for method in (row["method"], "topk"))
        assert row["mean"]["ratio"] == pytest.approx(mine.mean() / other.mean(), rel=1e-6)
        assert row["worst_length"]["ratio"] == pytest.approx(mine.max() / other.max(), rel=1e-6)
        assert row["mean"]["low"] <= row["mean"]["ratio"] * (1 + 1e-9)
        assert row["mean"]["high"] >= row["mean"]["ratio"] * (1 - 1e-9)
    assert "topk" not in {row["method"] for row in summary["comparisons"]}


def test_comparison_with_no_error_is_left_open() -> None:
    given = rows()
    _change(given, "topk", LENGTHS, {"_mean": 0.0, "_worst": 0.0})
    summary = summarise(given, seed=0)
    assert {row["mean"]["ratio"] for row in summary["comparisons"]} == {None}


def test_a_summary_is_json_and_repeatable() -> None:
    given = rows(noise=0.3)
    summary = summarise(given, seed=0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summarise(given, seed=0) == summary
    assert summarise(given, seed=1) != summary
    assert summary["methods"] == list(EXPONENTS)
    assert summary["configs"].keys() == set(EXPONENTS)
    assert summary["about"]["model"]["name"] == "tiny"
    assert len(summary["documents"]) == 3
    assert result(summary, "dense", 512).keys() >= set(SHAPES)
    assert result(summary, "topk", 512)["density"] == DENSITY


def test_tables() -> None:
    summary = summarise(rows(noise=0.1), seed=0)
    for header, cells in (
        error_cells(summary),
        shape_cells(summary),
        slope_cells(summary),
        comparison_cells(summary),
        layer_cells(summary, "grouped"),
    ):
        assert cells
        assert {len(line) for line in cells} == {len(header)}
        assert text_table(header, cells).count("\n") == len(cells)
    assert len(error_cells(summary)[1]) == len(EXPONENTS) * len(LENGTHS)
    assert [line[0] for line in layer_cells(summary, "grouped")[1]] == ["0", "1"]
