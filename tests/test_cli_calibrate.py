"""`hf-sparse calibrate`, and the evaluation of what it writes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.cli.calibrate import CalibrationOptions
from hf_sparse.cli.options import SparseOptions
from hf_sparse.config import files as policy_files
from tests import small, tiny
from tests.small import refusal, run_command

FLOORS = ["--min-keys", "96", "--sink-keys", "1", "--recent-keys", "2", "--dense-below", "0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `tiny-llama` and texts."""
    folder = tmp_path_factory.mktemp("home")
    tiny.model("llama", max_position_embeddings=2048).save_pretrained(folder / "tiny-llama")
    small.tokenizer().save_pretrained(folder / "tiny-llama")
    small.save_texts(folder / "texts", count=3, tokens=1100)
    (folder / "other.txt").write_text(small.words(1100, seed=8))
    (folder / "empty").mkdir()
    (folder / "empty.txt").touch()
    (folder / "broken.json").write_text('{"alpha": -1}')
    tiny.unsupported("bloom").config.save_pretrained(folder / "bloom")
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def policy(home: Path) -> Path:
    """A folder with what `calibrate` wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        options = ["--text", "texts", "--target", "density=0.3", "--output", "policy", "--device", "cpu"]
        assert run_command("calibrate", "tiny-llama", *options, *FLOORS) == 0
    return home / "policy"


def test_calibrate_writes_what_patch_takes(policy: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in policy.iterdir()}
    assert names == {
        "calibration.json",
        "sparse_config.json",
        "tables.md",
        "curves.jsonl",
        "probes.jsonl",
        "check.jsonl",
    }
    config = policy_files.read(policy / "sparse_config.json").config
    assert config.calibration is not None
    assert config.calibration.base_model == "tiny-llama"
    assert re.fullmatch(r"[0-9a-f]{16}", config.calibration.revision or "")
    assert config.calibration.documents == ("text0.txt", "text1.txt")
    assert config.calibration.held_out == ("text2.txt",)
    hf_sparse.patch(tiny.model("llama"), policy)
    for path in policy.iterdir():
        assert str(home) not in path.read_text()


def test_report_shows_what_calibrate_found(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (policy / "tables.md").read_text()
    (policy / "tables.md").write_text("")
    assert run_command("report", "policy", "--write") == 0
    assert "law of a head" in capsys.readouterr().out
    assert (policy / "tables.md").read_text() == before


def test_laws_for_a_selector_of_ones_own_leave_no_older_policy(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(policy, folder)
    selector = Path(__file__).parents[1] / "scripts/selectors/key_norm.py"
    options = ["--selector", f"{selector}:KeyNorm", "--text", "texts", "--target", "density=0.3", "--device", "cpu"]
    assert run_command("calibrate", "tiny-llama", *options, *FLOORS, "--output", str(folder)) == 0
    assert "calibration.json and no sparse_config.json" in capsys.readouterr().out
    assert not (folder / "sparse_config.json").exists()
    assert run_command("report", str(folder)) == 0
    assert "first quartile" in capsys.readouterr().out


def test_calibrate_prints_tables_and_resumes(
    policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse.calibration.measurements.error_curves", None)
    options = ["--text", "texts", "--target", "density=0.3", "--output", "policy", "--device", "cpu", *FLOORS]
    assert run_command("calibrate", "tiny-llama", *options) == 0
    printed = capsys.readouterr()
    for part in ("density=0.3", "calibrated", "uniform", "constant", "linear", "first quartile", "exponent", "of 8"):
        assert part in printed.out
    assert "error against budget" in printed.err
    assert (policy / "tables.md").read_text().startswith("| target |")
    assert run_command("calibrate", "tiny-llama", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((policy / "calibration.json").read_text())


def test_options_that_are_not_given_leave_a_policy_as_it_is() -> None:
    policy = SparseAttentionConfig(dense_below=512, min_keys=96, recent_keys=8, dense_layers=(1,))
    assert SparseOptions().config(policy) == CalibrationOptions().config(policy) == policy
    assert CalibrationOptions(dense_below=0, selector="topk").config(policy) == replace(
        policy, dense_below=0, selector="topk"
    )
    assert CalibrationOptions(dense_layers="none").config(policy).dense_layers == ()


def test_a_target_that_is_not_met_is_a_negative_answer(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", "texts", "--held-out", "other.txt", "--target", "density=0.01", "--device", "cpu", *FLOORS]
    assert run_command("calibrate", "tiny-llama", "--output", "policy2", *options) == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[0] == "density=0.01"
    assert line.split()[2] == "no"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("calibrate", "model"),
        ("calibrate tiny-llama --target density", "METRIC=VALUE or METRIC=VALUE@LENGTH"),
        ("calibrate tiny-llama --target density=3", "below 1; got 3"),
        ("calibrate tiny-llama --selector best", "selector must be one of"),
        ("calibrate tiny-llama --min-keys 0", "min_keys must be"),
        ("calibrate tiny-llama --dense-layers first", "--dense-layers takes whole numbers"),
        ("calibrate tiny-llama --text missing.txt", "missing.txt: no such file"),
        ("calibrate tiny-llama --text empty", "empty holds no"),
        ("calibrate tiny-llama --text other.txt", "two texts to fit laws to"),
        ("calibrate tiny-llama --text texts --held-out texts", "are the same text"),
        ("calibrate tiny-llama --text texts --length 5000", "length 5000 is above the maximum of this model, 2048"),
        ("calibrate tiny-llama --text texts --target density=.3@4096 --extrapolate", "@4096 is above the maximum"),
        ("calibrate tiny-llama --text texts --held-out empty.txt", "empty.txt is too short: it has 0 tokens"),
        ("calibrate tiny-llama --text texts --dense-layers 9", "dense_layers names layers [9]"),
        ("calibrate tiny-llama --text texts --dense-layers ,", "--dense-layers takes whole numbers"),
        ("calibrate tiny-llama --text texts --revision x", "tiny-llama is here, not on the Hub"),
        ("calibrate tiny-llama --text texts --length 1090 --target density=.3@1099", "or ask for extrapolation"),
        ("calibrate tiny-llama --text texts --length 1500", "text0.txt is too short"),
        ("calibrate bloom --text texts", "BloomForCausalLM cannot be patched"),
        ("perplexity tiny-llama --policy missing.json", "is not a policy"),
        ("perplexity tiny-llama --policy empty", "holds no sparse_config.json"),
        ("perplexity tiny-llama --policy other.txt", "it must be JSON"),
        ("calibrate tiny-llama --text texts --lookups", "different words; look-ups take 100"),
        ("attention-error tiny-llama --policy broken.json", "alpha must be"),
        ("perplexity bloom --policy policy --methods uniform", "BloomForCausalLM cannot be patched"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    arguments: str, message: str, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert message in refusal(capsys, *arguments.split())


def test_perplexity_evaluates_a_policy(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", "texts", "--lengths", "600", "--targets", "24", "--device", "cpu", "--output", str(tmp_path)]
    methods = ["--methods", "grouped,uniform,fixed-grouped,decode,decode-topk"]
    assert run_command("perplexity", "tiny-llama", "--policy", "policy", *methods, *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    configs = {row["method"]: row["config"] for row in rows}
    own = json.loads((policy / "sparse_config.json").read_text())
    assert configs["grouped"]["per_head"] == configs["decode-topk"]["per_head"] == own["per_head"]
    assert "calibration" not in configs["decode"]
    assert configs["decode"]["selector"] == "grouped"
    assert configs["uniform"]["law"] == "power"
    assert configs["uniform"]["per_head"] is configs["fixed-grouped"]["per_head"] is None
    densities = {row["method"]: row["density"] for row in rows}
    assert densities["uniform"] == pytest.approx(densities["grouped"], rel=0.01)
    assert densities["fixed-grouped"] == pytest.approx(densities["grouped"], rel=0.02)
    assert "decode" in capsys.readouterr().out
    assert (tmp_path / "perplexity.png").is_file()
    # What is given goes before the policy.
    arguments = ["--methods", "window", "--recent-keys", "32", *options, "--json"]
    assert run_command("perplexity", "tiny-llama", "--policy", "policy/sparse_config.json", *arguments) == 0
    config = json.loads(capsys.readouterr().out)["configs"]["window"]
    assert (config["recent_keys"], config["min_keys"]) == (32, 96)


def test_attention_error_compares_calibrated_laws_with_one_for_all(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--text", "texts", "--lengths", "256,512,1024", "--rows", "64", "--device", "cpu"]
    assert run_command("attention-error", "tiny-llama", "--policy", "policy", *options, "--output", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "method / calibrated" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["methods"] == ["calibrated", "power", "fixed", "fraction", "log"]
    assert {row["method"] for row in summary["slopes"] if row["slope"] is not None} >= {"calibrated", "power", "fixed"}
    assert (tmp_path / "attention_error.png").is_file()
