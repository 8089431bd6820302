from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_sparse.errors import UserError
from hf_sparse.measure import plots
from hf_sparse.measure.attention_summary import summarise
from hf_sparse.measure.plots import plot_attention_error, plot_perplexity
from tests.measure.attention_rows import EXPONENTS, LENGTHS, rows

matplotlib = pytest.importorskip("matplotlib")


def perplexity_summary() -> dict[str, Any]:
    error_summary = summarise(rows(), seed=0)
    results = [
        {
            "method": method,
            "length": length,
            "perplexity": 15.0 + i,
            "ratio": 1.0 + i / 10,
            "low": 1.0 + i / 20,
            "high": 1.0 + i / 5,
            "density": 1.0 if method == "dense" else 0.2,
        }
        for i, method in enumerate(("dense", "topk", "grouped", "window", "fixed", "fixed-grouped"))
        for length in LENGTHS
    ]
    configs = {"dense": None, "fixed-grouped": error_summary["configs"]["fixed"] | {"selector": "grouped"}}
    return {**error_summary, "results": results, "targets": 64, "configs": error_summary["configs"] | configs}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were drawn."""
    drawn: list[Any] = []
    make = plots.figure

    def spy(width: float, height: float) -> Any:
        drawn.append(make(width, height))
        return drawn[-1]

    monkeypatch.setattr(plots, "figure", spy)
    return drawn


def _assert_png(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert np.ptp(pixels[..., :3]) == 1  # black on white, not an empty canvas


def test_perplexity(tmp_path: Path, figures: list[Any]) -> None:
    path = tmp_path / "new" / "perplexity.png"
    plot_perplexity(perplexity_summary(), path)
    _assert_png(path)
    ratio, absolute, density = figures[0].axes
    for axes, value in ((ratio, 0.0), (absolute, 15.0), (density, 100.0)):
        (dense,) = (line for line in axes.get_lines() if line.get_color() == "#000000" and line.get_marker() == "s")
        assert list(dense.get_ydata()) == [value] * len(LENGTHS)
        assert axes.get_xscale() == "log"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1,024", "2,048", "4,096"]
        assert axes.get_xlabel() == "context length (tokens)"
        assert axes.get_ylabel()
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[0] == "dense"
    assert labels[-1] == "grouped, 300 keys"
    assert len(set(labels)) == 6
    assert "tiny (float32)" in figures[0].get_suptitle()


def test_attention_error(tmp_path: Path, figures: list[Any]) -> None:
    path = tmp_path / "error.png"
    summary = summarise(rows(noise=0.2), seed=0)
    plot_attention_error(summary, path)
    _assert_png(path)
    *errors, keys = figures[0].axes
    assert len(errors) == 3
    for axes in errors:
        assert axes.get_xscale() == axes.get_yscale() == "log"
        slopes = [text.get_text() for text in axes.get_legend().get_texts()]
        assert [float(text.split()[0]) for text in slopes] == pytest.approx(list(EXPONENTS.values()), abs=0.005)
    topk = next(row for row in summary["results"] if row["method"] == "topk" and row["length"] == LENGTHS[0])
    mean, worst = (
        next(line for line in errors[1].get_lines() if line.get_linestyle() == style and line.get_marker() == "o")
        for style in ("-", "--")
    )
    assert mean.get_ydata()[0] == topk["output_error"]["mean"]["value"]
    assert worst.get_ydata()[0] == topk["output_error"]["worst"]["value"]
    dense = next(line for line in keys.get_lines() if line.get_label() == "dense: all n")
    assert list(dense.get_ydata()) == list(dense.get_xdata())


def test_methods_without_error_are_left_out(tmp_path: Path, figures: list[Any]) -> None:
    given = rows()
    for row in given:
        if row["method"] == "fixed":
            row["columns"] |= {
                name: [0.0] * 4 for name in row["columns"] if name.startswith(("l1", "max", "l2", "out"))
            }
    plot_attention_error(summarise(given, seed=0), tmp_path / "error.png")
    texts = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert texts[1] == "none, none"


def test_without_matplotlib_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'hf_sparse\[plots\]'"):
        plot_perplexity(perplexity_summary(), tmp_path / "plot.png")


def test_a_calibrated_configuration_has_a_label() -> None:
    summary = summarise(rows(), seed=0)
    summary["configs"]["grouped"]["per_head"] = {"0": [[8.0, 0.5]]}
    assert plots._label("grouped", summary) == "grouped, calibrated per head"
    assert plots._label("log", summary) == "topk, 53 ln n keys"
    assert plots._label("fraction", summary) == "topk, 13 % of n"
