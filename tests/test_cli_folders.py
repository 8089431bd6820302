"""Folders that results cannot go into, and rows that are none: refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse.errors import UserError
from hf_sparse.share.source import ModelSource
from tests import small, tiny
from tests.small import refusal, run_command

CARDS = Path(__file__).parents[1] / "model_cards"
DATA = "--text texts --lengths 48 --targets 40 --device cpu --dense-below 8 --dense-layers none --min-keys 4"
PERPLEXITY = f"perplexity tiny-llama {DATA} --methods window"
COMMANDS = [
    PERPLEXITY,
    "attention-error tiny-llama --text texts --lengths 48,96 --device cpu",
    "retrieval tiny-llama --text texts --lengths 48,96 --tasks needle-single --questions 1 --device cpu",
    "calibrate tiny-llama --text texts --device cpu",
    "bench tiny-llama --decode 64 --prefill none --cached none --generate none --text texts/text0.txt --device cpu",
    "bench --shape 4/2/16 --decode 64 --prefill none --cached none --generate none --device cpu",
    "theory",
    "theory --experiment norms",
    "theory --experiment norms --model deep-llama --text texts --lengths 64 --device cpu",
    "memory --lengths 64,128 --prefill none --cached none",
    "card tiny-llama",
]
NEVER = (
    "hf_sparse.share.source.ModelSource.model",
    "hf_sparse.bench.run.random_model",
    "hf_sparse.cli.bench.evaluate",
    "hf_sparse.lab.run.run",
    "hf_sparse.cli.memory.evaluate",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `tiny-llama` and `deep-llama`, texts, and the file `taken`."""
    folder = tmp_path_factory.mktemp("home")
    small.save_model(folder / "tiny-llama")
    tiny.model("llama", num_hidden_layers=4).save_pretrained(folder / "deep-llama")
    small.tokenizer().save_pretrained(folder / "deep-llama")
    small.save_texts(folder / "texts")
    tiny.unsupported("bloom").config.save_pretrained(folder / "bloom")
    tiny.config("gpt2").save_pretrained(folder / "gpt2")
    small.tokenizer().save_pretrained(folder / "gpt2")
    (folder / "taken").write_text("mine")
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.fixture
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded or measured."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    for name in NEVER:
        monkeypatch.setattr(name, never)


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("output", ["taken", "taken/under"])
def test_a_file_in_the_way_is_refused_before_anything_is_measured(
    command: str, output: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(home.rglob("*"))
    assert "taken is a file; name another one" in refusal(capsys, *command.split(), "--output", output)
    assert sorted(home.rglob("*")) == before
    assert (home / "taken").read_text() == "mine"


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize("part", ["", "perplexity", "attention-error"])
def test_the_demo_checks_the_folders_of_its_parts(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse.cli.demo._LENGTHS", [64, 128, 192, 240])
    monkeypatch.setattr("hf_sparse.cli.demo._TARGETS", 32)
    (tmp_path / "out" / part).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / part).write_text("mine")
    said = refusal(capsys, "demo", "tiny-llama", "--device", "cpu", "--output", str(tmp_path / "out"))
    assert f"{tmp_path / 'out' / part} is a file" in said


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_results_of_another_command_are_refused_before_anything_is_measured(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = command.split()[0]
    folder = tmp_path / ("synthetic" if command == "theory" else "")
    if command.startswith("theory --experiment"):
        folder = tmp_path / ("deep-llama" if "deep-llama" in command else "random-tiny-model")
    folder.mkdir(exist_ok=True)
    other = "bench" if own != "bench" else "perplexity"
    (folder / "rows.jsonl").write_text(json.dumps({"key": "a", "command": other}) + "\n")
    said = refusal(capsys, *command.split(), "--output", str(tmp_path))
    assert f"rows.jsonl holds results of {other}, not of {own}: take another folder, or delete it" in said
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


def test_results_of_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(tmp_path / "out")]
    assert run_command(*PERPLEXITY.split(), *out) == 0
    # The same model under other settings goes on in the same folder.
    assert run_command(*PERPLEXITY.split(), "--alpha", "2", *out) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    tiny.model("llama", seed=1).save_pretrained(tmp_path / "tiny-llama")
    small.tokenizer().save_pretrained(tmp_path / "tiny-llama")
    capsys.readouterr()
    command = PERPLEXITY.replace("tiny-llama", str(tmp_path / "tiny-llama"))
    assert "rows.jsonl holds results of tiny-llama (" in refusal(capsys, *command.split(), *out)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize("name", ["rows.jsonl", "summary.json", "tables.md", "perplexity.png"])
def test_a_folder_where_a_file_belongs_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    said = refusal(capsys, *PERPLEXITY.split(), "--output", str(tmp_path))
    assert f"{name}: it is a folder; remove it, or name another place" in said


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize("line", [b"", b"garbage", b"[1]", b'"key"', b"{}", b'{"key": 5}', b'{"key": "\xff"}'])
@pytest.mark.parametrize(("command", "name"), [(PERPLEXITY, "rows.jsonl"), (COMMANDS[3], "probes.jsonl")])
def test_a_line_that_is_no_row_is_refused_before_anything_is_measured(
    command: str, name: str, line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = ModelSource.find("tiny-llama").info()
    good = json.dumps({"key": "a", "command": "perplexity", "model": info}).encode()
    (tmp_path / name).write_bytes(b"\n".join([good, line, good, b""]))
    before = (tmp_path / name).read_bytes()
    said = refusal(capsys, *command.split(), "--output", str(tmp_path))
    assert f"{name}: line 2 is not a record: " in said
    assert "delete the file, or take another folder" in said
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("change", [{"nll": "much"}, {"nll": None}, {"block_nll": [1.0]}, {"tokens": []}])
def test_stored_rows_that_cannot_be_summed_up_are_refused(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", str(tmp_path)]
    assert run_command(*PERPLEXITY.split(), *out) == 0
    summary = (tmp_path / "summary.json").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | change) + "\n" for row in [rows[0]]))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[1:])
    capsys.readouterr()
    assert run_command(*PERPLEXITY.split(), *out) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl: its records cannot be summed up: " in said
    assert "Traceback" not in said
    assert (tmp_path / "summary.json").read_bytes() == summary


def test_an_error_of_ours_is_not_blamed_on_stored_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("hf_sparse.measure.perplexity_summary.bootstrap_means", broken)
    with pytest.raises(KeyError, match="a bug"):
        hf_sparse.cli.main([*PERPLEXITY.split(), "--output", str(tmp_path)])


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model bloom --text texts", "BloomForCausalLM cannot be patched"),
        ("--model gpt2 --text texts --lengths 64", "GPT2Attention has no separate q_proj, k_proj and o_proj"),
        ("--model deep-llama --text missing.txt --lengths 64", "missing.txt: no such file"),
        ("--model tiny-llama --text texts --lengths 128,256", "it has 150 tokens, and 257 are needed"),
        ("--model tiny-llama --text texts --lengths 512", "above the model's maximum of 256"),
        ("--model tiny-llama --text texts --lengths 64 --dtype int4", "dtype must be one of"),
        ("--model tiny-llama --text texts --lengths 64 --device warp", "device 'warp'"),
        ("--model tiny-llama --text texts --lengths 64", "need a model of 3 layers or more; it has 2"),
        ("--model deep-llama --model ../{}/deep-llama --text texts --lengths 64", "which another part has"),
        ("--lengths 5", "need lengths of 64 tokens or more; got 5"),
    ],
)
def test_theory_checks_models_before_it_measures_anything(
    arguments: str, message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments.format(home.name).split()
    assert message in refusal(capsys, "theory", *given, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_shortest_lengths_of_theory_give_results(tmp_path: Path) -> None:
    options = ["--model", "deep-llama", "--text", "texts", "--lengths", "64", "--device", "cpu"]
    names = ["norms", "rope", "depth", "collapse", "alpha"]
    chosen = [part for name in names for part in ("--experiment", name)]
    assert run_command("theory", *chosen, *options, "--output", str(tmp_path)) == 0
    assert set(json.loads((tmp_path / "deep-llama/summary.json").read_text())["experiments"]) == set(names)


@pytest.mark.parametrize("folder", ["taken", "taken/under"])
def test_saving_into_a_file_is_refused(folder: str) -> None:
    model = hf_sparse.patch(tiny.model("llama"), small.CONFIG)
    with pytest.raises(UserError, match=r"taken is (a file|not a folder)"):
        hf_sparse.save_pretrained(model, folder)
