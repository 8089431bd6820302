"""`hf-sparse theory` at a small scale; resuming; mistakes; and that committed results follow from their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_sparse.lab import run
from hf_sparse.lab.experiment import Setting
from hf_sparse.lab.inputs import Input
from hf_sparse.results import markdown_table, record_key
from tests.small import run_command
from tests.test_theory_synthetic import SIMULATED_EXPONENTS, SIMULATED_SLOPES

ROOT = Path(__file__).parents[1]
COMMITTED = sorted(ROOT.glob("model_cards/theory/*/summary.json"))
ANSWERS = {"holds", "holds in part", "fails", "not testable here"}


def _run(*arguments: str) -> int:
    return run_command("theory", *arguments)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all experiments at a small scale wrote."""
    folder = tmp_path_factory.mktemp("theory")
    assert _run("--output", str(folder)) == 0
    return folder


def rows_of(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def again(folder: Path, names: list[str]) -> dict[str, Any]:
    """Summary, from the rows of a folder alone."""
    found = run.conclude(names, rows_of(folder))
    assert all(2 <= len(own.plot.lines) + len(own.plot.references) <= 4 for own in found.values())
    return run.summarise(found)


def test_every_experiment_leaves_rows_figures_verdicts_and_a_page(everything: Path) -> None:
    assert {path.name for path in everything.iterdir()} == {"synthetic", "random-tiny-model"}
    seen = set()
    for part in everything.iterdir():
        summary = json.loads((part / "summary.json").read_text())
        assert summary["about"]["scale"] == "small"
        for name, experiment in summary["experiments"].items():
            seen.add(name)
            assert experiment["figures"]
            assert (part / f"{name}.png").stat().st_size > 10_000
            assert [row for row in rows_of(part) if row["experiment"] == name]
            verdicts = [verdict for verdict in summary["verdicts"] if verdict["experiment"] == name]
            assert verdicts
            assert {verdict["answer"] for verdict in verdicts} <= ANSWERS
            assert all(verdict["claim"] and verdict["evidence"] for verdict in verdicts)
        assert str(everything) not in (part / "rows.jsonl").read_text()
    assert seen == set(run.EXPERIMENTS)


def test_a_second_run_measures_nothing_and_a_killed_one_goes_on(
    everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (everything / "synthetic/rows.jsonl").read_text().splitlines(keepends=True)
    whole = [line for line in lines if json.loads(line)["experiment"] == "windows"]
    folder = tmp_path / "synthetic"
    folder.mkdir()
    # Killed in the middle of a line; some other rows are there as well.
    (folder / "rows.jsonl").write_text("".join([*lines[-3:], *whole[:5], whole[5][:40]]))
    assert _run("--experiment", "windows", "--output", str(tmp_path), "--json") == 0
    printed = capsys.readouterr()
    assert f"{len(whole) - 5}/{len(whole) - 5}" in printed.err
    summary = json.loads(printed.out)["synthetic"]
    first = json.loads((everything / "synthetic/summary.json").read_text())
    assert summary["experiments"]["windows"] == first["experiments"]["windows"]
    before = (folder / "rows.jsonl").read_text()
    assert _run("--experiment", "windows", "--output", str(tmp_path)) == 0
    assert (folder / "rows.jsonl").read_text() == before
    assert "HOLDS IN PART: Keeping the largest n^C entries" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "scale must be among small, full; got 'huge'"),
        (["--text", "texts"], "--text needs a --model that reads it"),
        (["--experiment", "window"], "experiment must be among windows, phases, workloads, assumptions"),
        (["--scale", "full", "--experiment", "norms"], "needs --model at full scale"),
        (["--experiment", "norms", "--model", "nowhere/at/all"], "nowhere/at/all is not a model"),
        (["--experiment", "norms", "--lengths", "512,many"], "--lengths takes whole numbers"),
        (["--experiment", "norms", "--lengths", "512,256"], "lengths must rise"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*arguments, "--output", str(tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_summary_follows_from_its_rows(path: Path) -> None:
    summary = json.loads(path.read_text(encoding="utf-8"))
    names = list(summary["experiments"])
    repeated = json.loads(json.dumps(again(path.parent, names)))
    assert repeated == {name: summary[name] for name in ("verdicts", "experiments")}
    tables = "\n\n".join(markdown_table(*table) for table in run.all_tables(summary)) + "\n"
    assert (path.parent / "tables.md").read_text(encoding="utf-8") == tables
    assert summary["about"]["scale"] == "full"
    assert all((path.parent / f"{name}.png").is_file() for name in names)


def test_committed_synthetic_records_are_those_that_a_run_would_look_for() -> None:
    folder = ROOT / "model_cards/theory/synthetic"
    keys = {
        record_key(command="theory", experiment=experiment.name, seed=0, cell=cell)
        for experiment in run.EXPERIMENTS.values()
        if not experiment.needs_model
        for cell in experiment.cells(Setting("full", 0))
    }
    assert keys == {row["key"] for row in rows_of(folder)}


@pytest.mark.parametrize("name", ["windows", "phases", "assumptions"])
def test_a_committed_synthetic_record_is_measured_again_to_the_digit(name: str) -> None:
    record = next(row for row in rows_of(ROOT / "model_cards/theory/synthetic") if row["experiment"] == name)
    setting = Setting("full", 0)
    measured = run.EXPERIMENTS[name].measure(run.EXPERIMENTS[name].cells(setting)[0], setting)
    assert json.loads(json.dumps(measured)) == {key: record[key] for key in measured}


def test_committed_figures_are_those_of_independent_simulations() -> None:
    experiments = json.loads((ROOT / "model_cards/theory/synthetic/summary.json").read_text())["experiments"]
    exponents = {fit["input"]: fit["exponent"] for fit in experiments["phases"]["figures"]["exponents_of_keys_90"]}
    for scale, expected in SIMULATED_EXPONENTS.items():
        found = exponents[Input("logits", scale, growth=0.5).label]
        # The simulations had intervals as well, of about the same width.
        assert found["value"] == pytest.approx(expected, abs=max(0.02, found["high"] - found["low"])), scale
    slopes = {
        (fit["window"], fit["norm"]): fit["slope"]["value"]
        for fit in experiments["windows"]["figures"]["slopes"]
        if fit["input"] == Input("logits", 1).label
    }
    for place, expected in SIMULATED_SLOPES.items():
        assert slopes[place] == pytest.approx(expected, abs=0.04), place
    for share in experiments["phases"]["figures"]["keys_90_over_n"]:
        assert share["n"] < 2**14 or share["value"] == pytest.approx(share["closed_form"], rel=0.01)
