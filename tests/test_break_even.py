from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse import break_even
from hf_sparse.break_even import Machine
from hf_sparse.config import DENSE_BELOW, SparseAttentionConfig
from hf_sparse.machine import device_name
from hf_sparse.patching import policy_of, states
from tests import tiny

CPU = torch.device("cpu")
SHAPE = (9, 3, 64)


def here(config: SparseAttentionConfig | None = None, dtype: torch.dtype = torch.float32) -> Machine:
    return Machine.here(CPU, dtype, SHAPE, config or SparseAttentionConfig())


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.delenv(break_even.SWITCH, raising=False)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert break_even.load(here()) is None
    assert not any(tmp_path.iterdir())  # looking leaves nothing behind
    path = break_even.save(here(), 3000, {"decode": 900, "prefill": 3000})
    assert break_even.load(here()) == 3000
    assert path.is_relative_to(tmp_path)
    assert json.loads(path.read_text())["measured"] == {"decode": 900, "prefill": 3000}
    break_even.save(here(), 2000, {})
    assert break_even.load(here()) == 2000
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_holds_for_what_was_measured_alone() -> None:
    break_even.save(here(), 3000, {})
    others = [
        here(dtype=torch.bfloat16),
        here(SparseAttentionConfig(alpha=16.0)),
        here(SparseAttentionConfig(selector="topk")),
        Machine.here(CPU, torch.float32, (32, 8, 128), SparseAttentionConfig()),
    ]
    assert [break_even.load(other) for other in others] == [None] * 4
    # Which rows and layers stay dense is not part of what was timed.
    assert break_even.load(here(SparseAttentionConfig(dense_below=7, dense_layers=(0, 1)))) == 3000


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    break_even.save(here(), 3000, {})
    monkeypatch.setenv(break_even.SWITCH, "0")
    assert break_even.load(here()) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"dense_below": -1}', '{"dense_below": "many"}', "null"])
def test_a_damaged_file_is_named_and_left_out(content: str) -> None:
    path = break_even.save(here(), 3000, {})
    path.write_text(content)
    with pytest.warns(UserWarning, match=path.name):
        assert break_even.load(here()) is None


def test_the_processor_is_named_once_and_the_same() -> None:
    assert device_name(CPU) == device_name(torch.device("cpu")) != ""


def _dense_below(**fields: int | None) -> set[int | None]:
    """What the layers of a patched model take as the length below which rows stay dense."""
    model = tiny.model("llama")
    hf_sparse.patch(model, alpha=2.0, **fields)
    return {state.config.dense_below for state in states(model).values()}


def test_patch_takes_it_where_nothing_else_was_said() -> None:
    model = tiny.model("llama")
    shape = (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim)
    assert _dense_below() == {None}
    assert SparseAttentionConfig().budget().dense_below == DENSE_BELOW
    break_even.save(Machine.here(CPU, torch.float32, shape, SparseAttentionConfig(alpha=2.0)), 77, {})
    assert _dense_below() == {77}
    assert _dense_below(dense_below=5) == {5}
    # What is saved or compared is what was asked for, not what this machine made of it.
    hf_sparse.patch(model, alpha=2.0)
    assert policy_of(model).config.dense_below is None
