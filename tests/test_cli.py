from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sparse.cli import main
from hf_sparse.cli.options import SparseOptions
from hf_sparse.config import DENSE_BELOW, SparseAttentionConfig
from tests import small, tiny
from tests.small import refusal, run_command

SPARSE = shlex.split("--alpha 2 --min-keys 4 --sink-keys 1 --recent-keys 2 --dense-below 8 --dense-layers none")
SHORT = ["--lengths", "48,96", "--targets", "40", "--device", "cpu", *SPARSE]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `tiny-llama` and texts."""
    folder = tmp_path_factory.mktemp("home")
    small.save_model(folder / "tiny-llama")
    small.save_texts(folder / "texts")
    (folder / "short.txt").write_text(small.words(20))
    (folder / "latin.txt").write_bytes(b"gr\xf6\xdfe")
    tiny.unsupported("bloom").config.save_pretrained(folder / "bloom")
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def test_perplexity_prints_tables_and_writes_what_it_says(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_command("perplexity", "tiny-llama", "--text", "texts", *SHORT, "--output", str(out)) == 0
    printed = capsys.readouterr()
    assert "ratio to dense" in printed.out
    assert "grouped / fixed-grouped" in printed.out
    assert "bootstrap over documents and blocks" in printed.out
    assert "perplexity:" in printed.err
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 6
    assert str(home) not in (out / "rows.jsonl").read_text()
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "tables.md").read_text().startswith("| method |")
    assert json.loads((out / "summary.json").read_text())["lengths"] == [48, 96]
    assert rows[-1]["config"]["alpha"] == 2.0
    assert rows[-1]["config"]["dense_layers"] == []


def test_json_is_all_that_stdout_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["perplexity", "tiny-llama", "--text", "texts", *SHORT, "--methods", " window , dense", "--json"]
    assert run_command(*arguments, "--output", str(tmp_path)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert {row["method"] for row in summary["results"]} == {"dense", "window"}


def test_the_default_folder_is_named_after_model_and_command(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--text", str(home / "texts"), *SHORT, "--methods", "window", "--device-map", "auto"]
    assert run_command("perplexity", str(home / "tiny-llama"), *arguments) == 0
    assert (tmp_path / "results" / "tiny-llama-perplexity" / "rows.jsonl").is_file()


def test_attention_error_compares_every_law_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SHORT[:2], *SHORT[4:], "--rows", "16", "--output", str(tmp_path)]
    assert run_command("attention-error", "tiny-llama", "--text", "texts", *options) == 0
    printed = capsys.readouterr().out
    assert "retained mass" in printed
    assert "slope, worst 1 % of rows" in printed
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in lines} >= {"dense", "topk", "fixed", "grouped", "window"}
    monkeypatch.setattr("hf_sparse.measure.attention_error.measure", None)
    assert run_command("attention-error", "tiny-llama", "--text", "texts", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == lines


def test_the_demo_patches_writes_and_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse.cli.demo._LENGTHS", [64, 128, 192, 240])
    options = ["--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr("hf_sparse.cli.demo._TARGETS", 32)
    assert run_command("demo", "tiny-llama", *options) == 0
    printed = capsys.readouterr().out
    for part in ("hf_sparse.patch(model)", "kept / visible keys", "sparse writes", "ratio to dense", "is lost"):
        assert part in printed
    assert {path.name for path in tmp_path.glob("*/*.png")} == {"perplexity.png", "attention_error.png"}
    assert run_command("demo", "tiny-llama", *options, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"texts", "report", "perplexity", "attention_error"}


def test_inspect_says_yes_and_no(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("inspect", "tiny-llama") == 0
    assert "LlamaForCausalLM can be patched" in capsys.readouterr().out
    assert run_command("inspect", "bloom") == 1
    assert "BloomForCausalLM cannot be patched" in capsys.readouterr().out
    assert run_command("inspect", "tiny-llama", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["supported"]
    assert len(report["layers"]) == tiny.LAYERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Missing command"),
        ("unheard-of", "unheard-of"),
        ("perplexity", "model"),
        ("perplexity missing.gguf", "missing.gguf: no such file"),
        ("perplexity texts", "there is no config.json"),
        ("inspect ./missing", "is not a model"),
        ("inspect ", "'' is not a model: pass a Hub id"),
        (f"inspect {'a' * 300}", "aaa: File name too long"),
        (f"perplexity tiny-llama --text {'a' * 300} --lengths 48 --targets 8", "aaa: File name too long"),
        ("inspect tiny-llama --revision x", "tiny-llama is here, not on the Hub: it has no revision 'x'"),
        ("perplexity tiny-llama --revision x", "tiny-llama is here, not on the Hub: it has no revision 'x'"),
        ("perplexity tiny-llama --text= --lengths 48 --targets 8", "'' is not a text: pass a file"),
        ("bench tiny-llama --text= --generate 48 --new-tokens 8 --cached none", "'' is not a text: pass a file"),
        ("perplexity bloom --text texts --lengths 48 --targets 8", "BloomForCausalLM cannot be patched"),
        ("perplexity tiny-llama --text missing.txt --lengths 48 --targets 8", "missing.txt: no such file"),
        ("perplexity tiny-llama --text latin.txt --lengths 48 --targets 8", "latin.txt cannot be read"),
        ("perplexity tiny-llama --text short.txt --lengths 48 --targets 8", "it has 20 tokens, and 49 are needed"),
        ("perplexity tiny-llama --text texts --lengths 257 --targets 8", "above the model's maximum of 256"),
        ("perplexity tiny-llama --lengths 96,48 --targets 8", "lengths must rise"),
        ("perplexity tiny-llama --lengths 48,48 --targets 8", "lengths must rise"),
        ("perplexity tiny-llama --lengths 48,many", "--lengths takes whole numbers"),
        ("perplexity tiny-llama --lengths 48 --targets 49", "targets must be between 1 and"),
        ("perplexity tiny-llama --lengths -48 --targets 8", "lengths must be whole numbers"),
        ("perplexity tiny-llama --targets 0", "--targets"),
        ("perplexity tiny-llama --offset -1", "--offset"),
        ("perplexity tiny-llama --alpha -1", "alpha must be a finite number above 0; got -1"),
        ("perplexity tiny-llama --alpha lots", "--alpha"),
        ("perplexity tiny-llama --exponent 2", "exponent must be"),
        ("perplexity tiny-llama --law sqrt", "law must be one of"),
        ("perplexity tiny-llama --dense-layers first", "--dense-layers takes whole numbers"),
        ("perplexity tiny-llama --lengths 48 --targets 8 --methods topk,magic", "got 'magic'"),
        ("perplexity tiny-llama --text texts --lengths 48 --targets 8 --dense-layers 7", "dense_layers names layers"),
        ("perplexity tiny-llama --text texts --lengths 48 --targets 8 --dtype int4", "dtype must be one of"),
        ("perplexity tiny-llama --device warp", "device 'warp' cannot be used: "),
        (
            "perplexity tiny-llama --device meta",
            "device 'meta' cannot be used: this is no machine for meta; there is cpu",
        ),
        ("perplexity tiny-llama --device=", "device '' cannot be used: Device string must not be empty; there is cpu"),
        ("perplexity tiny-llama --threads 100000", "CPUs here; got 100000"),
        ("theory --threads 100000000", "threads must be at most"),
        ("perplexity tiny-llama --seed 99999999999999999999", "--seed"),
        ("memory --seed 99999999999999999999", "--seed"),
        (
            "perplexity tiny-llama --lengths 99999999999999999999 --targets 8",
            "--lengths takes whole numbers separated by",
        ),
        ("perplexity tiny-llama --lengths 16000000 --targets 8", "above the model's maximum of 256"),
        ("attention-error tiny-llama --lengths 16000000", "above the model's maximum of 256"),
        ("perplexity tiny-llama --lengths 48 --targets 8 --dense-layers ,", "--dense-layers takes whole numbers"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *(arguments.split(" ") if arguments else []))


def test_a_programming_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("hf_sparse.cli.evaluate.cut_windows", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["perplexity", "tiny-llama", "--text", "texts", *SHORT])


@pytest.mark.parametrize("command", [[], ["inspect"], ["perplexity"]])
def test_help_is_printed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(*command, "-h") == 0
    assert "Usage: " in capsys.readouterr().out


def test_names_that_the_encoding_of_stdout_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(piped, "ascii", write_through=True))
    assert run_command("card", "tiny-llama", "--output", str(tmp_path / "模型")) == 0
    assert rb"/\u6a21\u578b:" in piped.getvalue()


def test_options_that_are_not_given_are_the_packages_defaults() -> None:
    assert SparseOptions().config() == SparseAttentionConfig(dense_below=DENSE_BELOW)
    assert SparseOptions(dense_layers="none").config().dense_layers == ()
    assert SparseOptions(dense_layers="3,1").config().dense_layers == (1, 3)


def test_two_processes_make_the_rows_of_one(home: Path, tmp_path: Path) -> None:
    def rows(folder: Path) -> dict[str, float]:
        lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        assert len(lines) == 2 * 2 * 2
        return {line["key"]: line["nll"] for line in lines}

    arguments = ["tiny-llama", "--text", "texts", *SHORT, "--methods", "window"]
    assert run_command("perplexity", *arguments, "--output", str(tmp_path / "one")) == 0
    script = Path(__file__).parents[1] / "scripts" / "perplexity.py"
    # It takes a port of its own that is free. The processes find the compiled kernels that the run above has found.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--standalone", "--local_addr", "127.0.0.1"]
    done = subprocess.run(
        [*launch, str(script), *arguments, "--json", "--output", str(tmp_path / "two")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "two") == pytest.approx(rows(tmp_path / "one"), rel=1e-6)
    assert len(json.loads(done.stdout)["results"]) == 4
    assert "/4 [" in done.stderr  # the main process had half of the work
    assert "/8 [" not in done.stderr
