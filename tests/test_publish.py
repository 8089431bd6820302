"""`hf-sparse card` and `hf-sparse publish` without the Hub: folders, dry runs, and mistakes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import CalibrationRecord, SparseAttentionConfig
from hf_sparse.config import Policy
from hf_sparse.config.files import NAME, read, write
from tests import small

CARDS = Path(__file__).parents[1] / "model_cards"


@pytest.fixture(scope="module")
def home(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny-llama`, its policy and what was measured of it."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_llama, home / "tiny-llama")
    (home / "tiny-llama" / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    write(Policy(small.CONFIG), home / "policy" / NAME)
    (home / "perplexity").mkdir()
    summary = json.loads((CARDS / "SmolLM2-135M-Instruct" / "perplexity" / "summary.json").read_text())
    summary["configs"]["grouped"] = small.CONFIG.to_dict()
    (home / "perplexity" / "summary.json").write_text(json.dumps(summary))
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> int:
    return small.run_command(*map(str, arguments))


def test_a_card_from_a_model_and_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "tiny-sparse"
    arguments = ["tiny-llama", "--policy", "policy", "--results", "perplexity", "--output", out]
    assert run("card", *arguments, "--base-model", "someone/tiny", "--base-revision", "a" * 40, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == sorted(
        ["README.md", "config.json", "perplexity/perplexity.png", "perplexity/summary.json", NAME]
    )
    policy = read(out / NAME)
    assert policy.config == small.CONFIG
    assert (policy.base_model, policy.revision, policy.weights) == ("someone/tiny", "a" * 40, False)
    assert len(policy.quality) == 15
    card = ModelCard((out / "README.md").read_text())
    assert card.data.license == "mit"
    assert "perplexity/perplexity.png" in card.text
    assert (out / "config.json").read_bytes() == Path("tiny-llama/config.json").read_bytes()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run("card", out) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_one_command_makes_a_published_folder_anew(tmp_path: Path) -> None:
    name = "gemma-3-270m"
    shutil.copytree(CARDS / name, tmp_path / name)
    assert run("card", tmp_path / name) == 0
    assert (tmp_path / name / "README.md").read_text() == (CARDS / name / "README.md").read_text()
    assert replace(read(tmp_path / name / NAME), versions={}) == replace(read(CARDS / name / NAME), versions={})


def _readme_is_a_folder(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()


def _section_has_no_end(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("<!-- hf-sparse: end -->", ""))


def _results_are_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "perplexity")
    (folder / "perplexity").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (_readme_is_a_folder, [], "README.md: it is a folder; remove it"),
        (_section_has_no_end, [], "card must hold '<!-- hf-sparse: begin -->' and then '<!-- hf-sparse: end -->'"),
        (
            lambda folder: (folder / "perplexity" / "summary.json").unlink(),
            [],
            "perplexity holds rows.jsonl without summary.json: make it with hf-sparse perplexity --output",
        ),
        (
            lambda folder: (folder / "attention-error" / "summary.json").rename(folder / "attention-error/rows.jsonl"),
            ["--results", CARDS / "SmolLM2-135M-Instruct" / "perplexity"],
            "attention-error holds rows.jsonl without summary.json",
        ),
        (_results_are_a_file, ["--results", CARDS / "SmolLM2-135M-Instruct" / "perplexity"], "perplexity is a file"),
    ],
)
def test_a_folder_that_no_card_can_be_made_in_is_left_as_it_was(
    damage: Any, options: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "card"
    shutil.copytree(CARDS / "SmolLM2-135M-Instruct", folder)
    damage(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run("card", folder, *options) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_dry_run_shows_files_and_card(capsys: pytest.CaptureFixture[str]) -> None:
    name = "SmolLM2-135M-Instruct"
    assert run("publish", CARDS / name, "someone/tried", "--dry-run") == 0
    printed = capsys.readouterr()
    assert "someone/tried (new)" in printed.out
    size = (CARDS / name / "perplexity" / "summary.json").stat().st_size
    assert ["perplexity/summary.json", f"{size:,}", "bytes"] in [line.split() for line in printed.out.splitlines()]
    assert 'hf_sparse.from_pretrained("someone/tried")' in printed.out
    assert printed.out.count("\nmodel-index:\n- name: tried\n") == 1
    assert "HF_HUB_OFFLINE is set; shown as for a new repository" in printed.err


def test_a_dry_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny-llama", "me/x", "--base-model", "someone/tiny", "--dry-run", "--json"]
    assert run("publish", *arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["repo_id"], shown["exists"]) == ("me/x", False)
    assert [file["path"] for file in shown["files"]] == ["README.md", "config.json", NAME]
    assert shown["files"][0]["bytes"] == len(shown["card"].encode())
    assert ModelCard(shown["card"]).data.base_model == "someone/tiny"
    assert "# The base" not in shown["card"]


def test_weights_may_go_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("publish", "tiny-llama", "me/x", "--policy", "policy", "--weights", "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    files = {file["path"] for file in shown["files"]}
    assert files >= {"model.safetensors", "config.json", "tokenizer.json", NAME, "README.md"}
    assert "base_model" not in ModelCard(shown["card"]).data.to_dict()
    assert str(Path.cwd()) not in shown["card"]


def test_what_a_policy_names_is_evaluated_under_its_law(home: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "tiny-llama")
    hf_sparse.save_pretrained(hf_sparse.patch(model, small.CONFIG), tmp_path / "saved")
    small.save_texts(tmp_path / "texts")
    data = ["--text", tmp_path / "texts", "--lengths", "48,96", "--targets", 40, "--device", "cpu"]
    out = tmp_path / "perplexity"
    assert run("perplexity", tmp_path / "saved", *data, "--methods", "grouped", "--output", out) == 0
    assert run("card", tmp_path / "saved", "--results", out) == 0
    policy = read(tmp_path / "saved" / NAME)
    assert {row.metric for row in policy.quality} == {"perplexity", "perplexity_ratio"}
    assert {row.model for row in policy.quality} == {"tiny-llama"}
    assert run("inspect", tmp_path / "saved") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish", "policy", "me/x"], "is published with the Hub id of its base model: name it with"),
        (["publish", "tiny-llama", "me/x"], "is published with the Hub id of its base model: name it with"),
        (["publish", "tiny-llama", "me/x", "--base-model", "a/b/c"], "base_model must be a Hub id"),
        (["publish", "tiny-llama", "me/x", "--base-model", "a/b"], "without a token: log in with `hf auth login`"),
        (["publish", "tiny-llama", "me/x", "--results", "nowhere"], "nowhere holds no results"),
        (["publish", "tiny-llama", "me/x", "--results", "perplexity"], "holds no measurement of this configuration"),
        (["publish", "tiny-llama", "me/x", "--policy", "nowhere"], "'nowhere' does not exist"),
        (["publish", "nowhere/", "me/x"], "cannot read the model nowhere/"),
        (["publish", "tiny-llama", "m e/x", "--base-model", "a/b", "--dry-run"], "m e/x"),
        (["card", "tiny-llama"], "tiny-llama is not a folder with a sparse_config.json: pass --output"),
        (["card", "tiny-llama", "--policy", "wrong", "--output", "new"], "alpha must be a finite number above 0"),
        (["card", "tiny-llama", "--policy", "other", "--output", "new"], "calibrated for 30 attention layers"),
        (["card", "torn"], "the metadata of the model card, README.md of torn, cannot be read"),
        (["card", ""], "'' is not a folder with a sparse_config.json"),
        (["card", "", "--output", "new"], "'' is not a model"),
        (["publish", "", "me/x"], "'' is not a model"),
        (["perplexity", "wrong"], "alpha must be a finite number above 0"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wrong", "other", "torn"):
        (home / name).mkdir(exist_ok=True)
    (home / "wrong" / NAME).write_text('{"alpha": -1}')
    other = SparseAttentionConfig(calibration=CalibrationRecord(layers=30))
    write(Policy(other), home / "other" / NAME)
    write(Policy(), home / "torn" / NAME)
    (home / "torn" / "README.md").write_text("---\nlicense: [mit\n---\n")
    write(Policy(), home / NAME)
    before = sorted(home.rglob("*"))
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("hf-sparse:") == 1
    assert "Traceback" not in printed.err
    assert sorted(home.rglob("*")) == before
