"""`scripts/canary.py`: what it asks of pip and counts, and that its committed records show what pyproject.toml says."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.results import versions

ROOT = Path(__file__).parents[1]
CANARY = runpy.run_path(str(ROOT / "scripts/canary.py"))
RECORDS = CANARY["records"]()
PINS = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "scripts/constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


def test_what_is_asked_for() -> None:
    bounds = CANARY["dependencies"]()
    oldest, newest = CANARY["requirements"]("oldest"), CANARY["requirements"]("newest")
    assert f"torch=={bounds['torch']}.*" in oldest
    assert {"torch", "transformers", "pytest"} <= set(newest)
    pair = CANARY["requirements"]("mine", "2.12.1", None)
    assert "torch==2.12.1" in pair
    assert "transformers" in pair
    assert CANARY["requirements"]("pinned")[-1].endswith("constraints.txt")


def test_outcomes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'first line\\nsecond'\n"
        "def test_skipped(): pytest.skip('no reason')\n"
        "@pytest.fixture\ndef broken(): raise OSError('fixture')\n"
        "def test_error(broken): pass\n"
    )
    (tmp_path / "test_torn.py").write_text("import nowhere_to_be_found\n")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", "--rootdir=."]
    subprocess.run([*command, "--continue-on-collection-errors", "."], cwd=tmp_path, capture_output=True)
    found = CANARY["counted"](report)
    assert found["tests"] == {"test_some": {"passed": 1, "failed": 2, "skipped": 1}, "test_torn": {"failed": 1}}
    assert found["failures"]["test_some::test_bad"] == "AssertionError: first line"
    assert found["failures"].keys() == {"test_some::test_bad", "test_some::test_error", "test_torn::test_torn"}
    assert found["skipped"] == {"no reason": 1}
    assert CANARY["cell"](found, "test_some") == "2 failed, 1 passed, 1 skipped"


def test_what_cannot_be_installed_is_told() -> None:
    why = CANARY["install"](Path(sys.executable), ["--no-index", "no-such-package-anywhere"])
    assert "no-such-package-anywhere" in why
    assert CANARY["cell"]({"failure": f"does not install: {why}"}, "test_share") == f"does not install: {why}"


def test_the_table_is_that_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = CANARY["TABLES"].read_text(encoding="utf-8")
    monkeypatch.setitem(CANARY["draw"].__globals__, "TABLES", tmp_path / "tables.md")
    CANARY["draw"]()
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") == committed


@pytest.mark.parametrize("name", CANARY["ENVIRONMENTS"])
def test_every_environment_held(name: str) -> None:
    record = RECORDS[name]
    assert record["failures"] == {}
    assert all(record["tests"][file]["passed"] > 0 for file in CANARY["TESTS"])


def test_the_oldest_versions_shown_are_the_lower_bounds() -> None:
    shown = RECORDS["oldest"]["versions"]
    for package, bound in CANARY["dependencies"]().items():
        assert f"{shown[package]}.".startswith(f"{bound}."), package


def test_the_pinned_versions_shown_are_the_pins() -> None:
    shown = RECORDS["pinned"]["versions"]
    for package in CANARY["dependencies"]().keys() & PINS.keys():
        assert shown[package].partition("+")[0] == PINS[package], package


def test_results_and_packages_say_one_version() -> None:
    assert versions()["hf_sparse"] == hf_sparse.__version__
