"""What `report` says against what can be counted from transformers' own masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

import hf_sparse
from hf_sparse import SparseAttentionConfig
from tests import tiny

CONFIG = SparseAttentionConfig(
    alpha=2.0, exponent=0.6, min_keys=3, sink_keys=1, recent_keys=2, dense_layers=(), dense_below=9
)


def visible_keys(length: int, padding: Tensor, window: int | None) -> Tensor:
    """Visible keys of every real row by the n x n mask: int64 `(real rows,)`."""
    function: dict[str, Any] = {} if window is None else {"mask_function": sliding_window_causal_mask_function(window)}
    mask = sdpa_mask(
        len(padding), length, length, attention_mask=padding.bool(), allow_is_causal_skip=False, **function
    )
    assert mask is not None
    return mask[:, 0].sum(-1)[padding.bool()]


def law(n: int) -> int:
    return n if n < 9 else min(n, max(3, math.ceil(2.0 * n**0.6)))


def windows(name: str) -> list[int | None]:
    return [tiny.WINDOW if name in tiny.SLIDING else None, tiny.WINDOW if name == "mistral" else None]


def rows_of(model: PreTrainedModel, layer: int) -> list[dict[str, Any]]:
    return [row for row in hf_sparse.report(model).rows if row["layer"] == layer]


def assert_counts(model: PreTrainedModel, name: str, padding: Tensor, calls: int) -> None:
    kept_in_all = visible_in_all = 0
    for layer, window in enumerate(windows(name)):
        visible = visible_keys(padding.shape[1], padding, window).tolist()
        kept = [law(n) for n in visible]
        rows = rows_of(model, layer)
        assert [row["head"] for row in rows] == [0, 1, 2, 3]
        for row in rows:
            assert row["calls"] == calls
            assert row["rows"] == len(visible)
            assert row["mean_visible"] == pytest.approx(sum(visible) / len(visible))
            assert row["mean_keys"] == pytest.approx(sum(kept) / len(kept))
            assert row["density"] == pytest.approx(sum(kept) / sum(visible))
            dense = row["dense_rows"]
            short = sum(n < 9 for n in visible)
            assert dense.get("fewer than 9 visible keys", 0) == short
            assert sum(dense.values()) == sum(k == n for k, n in zip(kept, visible, strict=True))
        kept_in_all += sum(kept)
        visible_in_all += sum(visible)
    assert hf_sparse.report(model).density == pytest.approx(kept_in_all / visible_in_all)


@pytest.mark.parametrize("selector", ["grouped", "topk", "window"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_one_pass(name: str, side: str, selector: str) -> None:
    model = hf_sparse.patch(tiny.model(name), CONFIG, selector=selector)
    ids, mask, _ = tiny.padded([33, 50, 7], side, extra=2)
    tiny.logits(model, ids, mask)
    assert_counts(model, name, mask, calls=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_token_by_token_counts_as_one_pass_does(name: str, cache: str) -> None:
    model = hf_sparse.patch(tiny.model(name), CONFIG)
    ids, mask, _ = tiny.padded([20, 26], "left")
    past: Any = StaticCache(model.config, max_cache_len=40) if cache == "static" else None
    with torch.no_grad():
        for i in range(26):
            out = model(
                input_ids=ids[:, i : i + 1],
                attention_mask=mask[:, : i + 1],
                position_ids=tiny.positions(mask)[:, i : i + 1],
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
    assert_counts(model, name, mask, calls=26)


def test_heads_with_laws_of_their_own() -> None:
    laws = ((1.0, 0.5), (2.0, 0.5), (3.0, 0.5), (1e6, 1.0))
    model = hf_sparse.patch(tiny.model("llama"), CONFIG, min_keys=1, dense_below=0, per_head={1: laws}, selector="topk")
    tiny.logits(model, tiny.tokens(2, 50))
    n = torch.arange(1, 51)
    for row, (alpha, exponent) in zip(rows_of(model, 1), laws, strict=True):
        expected = torch.minimum((alpha * n.double() ** exponent).ceil(), n)
        assert row["mean_keys"] == pytest.approx(expected.mean().item())
    assert rows_of(model, 1)[3]["density"] == 1.0
    # A row is dense if every head of it is: ceil(sqrt(n)) is n up to 2, in each of two sequences.
    assert rows_of(model, 1)[0]["dense_rows"] == {"the budget covers all visible keys": 4}
    assert len({row["mean_keys"] for row in rows_of(model, 0)}) == 1


def test_default_layers_left_dense_say_why() -> None:
    model = hf_sparse.patch(tiny.model("gemma3"), CONFIG, dense_layers=None)
    tiny.logits(model, tiny.tokens(1, 30))
    assert [row["dense_rows"] for row in rows_of(model, 0)] == [{"sliding window": 30}] * 4
    assert rows_of(model, 0)[0]["density"] == 1.0
    assert rows_of(model, 1)[0]["density"] < 1.0

    model = hf_sparse.patch(tiny.model("llama"), CONFIG, dense_layers=None)
    tiny.logits(model, tiny.tokens(1, 30))
    assert rows_of(model, 0)[0]["dense_rows"] == {"first layer": 30}

    # All layers slide: none of them is left dense for it, or nothing would be sparse.
    model = hf_sparse.patch(tiny.model("mistral"), CONFIG, dense_layers=None)
    tiny.logits(model, tiny.tokens(1, 30))
    assert rows_of(model, 0)[0]["dense_rows"] == {"first layer": 30}
    assert rows_of(model, 1)[0]["density"] < 1.0

    model = hf_sparse.patch(tiny.model("llama"), CONFIG, dense_layers=(1,))
    tiny.logits(model, tiny.tokens(1, 30))
    assert rows_of(model, 1)[0]["dense_rows"] == {"in dense_layers": 30}
    assert rows_of(model, 0)[0]["density"] < 1.0


def test_a_mask_that_is_no_interval_says_that_it_ran_dense() -> None:
    model = hf_sparse.patch(tiny.model("llama"), CONFIG)
    own = torch.arange(30)
    mask = (own <= own[:, None]) & ((own % 3 == 0) | (own == own[:, None]))
    tiny.logits(model, tiny.tokens(1, 30), mask[None, None])
    row = rows_of(model, 0)[0]
    assert row["density"] == 1.0
    assert row["dense_rows"]["mask is not an interval"] == row["rows"]


def test_layers_that_did_the_same_share_a_line() -> None:
    model = hf_sparse.patch(tiny.model("llama", num_hidden_layers=5), CONFIG, dense_layers=[3])
    tiny.logits(model, tiny.tokens(1, 30))
    lines = str(hf_sparse.report(model)).splitlines()
    assert [line.split("  ")[0].strip() or line.split()[0] for line in lines[1:3]] == ["0-2, 4", "3"]
    assert len(lines) == 4
    assert sorted({row["layer"] for row in hf_sparse.report(model).rows}) == [0, 1, 2, 3, 4]


def test_before_any_call_and_after_reset() -> None:
    model = hf_sparse.patch(tiny.model("llama"), CONFIG)
    report = hf_sparse.report(model)
    assert report.rows == []
    assert math.isnan(report.density)
    assert str(report) == "nothing was attended to yet: there is no density"


def test_a_model_that_is_not_patched_has_nothing_to_report() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        hf_sparse.report(tiny.model("llama"))


def test_the_table_says_what_the_rows_say() -> None:
    model = hf_sparse.patch(tiny.model("gemma3"), CONFIG, dense_layers=None)
    tiny.logits(model, tiny.tokens(2, 60))
    report = hf_sparse.report(model)
    lines = str(report).splitlines()
    assert len(lines) == 1 + tiny.LAYERS + 1
    assert "sliding window" in lines[1]
    assert "120" in lines[1]
    assert f"{report.rows[-1]['density']:.3f}" in lines[2]
    assert f"{report.density:.3f}" in lines[3]


def test_observing_runs_dense_and_shows_every_call() -> None:
    model = tiny.model("gemma2")
    ids, mask, _ = tiny.padded([33, 50], "left")
    before = tiny.logits(model, ids, mask)
    seen = []
    with hf_sparse.observed(model, lambda layer, inputs: seen.append((layer, inputs))):
        inside = tiny.logits(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(inside[real], before[real], atol=1e-4, rtol=1e-4)
    assert not hf_sparse.is_patched(model)
    assert [layer for layer, _ in seen] == [0, 1]
    for layer, inputs in seen:
        assert inputs.query.shape == (2, 4, 50, 16)
        assert inputs.key.shape == (2, 2, 50, 16)
        assert inputs.softcap == 3.0
        assert torch.equal(inputs.visible[real], visible_keys(50, mask, windows("gemma2")[layer]))


def test_what_is_observed_is_not_counted() -> None:
    """Also where the model is patched with what observing patches it with."""
    model, ids = hf_sparse.patch(tiny.model("llama")), tiny.tokens(1, 40)
    tiny.logits(model, ids)
    before = hf_sparse.report(model).rows
    with hf_sparse.observed(model, lambda layer, call: None):
        tiny.logits(model, ids)
    assert hf_sparse.report(model).rows == before
