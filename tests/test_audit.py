"""The audit of rows at run time, against the errors of whole calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.attention import LayerState, attend
from hf_sparse.call import AttentionCall
from hf_sparse.diagnostics import DenseBlock, LayerAudit, query_errors
from tests import tiny
from tests.sparse import SPARSE, every_selector, generated, sparse_model

LENGTH = 200
Calls = list[tuple[int, AttentionCall]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The layers and inputs of calls that are audited."""
    seen: Calls = []
    real = LayerAudit.__call__

    def spy(self: LayerAudit, layer: int, inputs: AttentionCall) -> None:
        seen.append((layer, inputs))
        real(self, layer, inputs)

    monkeypatch.setattr(LayerAudit, "__call__", spy)
    return seen


def true_errors(inputs: AttentionCall, layer: int, **fields: Any) -> dict[str, Tensor]:
    """Errors of all rows of a call: `(batch, heads, rows)` by name."""
    config = hf_sparse.SparseAttentionConfig(**{**vars(SPARSE), **fields})
    _, weights = attend(LayerState(layer, config), inputs, want_weights=True)
    assert weights is not None
    return query_errors(DenseBlock.of(inputs), weights > 0)


@every_selector
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_an_audit_of_all_rows_is_the_true_error(name: str, selector: str, calls: Calls) -> None:
    model = sparse_model(name, selector)
    ids, mask, _ = tiny.padded([LENGTH, 130], "left")
    plain = tiny.logits(model, ids, mask)
    hf_sparse.audit(model, rows=LENGTH)
    assert torch.equal(tiny.logits(model, ids, mask), plain)
    truth = {layer: true_errors(inputs, layer, selector=selector) for layer, inputs in calls}
    report = hf_sparse.report(model)
    assert [(row["layer"], row["head"]) for row in report.audit] == [(layer, h) for layer in (0, 1) for h in range(4)]
    for row in report.audit:
        mass, error = (truth[row["layer"]][metric][:, row["head"]] for metric in ("retained_mass", "output_error"))
        mass, error = mass[~mass.isnan()], error[~error.isnan()]
        assert row["rows"] == LENGTH + 130
        assert row["retained_mass"] == pytest.approx(mass.mean().item(), abs=1e-6)
        assert row["least_retained_mass"] == pytest.approx(mass.min().item(), abs=1e-6)
        assert row["output_error"] == pytest.approx(error.mean().item(), rel=1e-4, abs=1e-6)
        assert row["largest_output_error"] == pytest.approx(error.max().item(), rel=1e-4, abs=1e-6)
    assert min(row["largest_output_error"] for row in report.audit) > 0.01


@every_selector
def test_a_sample_is_made_of_rows_of_the_call(selector: str, calls: Calls) -> None:
    model = sparse_model("llama", selector, dense_layers=(0,))
    hf_sparse.audit(model, rows=8, seed=3)
    tiny.logits(model, tiny.tokens(1, LENGTH))
    [(layer, inputs)] = calls
    assert layer == 1
    mass = true_errors(inputs, 1, selector=selector)["retained_mass"][0]
    places = mass.unfold(-1, 8, 1)
    for row in hf_sparse.report(model).audit:
        assert (row["layer"], row["rows"]) == (1, 8)
        near = (places[row["head"]].mean(-1) - row["retained_mass"]).abs()
        assert near.min() < 1e-6
        assert places[row["head"], near.argmin()].min().item() == pytest.approx(row["least_retained_mass"], abs=1e-6)


@every_selector
def test_generation_is_audited_and_goes_on_as_before(selector: str) -> None:
    model = sparse_model("llama", selector)
    plain = generated(model)
    assert hf_sparse.report(model).audit == []
    hf_sparse.audit(model, rows=4)
    assert generated(model) == plain
    report = hf_sparse.report(model)
    # 4 rows of the prompts, then one of each of 11 further calls, twice.
    assert {row["rows"] for row in report.audit} <= set(range(2 * 11, 2 * 15 + 1))
    assert "queries audited" in str(report)
    hf_sparse.audit(model, rows=0)
    assert hf_sparse.report(model).audit == []
    assert "queries audited" not in str(hf_sparse.report(model))


def test_an_audit_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        hf_sparse.audit(tiny.model("llama"))
    with pytest.raises(ValueError, match="rows must be"):
        hf_sparse.audit(sparse_model("llama", "topk"), rows=-1)
