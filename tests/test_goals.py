"""Goals of quality, as read from runs of `hf-sparse perplexity`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hf_sparse.goals import QUALITY_GOALS, judge
from hf_sparse.goals.quality import AgainstFixed, Perplexity
from tests.small import run_command

RUN = Path(__file__).parents[1] / "model_cards/SmolLM2-135M-Instruct-calibrated/perplexity/summary.json"


@pytest.fixture
def run() -> dict[str, Any]:
    return dict(json.loads(RUN.read_text(encoding="utf-8")))


def test_the_ratio_of_calibrated_laws_is_read(run: dict[str, Any]) -> None:
    [row] = [row for row in run["results"] if (row["method"], row["length"]) == ("grouped", 4096)]
    reading = Perplexity("smollm2-135m", "grouped", 4096, 0.15).read(run)
    assert reading is not None
    assert reading.measured["perplexity ratio"] == {"median": row["ratio"], "low": row["low"], "high": row["high"]}
    assert reading.density == row["sparse_density"] <= 0.15


@pytest.mark.parametrize(
    "reader",
    [
        Perplexity("gemma-3", "grouped", 4096, 0.15),
        Perplexity("smollm2-135m", "grouped", 4096, 0.14),
        Perplexity("smollm2-135m", "grouped", 2048, 0.15),
        Perplexity("smollm2-135m", "topk", 4096, 0.15),
        Perplexity("smollm2-135m", "grouped", 4096, 0.15, calibrated=False),
        AgainstFixed("smollm2-135m", (512, 4096)),
    ],
)
def test_a_run_of_something_else_says_nothing(run: dict[str, Any], reader: Perplexity | AgainstFixed) -> None:
    assert reader.read(run) is None


@pytest.mark.parametrize("change", [{"targets": 512}, {"documents": [{}] * 5}])
def test_too_few_documents_or_tokens_say_nothing(run: dict[str, Any], change: dict[str, Any]) -> None:
    assert Perplexity("smollm2-135m", "grouped", 4096, 0.15).read({**run, **change}) is None


def test_adaptive_against_fixed_is_the_mean_over_the_lengths(run: dict[str, Any]) -> None:
    run = copy.deepcopy(run)
    mean = {"ratio": 0.99, "low": 0.98, "high": 0.995}
    run["adaptive_vs_fixed"] = [{"adaptive": "grouped", "fixed": "fixed-grouped", "mean": mean}]
    reading = AgainstFixed("smollm2-135m", (4096, 8192)).read(run)
    assert reading is not None
    assert reading.measured["adaptive / fixed"]["median"] == 0.99
    verdicts = {row["target"]: row["verdict"] for row in judge({"run": run}, QUALITY_GOALS)}
    assert verdicts["SmolLM2, adaptive over fixed at equal cost, 4,096 and 8,192 tokens, calibrated"] == "goal met"


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["{}/a", "{}/b"], ["a", "b"]),
        (["{}/a/perplexity", "{}/b/perplexity"], ["a/perplexity", "b/perplexity"]),
        (["{}/a/perplexity", "{}/b/a/perplexity", "{}/c"], ["{0.name}/a/perplexity", "b/a/perplexity", "c"]),
        (["a/perplexity", "b/perplexity", "./c"], ["a/perplexity", "b/perplexity", "c"]),
        (["perplexity", "{}/a/perplexity", "{}/a/perplexity"], ["perplexity", "a/perplexity"]),
    ],
)
def test_no_run_is_lost_to_another_of_the_same_name(
    folders: list[str],
    names: list[str],
    run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [folder.format(tmp_path) for folder in folders]
    for folder in given:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "summary.json").write_text(json.dumps(run))
    assert run_command("goals", *given, "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"] == [name.format(tmp_path) for name in names]
