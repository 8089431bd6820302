from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_sparse.errors import UserError
from hf_sparse.measure import plots
from hf_sparse.measure.attention_summary import summarise
from hf_sparse.measure.plots import plot_attention_error, plot_perplexity
from tests.measure.attention_rows import LENGTHS, rows

matplotlib = pytest.importorskip("matplotlib")

METHODS = ("dense", "topk", "grouped", "window", "fixed", "key-norm")


def error_summary() -> dict[str, Any]:
    return summarise(rows(noise=0.2), seed=0)


def perplexity_summary() -> dict[str, Any]:
    summary = error_summary()
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
        for i, method in enumerate(METHODS)
        for length in LENGTHS
    ]
    own = summary["configs"]["window"] | {"selector": {"name": "key-norm"}, "law": {"name": "square-root"}}
    return {**summary, "results": results, "targets": 64, "configs": summary["configs"] | {"key-norm": own}}


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


def lines(axes: Any) -> dict[str, Any]:
    """The line of each method in a panel, by its label."""
    return {container.get_label(): container.lines[0] for container in axes.containers}


@pytest.mark.parametrize(
    ("draw", "summary"),
    [
        (plot_perplexity, perplexity_summary),
        (plot_attention_error, error_summary),
    ],
)
def test_a_panel_has_dense_and_three_methods_and_no_legend(
    draw: Callable[[Any, Path], None], summary: Callable[[], Any], tmp_path: Path, figures: list[Any]
) -> None:
    path = tmp_path / "new" / "plot.png"
    draw(summary(), path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert np.ptp(pixels[..., :3]) == 1  # black on white, not an empty canvas
    for axes in figures[0].axes:
        assert next(iter(lines(axes))) == "dense"
        assert len(lines(axes)) <= 4
        assert axes.get_legend() is None
        assert axes.get_ylabel()
    assert "tiny (float32)" in figures[0].get_suptitle()
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert len(set(labels)) == len(labels) == 1 + 5 + (draw is plot_attention_error)
    colors = {line.get_color() for axes in figures[0].axes for line in lines(axes).values()}
    assert len(colors) == len(labels)


def test_perplexity_is_drawn_against_dense(tmp_path: Path, figures: list[Any]) -> None:
    plot_perplexity(perplexity_summary(), tmp_path / "plot.png")
    ratio, absolute, density = figures[0].axes[-3:]
    for axes, dense, last in ((ratio, 0.0, 50.0), (absolute, 15.0, 20.0), (density, 100.0, 20.0)):
        drawn = lines(axes)
        assert list(drawn["dense"].get_ydata()) == [dense] * len(LENGTHS)
        assert list(drawn["key-norm, square-root"].get_ydata()) == pytest.approx([last] * len(LENGTHS))
        assert axes.get_xscale() == "log"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1,024", "2,048", "4,096"]
        assert axes.get_xlabel() == "context length (tokens)"


def test_errors_are_drawn_on_a_log_axis_that_shows_dense_at_zero(tmp_path: Path, figures: list[Any]) -> None:
    summary = error_summary()
    plot_attention_error(summary, tmp_path / "error.png")
    keys, mass, output = figures[0].axes[:3]
    [row] = [row for row in summary["results"] if row["method"] == "topk" and row["length"] == LENGTHS[0]]
    [label] = [label for label in lines(keys) if label.startswith("topk, 16 n")]
    assert "lost mass grows as n$^{+0.10}$" in label
    assert lines(keys)[label].get_ydata()[0] == row["kept"]
    assert lines(mass)[label].get_ydata()[0] == row["lost_mass"]["mean"]["value"]
    assert lines(output)[label].get_ydata()[0] == row["output_error"]["mean"]["value"]
    for axes in (mass, output):
        assert list(lines(axes)["dense"].get_ydata()) == [0.0] * len(LENGTHS)
        assert axes.get_yscale() == "symlog"
        assert axes.get_ylim()[0] < 0


def test_methods_without_error_are_drawn(tmp_path: Path) -> None:
    given = rows()
    for row in given:
        if row["method"] != "dense":
            row["columns"] |= {
                name: [0.0] * 4 for name in row["columns"] if name.startswith(("l1", "max", "l2", "out"))
            }
    plot_attention_error(summarise(given, seed=0), tmp_path / "error.png")
    assert (tmp_path / "error.png").is_file()


def test_without_matplotlib_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'hf_sparse\[plots\]'"):
        plot_perplexity(perplexity_summary(), tmp_path / "plot.png")


def test_labels_say_selector_and_law(tmp_path: Path, figures: list[Any]) -> None:
    summary = error_summary()
    summary["configs"]["grouped"]["per_head"] = {"0": [[8.0, 0.5]]}
    plot_attention_error(summary, tmp_path / "plot.png")
    labels = [text.get_text().partition(";")[0] for text in figures[0].legends[0].get_texts()]
    assert {"grouped, calibrated per head", "topk, 53 ln n keys", "topk, 13 % of n", "topk, 300 keys"} < set(labels)
