"""`hf-sparse card` and `hf-sparse publish` without the Hub: folders, dry runs, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_sparse.config import Policy
from hf_sparse.config.files import NAME, read, write
from tests import small, tiny

PUBLISHED = Path(__file__).parents[1] / "model_cards" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def home(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny-llama`, its policy and what was measured of it."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_llama, home / "tiny-llama")
    (home / "tiny-llama" / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    write(Policy(small.CONFIG), home / "policy" / NAME)
    small.save_results(home / "perplexity", small.CONFIG)
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> int:
    return small.run_command(*map(str, arguments))


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_card_from_a_model_and_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "tiny-sparse"
    arguments = ["tiny-llama", "--policy", "policy", "--results", "perplexity", "--output", out]
    assert run("card", *arguments, "--base-model", "someone/tiny", "--base-revision", "a" * 40, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    files = ["README.md", "config.json", "perplexity/perplexity.png", "perplexity/summary.json", NAME]
    assert printed["files"] == sorted(files)
    policy = read(out / NAME)
    assert policy.config == small.CONFIG
    assert (policy.base_model, policy.revision, policy.weights) == ("someone/tiny", "a" * 40, False)
    assert len(policy.quality) == 20
    card = ModelCard((out / "README.md").read_text())
    assert card.data.license == "mit"
    assert "perplexity/perplexity.png" in card.text
    assert (out / "config.json").read_bytes() == Path("tiny-llama/config.json").read_bytes()
    before = content(out)
    assert run("card", out) == 0
    assert content(out) == before


def _readme_is_a_folder(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()


def _results_are_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "perplexity")
    (folder / "perplexity").write_text("mine")


def _summary_is_lost(folder: Path) -> None:
    (folder / "attention-error" / "summary.json").rename(folder / "attention-error" / "rows.jsonl")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_readme_is_a_folder, "README.md: it is a folder; remove it"),
        (_results_are_a_file, "perplexity is a file"),
        (
            _summary_is_lost,
            "attention-error holds rows.jsonl without summary.json: make it with hf-sparse attention-error --output",
        ),
    ],
)
def test_a_folder_that_no_card_can_be_made_in_is_left_as_it_was(
    damage: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(PUBLISHED, tmp_path / "card")
    damage(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert message in small.refusal(capsys, "card", str(folder), "--results", str(PUBLISHED / "perplexity"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_dry_run_shows_files_and_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("publish", PUBLISHED, "someone/tried", "--dry-run") == 0
    printed = capsys.readouterr()
    assert "someone/tried (new)" in printed.out
    size = (PUBLISHED / "perplexity" / "summary.json").stat().st_size
    assert ["perplexity/summary.json", f"{size:,}", "bytes"] in [line.split() for line in printed.out.splitlines()]
    assert 'hf_sparse.from_pretrained("someone/tried")' in printed.out
    assert printed.out.count("\nmodel-index:\n- name: tried\n") == 1
    assert "HF_HUB_OFFLINE is set; shown as for a new repository" in printed.err


@pytest.mark.parametrize("more", [["--base-model", "someone/tiny"], ["--policy", "policy", "--weights"]])
def test_a_dry_run_as_json(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("publish", "tiny-llama", "me/x", *more, "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["repo_id"], shown["exists"]) == ("me/x", False)
    light, files = ["README.md", "config.json", NAME], [file["path"] for file in shown["files"]]
    assert set(files) >= {*light, "model.safetensors", "tokenizer.json"} if "--weights" in more else files == light
    assert shown["files"][files.index("README.md")]["bytes"] == len(shown["card"].encode())
    assert ModelCard(shown["card"]).data.get("base_model") == (None if "--weights" in more else "someone/tiny")
    assert "# The base" not in shown["card"]
    assert str(Path.cwd()) not in shown["card"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("publish policy me/x", "is published with the Hub id of its base model: name it with"),
        ("publish tiny-llama me/x --base-model a/b", "without a token: log in with `hf auth login`"),
        ("publish tiny-llama me/x --base-model a/b/c", "base_model must be a Hub id"),
        ("publish tiny-llama me/x --results perplexity", "holds no measurement of this configuration"),
        ("publish tiny-llama me/x --policy nowhere", "'nowhere' does not exist"),
        ("publish nowhere/ me/x", "cannot read the model nowhere/"),
        ("publish bloom me/x --weights", "BloomForCausalLM cannot be patched"),
        ("card tiny-llama", "tiny-llama is not a folder with a sparse_config.json: pass --output"),
        ("card tiny-llama --policy wrong --output new", "alpha must be a finite number above 0"),
        ("card tiny-llama --policy other --output new", "calibrated for 30 attention layers"),
        ("perplexity wrong", "alpha must be a finite number above 0"),
        ("card ", "'' is not a folder with a sparse_config.json"),
        ("publish  me/x", "'' is not a model"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: str, message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, policy in ("wrong", '{"alpha": -1}'), ("other", '{"calibration": {"layers": 30}}'), (".", "{}"):
        (home / name).mkdir(exist_ok=True)
        (home / name / NAME).write_text(policy)
    tiny.unsupported("bloom").config.save_pretrained(home / "bloom")
    before = sorted(home.rglob("*"))
    assert message in small.refusal(capsys, *arguments.split(" "))
    assert sorted(home.rglob("*")) == before
