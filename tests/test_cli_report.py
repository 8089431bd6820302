"""`hf-sparse report`: the tables of a folder again, from its records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.small import refusal, run_command, save_model, save_texts

CARDS = Path(__file__).parents[1] / "model_cards"
# A folder of each command, one of its plots, and what its tables say.
FOLDERS = {
    "SmolLM2-135M-Instruct/attention-error": ("attention_error.png", "retained mass"),
    "bench/two-layers": ("bench.png", "dynamic-cache / hf_sparse"),
    "memory": ("memory.png", "grows as n to the"),
    "retrieval/qwen2.5-coder-1.5b": ("retrieval.png", "answer likelier than three wrong ones"),
    "theory/synthetic": ("windows.png", "HOLDS IN PART"),
    "SmolLM2-135M-Instruct-calibrated/calibration": (None, "law of a head"),
    "gemma-3-270m-calibrated/perplexity": ("perplexity.png", "worst ratio"),
}


def numbers(text: str) -> Any:
    """JSON to twelve digits: the last ones of a logarithm differ between machines."""
    return json.loads(text, parse_float=lambda number: f"{float(number):.12g}")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_committed_folder_is_made_anew(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(CARDS / name, folder)
    tables, (plot, words) = folder / "tables.md", FOLDERS[name]
    before = tables.read_text()
    tables.unlink()
    if plot:
        (folder / plot).unlink()
    assert run_command("report", str(folder)) == 0
    assert words in capsys.readouterr().out
    assert not tables.exists()
    assert run_command("report", str(folder), "--write", "--json") == 0
    summary = numbers(capsys.readouterr().out)
    [stored] = [path for path in map(folder.joinpath, ("summary.json", "calibration.json")) if path.exists()][:1]
    committed = numbers((CARDS / name / stored.name).read_text())
    # Summaries of earlier releases do not name their command.
    summary, committed = ({key: value for key, value in x.items() if key != "command"} for x in (summary, committed))
    assert summary == committed
    assert tables.read_text() == before
    assert plot is None or (folder / plot).stat().st_size > 10_000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Results of perplexity."""
    shutil.copytree(CARDS / "gemma-3-270m-calibrated/perplexity", tmp_path / "run")
    return tmp_path / "run"


def change(run: Path, index: int, **values: Any) -> None:
    """Add a record that is the one at `index` but for `values`."""
    record = json.loads((run / "rows.jsonl").read_text().splitlines()[index])
    with (run / "rows.jsonl").open("a") as file:
        file.write(json.dumps(record | values) + "\n")


def test_a_run_without_a_summary_gets_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").unlink()
    assert run_command("report", str(run), "--write") == 0
    assert "ratio to dense" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["command"] == "perplexity"


def test_other_settings_in_the_same_file_are_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("report", str(run)) == 0
    shown = capsys.readouterr().out
    change(run, 0, key="a", config={"alpha": 3.0})
    change(run, 0, key="b", text_sha256="other")
    change(run, 0, key="c", length=64)
    change(run, 0, key="d", dtype="float16")
    change(run, 0, key="e", device="cuda")
    change(run, 0, key="f", tokens=64)
    assert run_command("report", str(run)) == 0
    assert capsys.readouterr().out == shown


def test_a_folder_with_two_dtypes_shows_the_last_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, texts, folder = save_model(tmp_path / "model"), save_texts(tmp_path / "texts"), str(tmp_path / "run")
    options = ["--text", str(texts), "--lengths", "48,96", "--methods", "topk", "--device", "cpu", "--output", folder]
    assert run_command("attention-error", str(model), *options, "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert run_command("attention-error", str(model), *options, "--dtype", "float32") == 0
    shown = capsys.readouterr().out
    assert run_command("report", folder) == 0
    assert capsys.readouterr().out.strip() in shown


def test_tables_come_from_the_records(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    changed = [line | {"nll": 2 * line["nll"]} if line["method"] == "dense" else line for line in lines]
    (run / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    old = json.loads((run / "summary.json").read_text())["results"][0]["perplexity"]
    assert run_command("report", str(run), "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["perplexity"] == pytest.approx(old**2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: [path.unlink() for path in run.iterdir()], "holds no results"),
        (shutil.rmtree, "holds no results: pass a folder that a command of hf-sparse wrote"),
        (lambda run: change(run, 0, key="again"), "rows.jsonl holds 2 measurements of "),
        (lambda run: change(run, 0, key="again"), "one is needed: run the command that wrote it again, into another"),
        (lambda run: (run / "rows.jsonl").write_text('{"key": "a", "command": "perplexity"}\n'), "KeyError: 'method'"),
        (lambda run: (run / "rows.jsonl").write_text("garbage\n"), "line 1 is not a record"),
        (lambda run: (run / "summary.json").write_text("[]"), "summary.json cannot be read"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(
    spoil: Any, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run)
    assert message in refusal(capsys, "report", str(run))


def test_an_unfinished_run_says_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / "rows.jsonl").read_text().splitlines(keepends=True)
    (run / "rows.jsonl").write_text("".join(lines[:-1]))
    assert "at 8192 tokens of one text, and one is needed: run the command" in refusal(capsys, "report", str(run))


def test_times_of_other_settings_are_left_out_and_one_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(CARDS / "bench/two-layers", run)
    assert run_command("report", str(run)) == 0
    shown = capsys.readouterr().out
    change(run, 0, key="a", config={"alpha": 3.0})
    assert run_command("report", str(run)) == 0
    assert capsys.readouterr().out == shown
    change(run, 0, key="b")
    assert "rows.jsonl holds 2 measurements of " in refusal(capsys, "report", str(run))
