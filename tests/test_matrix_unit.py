"""Heads and dtypes for which a CPU's matrix unit ranks and attends, where it has one; by one thread and by several.

`scripts/sanitize.py` runs these under sanitizers for every target of this CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests import calls
from tests.test_grouped import SHAPES, by_pytorch, compiled, needs_kernels, overlap

pytestmark = needs_kernels
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize(("q_len", "kv_len", "heads", "kv_heads"), SHAPES)
def test_keys_and_outputs_are_those_of_pytorch(
    q_len: int, kv_len: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, number: int
) -> None:
    """Keys have much in common, which is subtracted before they are rounded; values are of another width."""
    intervals = calls.causal_intervals(q_len, kv_len, left=(0, 5), right=(0, q_len // 3))
    call = calls.inputs(intervals, kv_len, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=40, dtype=dtype)
    call = replace(call, key=call.key + 2 * torch.ones(dim, dtype=dtype))
    budgets = call.visible[:, None].clamp(max=min(90, kv_len // 2))
    assert kv_len > budgets.max()
    with threads(number):
        selection = compiled(call, budgets)
        out = calls.run_engine("cpu", call, selection)
    mask = selection.mask(heads, kv_len)
    assert torch.equal(mask.sum(-1), budgets.expand(-1, heads, -1))
    assert overlap(mask, by_pytorch(call, budgets).mask(heads, kv_len)) > 0.98
    assert_close(out, calls.run_engine("reference", call, selection), atol=DTYPES[dtype], rtol=DTYPES[dtype])
