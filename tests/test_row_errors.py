"""Row errors against plain loops in float64, and against the identities of the theory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_sparse import SparseAttentionConfig
from hf_sparse.call import AttentionCall
from hf_sparse.diagnostics import MASSES, DenseBlock, concentration, query_errors
from hf_sparse.visibility import interval_to_mask
from tests.calls import causal_intervals, select
from tests.calls import inputs as make_inputs

CALLS = {
    "causal": make_inputs(causal_intervals(12, 12, left=(0,), right=(0,)), 12),
    "chunk of a longer text": make_inputs(causal_intervals(5, 20), 20),
    "group of 4": make_inputs(causal_intervals(9, 9), 9, heads=8, kv_heads=2),
    "no group": make_inputs(causal_intervals(9, 9), 9, heads=3, kv_heads=3),
    "sliding window": make_inputs(causal_intervals(14, 14, window=5), 14),
    "padded": make_inputs(causal_intervals(10, 10, left=(0, 3), right=(2, 0)), 10),
    "softcap": make_inputs(causal_intervals(9, 9), 9, softcap=1.5),
    "sinks": make_inputs(causal_intervals(9, 9), 9, sinks=True),
    "everything": make_inputs(
        causal_intervals(13, 13, window=7, left=(0, 2), right=(1, 0)), 13, softcap=2.0, sinks=True, value_dim=5
    ),
}
ZERO = SparseAttentionConfig(selector="topk", min_keys=1, sink_keys=0, recent_keys=0, dense_below=0)


def random_keep(call: AttentionCall, seed: int = 0) -> Tensor:
    """A random selection of visible keys, the row's own key always among them."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, rows, _ = call.query.shape
    kv_len = call.key.shape[2]
    visible = interval_to_mask(call.intervals, kv_len)
    keep = (torch.rand(batch, heads, rows, kv_len, generator=generator) < 0.4) & visible
    own = torch.arange(kv_len) == call.intervals[..., 1:] - 1
    return keep | (own & visible)


def one_row(call: AttentionCall, batch: int, head: int, row: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Dense weights of a row's visible keys, their values, and the first key; a sink is one more entry, value 0."""
    first, stop = call.intervals[batch, 0, row].tolist()
    kv_head = head // call.group_size
    logits = []
    for j in range(first, stop):
        score = float(call.query[batch, head, row].double() @ call.key[batch, kv_head, j].double()) * call.scaling
        logits.append(score if call.softcap is None else call.softcap * math.tanh(score / call.softcap))
    values = call.value[batch, kv_head, first:stop].double().numpy()
    if call.sinks is not None:
        logits.append(float(call.sinks[head]))
        values = np.concatenate([values, np.zeros_like(values[:1])])
    weights = np.exp(np.array(logits) - max(logits))
    return weights / weights.sum(), values, first


@pytest.mark.parametrize("name", CALLS)
def test_errors_are_those_of_plain_loops(name: str) -> None:
    call = CALLS[name]
    keep = random_keep(call)
    errors = query_errors(DenseBlock.of(call), keep)
    compared = 0
    for batch, head, row in itertools.product(*map(range, call.query.shape[:3])):
        if call.visible[batch, row] == 0:
            continue
        p, values, first = one_row(call, batch, head, row)
        kept = keep[batch, head, row].numpy()[first : first + int(call.visible[batch, row])]
        if call.sinks is not None:
            kept = np.append(kept, True)
        q = p * kept / (p * kept).sum()
        expected = {
            "retained_mass": (p * kept).sum(),
            "l1": np.abs(q - p).sum(),
            "max_entry": np.abs(q - p).max(),
            "l2": math.sqrt(((q - p) ** 2).sum()),
            "output_error": np.linalg.norm(q @ values - p @ values) / np.linalg.norm(p @ values),
        }
        assert errors.keys() == expected.keys()
        for metric, value in expected.items():
            assert errors[metric][batch, head, row].item() == pytest.approx(value, rel=1e-4, abs=2e-6), metric
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("name", CALLS)
def test_shape_of_rows_is_that_of_plain_loops(name: str) -> None:
    call = CALLS[name]
    shape = concentration(DenseBlock.of(call))
    for batch, head, row in itertools.product(*map(range, call.query.shape[:3])):
        if call.visible[batch, row] == 0:
            continue
        p, _, _ = one_row(call, batch, head, row)
        keys, sink = (p, 0.0) if call.sinks is None else (p[:-1], p[-1])
        assert shape["entropy"][batch, head, row].item() == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
        best = np.sort(keys)[::-1]
        for mass in MASSES:
            needed = next(k for k in range(len(best) + 1) if sink + best[:k].sum() >= mass)
            assert shape[f"keys_{mass * 100:.0f}"][batch, head, row].item() == needed


@pytest.mark.parametrize("name", CALLS)
def test_identities(name: str) -> None:
    call = CALLS[name]
    dense = DenseBlock.of(call)
    keep = random_keep(call, seed=1)
    errors = query_errors(dense, keep)
    seen = (call.visible > 0)[:, None].expand_as(errors["l1"])
    mass = errors["retained_mass"]
    lost = 1 - mass
    p, sink = dense.weights, dense.sink(dense.weights)
    inside, outside = p * keep, p * ~keep
    largest_kept = torch.maximum(inside.amax(-1), sink)
    expected = {
        "l1": 2 * lost,
        "max_entry": torch.maximum(lost / mass * largest_kept, outside.amax(-1)),
        "l2": ((lost / mass) ** 2 * (inside.square().sum(-1) + sink**2) + outside.square().sum(-1)).sqrt(),
    }
    for metric, value in expected.items():
        torch.testing.assert_close(errors[metric][seen], value[seen], rtol=1e-4, atol=2e-6)
    # The certificate of the output: the lost mass bounds it by the distance of the two means, which it equals.
    value = call.value.repeat_interleave(call.group_size, dim=1)
    means = [(w @ value) / m.unsqueeze(-1) for w, m in ((inside, mass), (outside, lost))]
    difference = lost * (means[0] - means[1]).norm(dim=-1) / (p @ value).norm(dim=-1)
    some = seen & (lost > 1e-3)
    torch.testing.assert_close(errors["output_error"][some], difference[some], rtol=1e-3, atol=1e-5)


def test_padding_rows_have_no_errors() -> None:
    call = CALLS["padded"]
    dense = DenseBlock.of(call)
    padding = (call.visible == 0)[:, None].expand(-1, call.query.shape[1], -1)
    assert padding.any()
    assert not padding.all()
    for values in (query_errors(dense, random_keep(call)) | concentration(dense)).values():
        assert torch.equal(values.isnan(), padding)


def test_errors_do_not_depend_on_padding() -> None:
    padded = make_inputs(causal_intervals(10, 10, left=(3,), right=(0,)), 10)
    query, key, value = (states[:, :, 3:] for states in (padded.query, padded.key, padded.value))
    alone = AttentionCall(query, key, value, causal_intervals(7, 7, left=(0,), right=(0,)), padded.scaling)
    keep = random_keep(alone)
    wide = torch.zeros(1, padded.query.shape[1], 10, 10, dtype=torch.bool)
    wide[:, :, 3:, 3:] = keep
    for name, values in query_errors(DenseBlock.of(alone), keep).items():
        torch.testing.assert_close(query_errors(DenseBlock.of(padded), wide)[name][:, :, 3:], values)


@pytest.mark.parametrize("name", CALLS)
def test_keeping_everything_is_without_error(name: str) -> None:
    call = CALLS[name]
    everything = interval_to_mask(call.intervals, call.key.shape[2]).expand(-1, call.query.shape[1], -1, -1)
    seen = call.visible[:, None].expand(-1, call.query.shape[1], -1) > 0
    errors = query_errors(DenseBlock.of(call), everything)
    assert (errors.pop("retained_mass")[seen] == 1).all()
    for values in errors.values():
        assert (values[seen] == 0).all()


def test_no_other_keys_of_the_same_number_keep_more_mass() -> None:
    call = make_inputs(causal_intervals(1, 9, left=(0,), right=(0,)), 9)
    dense = DenseBlock.of(call)
    for k in (1, 3, 6):
        budgets = torch.full((1, 1, 1), k)
        best = query_errors(dense, select("topk", call, budgets, ZERO).mask(4, 9))
        for subset in itertools.combinations(range(9), k):
            keep = torch.zeros(1, 4, 1, 9, dtype=torch.bool)
            keep[..., list(subset)] = True
            other = query_errors(dense, keep)
            assert (other["retained_mass"] <= best["retained_mass"] + 1e-6).all()
            assert (other["l1"] >= best["l1"] - 1e-6).all()


@pytest.mark.parametrize("name", ["group of 4", "sliding window", "everything"])
def test_more_budget_never_lowers_the_retained_mass(name: str) -> None:
    call = CALLS[name]
    dense = DenseBlock.of(call)
    heads, kv_len = call.query.shape[1], call.key.shape[2]
    masses = []
    for k in range(1, kv_len + 1):
        budgets = call.visible.clamp(max=k)[:, None]
        keep = select("topk", call, budgets, ZERO).mask(heads, kv_len)
        masses.append(query_errors(dense, keep)["retained_mass"].nan_to_num(1.0))
    for less, more in itertools.pairwise(masses):
        assert (more >= less - 1e-6).all()
    assert (masses[-1] == 1).all()


@given(st.integers(1, 200))
def test_a_flat_row_needs_its_share_of_keys(n: int) -> None:
    call = make_inputs(torch.tensor([[[[0, n]]]], dtype=torch.int32), n)
    flat = AttentionCall(torch.zeros_like(call.query), call.key, call.value, call.intervals, call.scaling)
    shape = concentration(DenseBlock.of(flat))
    torch.testing.assert_close(shape["entropy"], torch.full((1, 4, 1), math.log(n)), rtol=1e-4, atol=1e-5)
    for mass in MASSES:
        needed = shape[f"keys_{mass * 100:.0f}"]
        # k / n may equal the mass, and then rounding decides.
        assert ((needed >= mass * n - 1e-3) & (needed <= mass * n + 1.001)).all()


def test_the_keys_needed_are_enough_and_one_less_is_not() -> None:
    call = CALLS["causal"]
    dense = DenseBlock.of(call)
    for mass in MASSES:
        needed = concentration(dense)[f"keys_{mass * 100:.0f}"].long()
        for less, enough in ((0, True), (1, False)):
            budgets = (needed - less).clamp(min=1)
            keep = select("topk", call, budgets, ZERO).mask(4, 12)
            kept = query_errors(dense, keep)["retained_mass"]
            some = needed > 1
            assert ((kept[some] >= mass - 1e-6) == enough).all()


def test_low_precision_inputs_give_float32_errors() -> None:
    call = make_inputs(causal_intervals(6, 6), 6, dtype=torch.bfloat16)
    errors = query_errors(DenseBlock.of(call), random_keep(call))
    assert {values.dtype for values in errors.values()} == {torch.float32}
