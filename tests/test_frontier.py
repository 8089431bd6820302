"""`scripts/frontier.py`: losses and times of selectors, resumed and drawn."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests import small

SCRIPT = Path(__file__).parents[1] / "scripts" / "frontier.py"
DESIGNS = {"dense 0", "grouped 8", "grouped 12", "window 8", "window 12"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results, with both kinds of records of a tiny model."""
    pytest.importorskip("matplotlib")
    model, texts = small.save_model(tmp_path / "model"), small.save_texts(tmp_path / "texts", tokens=400)
    given = [f"--text={path}" for path in sorted(texts.glob("*.txt"))]
    given += ["--lengths=300", "--alphas=8,12", "--selectors=grouped,window", f"--output={tmp_path / 'out'}"]
    for step in ("quality", "time", "quality"):
        frontier(monkeypatch, step, str(model), "--repeats=2", *given)
    return tmp_path / "out"


def frontier(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the script as a command."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_every_design_is_measured_once(run: Path) -> None:
    """The last step finds all its records, and adds none."""
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    losses = [record for record in records if record["kind"] == "loss"]
    measured = [(f"{record['selector']} {record['alpha']:g}", record["text"]) for record in losses]
    assert sorted(measured) == sorted((design, f"text{i}.txt") for design in DESIGNS for i in range(2))
    assert {record["design"] for record in records if record["kind"] == "time"} == DESIGNS - {"dense 0"} | {"sdpa"}
    densities = {f"{record['selector']} {record['alpha']:g}": record["density"] for record in losses}
    assert densities["grouped 8"] < densities["grouped 12"] < densities["dense 0"] == 1


def test_points_are_those_of_the_records(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frontier(monkeypatch, "draw", str(run))
    points = json.loads((run / "points.json").read_text())["points"]
    assert {f"{point['selector']} {point['alpha']:g}" for point in points} == DESIGNS - {"dense 0"}
    table = (run / "tables.md").read_text()
    for point in points:
        assert 0.5 < point["perplexity_ratio"] < 2
        assert point["time_range"][0] <= point["time_ratio"] <= point["time_range"][1]
        assert f"{point['perplexity_ratio']:.4f}" in table
    assert (run / "frontier.png").stat().st_size > 1000


def test_a_step_without_texts_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        frontier(monkeypatch, "quality", "model")
    assert caught.value.code == 2
    assert "quality needs --text and --output" in capsys.readouterr().err
