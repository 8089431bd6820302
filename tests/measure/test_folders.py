"""A folder holds results of one command and one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_sparse.errors import UserError
from hf_sparse.results import CALIBRATE, ResultFile, check_folder, command_of, write_json

ROOT = Path(__file__).parents[2] / "model_cards"
COMMITTED = sorted({path.parent for name in ("rows.jsonl", "summary.json") for path in ROOT.glob(f"**/{name}")})
TINY = {"name": "tiny", "revision": "abc"}


def row(command: str = "perplexity", **model: Any) -> dict[str, Any]:
    return {"key": "a", "command": command, "model": TINY | model}


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_committed_folders_can_be_gone_on_with(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    command = command_of(summary)
    assert command is not None
    assert command in folder.relative_to(ROOT).as_posix() or "perplexity" in command
    check_folder(folder, command, summary.get("about", {}).get("model"))


@pytest.mark.parametrize("folder", sorted(ROOT.glob("*/calibration")), ids=lambda folder: folder.parent.name)
def test_committed_calibrations_can_be_gone_on_with(folder: Path) -> None:
    model = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))["check"]["about"]["model"]
    check_folder(folder, CALIBRATE, model)
    with pytest.raises(UserError, match=r"calibration\.json holds results of .* not of tiny \(abc\)"):
        check_folder(folder, CALIBRATE, TINY)
    with pytest.raises(UserError, match=r"calibration\.json holds results of calibrate, not of perplexity"):
        check_folder(folder, "perplexity", model)


def test_rows_of_the_same_command_and_model_are_gone_on_with(tmp_path: Path) -> None:
    check_folder(tmp_path / "new", "perplexity", TINY)
    ResultFile(tmp_path / "rows.jsonl").append(row(max_positions=8) | {"config": {"alpha": 2.0}})
    check_folder(tmp_path, "perplexity", TINY)
    # A run that was killed in the middle of a line.
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": "b", "comm')
    check_folder(tmp_path, "perplexity", TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (row("bench"), r"rows\.jsonl holds results of bench, not of perplexity: take another folder, or delete it"),
        ({"key": "a", "experiment": "windows"}, "holds results of theory, not of perplexity"),
        ({"key": "a"}, "holds results of something else, not of perplexity"),
        (row(name="other"), r"holds results of other \(abc\), not of tiny \(abc\)"),
        (row(revision="def"), r"holds results of tiny \(def\), not of tiny \(abc\)"),
    ],
)
def test_rows_of_something_else_are_refused(found: dict[str, Any], message: str, tmp_path: Path) -> None:
    ResultFile(tmp_path / "rows.jsonl").append(found)
    with pytest.raises(UserError, match=message):
        check_folder(tmp_path, "perplexity", TINY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"slopes": []}', "holds results of attention-error, not of perplexity"),
        ('{"results": [], "exponents": {}}', "holds results of memory, not of perplexity"),
        ('{"mine": 1}', "holds results of something else, not of perplexity"),
        ('{"adaptive_vs_fixed": [], "about": {"model": {"name": "other"}}}', r"results of other \(random weights\)"),
        ("[1]", r"summary\.json cannot be read: it must hold a JSON object; delete it, or take another folder"),
        ("{", r"summary\.json cannot be read: Expecting property name"),
    ],
)
def test_a_summary_of_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=message):
        check_folder(tmp_path, "perplexity", TINY)


def test_a_calibration_that_was_stopped_is_gone_on_with_for_its_model_alone(tmp_path: Path) -> None:
    ResultFile(tmp_path / "curves.jsonl").append({"key": "a", "model": TINY, "curves": []})
    ResultFile(tmp_path / "check.jsonl").append(row("perplexity"))
    check_folder(tmp_path, CALIBRATE, TINY)
    with pytest.raises(UserError, match=r"curves\.jsonl holds results of tiny \(abc\), not of other"):
        check_folder(tmp_path, CALIBRATE, {"name": "other", "revision": "abc"})


def test_results_may_lie_beside_the_calibration_of_their_policy(tmp_path: Path) -> None:
    write_json(tmp_path / "calibration.json", {"check": {"about": {"model": TINY}}})
    write_json(tmp_path / "summary.json", {"adaptive_vs_fixed": [], "about": {"model": TINY}})
    check_folder(tmp_path, "perplexity", TINY)
    with pytest.raises(UserError, match=r"summary\.json holds results of perplexity, not of calibrate"):
        check_folder(tmp_path, CALIBRATE, TINY)
