"""Caches ask Linux for large pages."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_sparse.cache import SparseLayer

SMAPS = Path("/proc/self/smaps")

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not SMAPS.exists(), reason="not Linux, or a kernel without large pages"
)


def is_advised(states: Tensor) -> bool:
    """Whether the kernel was asked for large pages in the middle of a tensor."""
    middle = states.data_ptr() + states.untyped_storage().nbytes() // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise LookupError("no mapping holds the tensor")


@torch.no_grad()
def test_storage_of_many_tokens_is_on_large_pages_and_of_few_is_not() -> None:
    layer = SparseLayer()
    layer.update(torch.randn(1, 2, 8, 64), torch.randn(1, 2, 8, 64))
    assert layer.keys is not None
    assert not is_advised(layer.keys)
    key, value = torch.randn(1, 2, 60_000, 64), torch.randn(1, 2, 60_000, 64)
    layer.update(key, value)
    assert layer.values is not None
    assert is_advised(layer.keys)
    assert is_advised(layer.values)
    assert torch.equal(layer.keys[:, :, 8:], key)
    assert torch.equal(layer.values[:, :, 8:], value)
    one = torch.randn(1, 2, 1, 64)
    layer.update(one, one)
    assert is_advised(layer.keys)
    assert torch.equal(layer.keys[:, :, -1:], one)
