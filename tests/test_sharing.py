"""Patched models that are copied, saved, shared by threads or handed to other processes; what they leave in memory."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse import attention, cache
from hf_sparse.visibility import ranges
from tests import tiny
from tests.installed import ROOT
from tests.sparse import SPARSE, assert_same, generated, sparse_model

IDS = tiny.tokens(2, 90)
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux says of a process, or forks")


# Copies.


def test_a_patched_model_is_saved_and_loaded_whole() -> None:
    model = sparse_model("gemma2", "grouped")
    sparse, tokens = tiny.logits(model, IDS), generated(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(tiny.logits(loaded, IDS), sparse)
    assert generated(loaded) == tokens
    assert torch.equal(tiny.logits(hf_sparse.unpatch(loaded), IDS), tiny.logits(tiny.model("gemma2"), IDS))
    # The weights of a patched model are those of the model: they load where nothing is patched.
    dense = tiny.model("gemma2", seed=3)
    dense.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(dense, IDS), tiny.logits(tiny.model("gemma2"), IDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_patched_model_changes_its_dtype(dtype: torch.dtype, engine: str) -> None:
    moved = sparse_model("llama", "grouped", engine=engine)
    moved = moved.half() if dtype == torch.float16 else moved.to(dtype)
    assert torch.equal(
        tiny.logits(moved, IDS), tiny.logits(sparse_model("llama", "grouped", dtype, engine=engine), IDS)
    )
    dense = tiny.logits(tiny.model("llama", dtype), IDS)
    assert torch.equal(tiny.logits(hf_sparse.unpatch(moved), IDS), dense)


# Threads.


def reported(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    return [(row["calls"], row["visible"], row["kept"]) for row in hf_sparse.report(model).rows]


@pytest.mark.parametrize("selector", ["grouped", "topk"])
@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model each"])
def test_threads_run_models_at_once(shared: bool, selector: str) -> None:
    """Decoding, too, with a cache each; what is counted is what all of them did together."""
    one = sparse_model("llama", selector)
    wanted = tiny.logits(one, IDS), generated(one)
    once, times = reported(one), 2
    models = [sparse_model("llama", selector)] * 4 if shared else [sparse_model("llama", selector) for _ in range(4)]

    def run(model: PreTrainedModel) -> list[tuple[Tensor, list[list[int]]]]:
        return [(tiny.logits(model, IDS), generated(model)) for _ in range(times)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, models):
            for logits, tokens in found:
                assert torch.equal(logits, wanted[0])
                assert tokens == wanted[1]
    runs = times * (4 if shared else 1)
    for model in models:
        assert reported(model) == [tuple(runs * number for number in counts) for counts in once]


# Processes.


def answer(pickled: bytes, path: str) -> None:
    """Write what a pickled model says, in a process of its own."""
    torch.set_num_threads(1)
    model = pickle.loads(pickled)
    torch.save((tiny.logits(model, IDS), generated(model)), path)


def test_a_patched_model_is_handed_to_a_new_process(tmp_path: Path) -> None:
    model = sparse_model("llama", "grouped")
    path = tmp_path / "answer.pt"
    process = multiprocessing.get_context("spawn").Process(target=answer, args=(pickle.dumps(model), str(path)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    logits, tokens = torch.load(path)
    assert torch.equal(logits, tiny.logits(model, IDS))
    assert tokens == generated(model)


class Answers(Dataset[Tensor]):
    """The logits of a model, found where they are asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return tiny.logits(self.model, tiny.tokens(1, 90, seed=index))[0]


@LINUX
def test_workers_that_were_forked_after_the_kernels_ran() -> None:
    """By several threads before. PyTorch's own operators hang with more than one after a fork; `DataLoader` sets it."""
    code = """
import torch
from torch.utils.data import DataLoader
from tests.sparse import sparse_model
from tests.test_sharing import Answers

for threads in (1, 3):
    torch.set_num_threads(threads)
    answers = Answers(sparse_model("llama", "grouped"))
    here = [answers[i] for i in range(len(answers))]
    there = list(DataLoader(answers, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True)), threads
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=200)
    assert not done.returncode, done.stderr.decode()


# Memory.


def held() -> dict[str, int]:
    """How much is alive of what grows with every call, if anything does."""
    gc.collect()
    alive = sum(isinstance(x, Tensor) for x in gc.get_objects())
    return {
        "tensors": alive,
        "cache layers": len(cache._layers),
        "layers": len(attention._states),
        "masks": len(ranges._remembered),
    }


def grown(before: dict[str, int]) -> dict[str, int]:
    """What there is more of than before; what other tests left may be gone."""
    return {name: number for name, number in held().items() if number > before[name]}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def generate(model: PreTrainedModel, times: int) -> None:
    for seed in range(times):
        model.generate(tiny.tokens(1, 20 + seed % 7, seed), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("selector", ["grouped", "topk"])
def test_generating_leaves_nothing_behind(selector: str) -> None:
    model = sparse_model("llama", selector)
    generate(model, 10)
    hf_sparse.report(model)  # adds up counts that wait
    before = held()
    generate(model, 20)
    hf_sparse.report(model)
    assert grown(before) == {}


@pytest.mark.slow
@LINUX
def test_memory_is_flat_over_a_thousand_calls() -> None:
    model = sparse_model("llama", "grouped")
    generate(model, 200)
    before = resident()
    generate(model, 1000)
    assert resident() - before < 4 << 20


def test_patching_and_unpatching_leave_nothing_behind() -> None:
    model: Any = tiny.model("llama")

    def again(times: int) -> None:
        for _ in range(times):
            with hf_sparse.patched(model, SPARSE):
                tiny.logits(model, IDS[:, :30])

    again(3)
    before = held()
    again(20)
    assert grown(before) == {}
    assert_same(tiny.logits(model, IDS), tiny.logits(tiny.model("llama"), IDS))
