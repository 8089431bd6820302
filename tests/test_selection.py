"""What passes between selectors and engines: layouts of groups, masks and counts."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.call import AttentionCall, Selection
from tests import calls

LAYOUTS = [(1, True), (1, False), (3, False), (3, True), (6, False), (6, True)]


@pytest.mark.parametrize(("queries_per_group", "per_head"), LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1)])
def test_every_row_and_head_is_one_member(queries_per_group: int, per_head: bool, heads: int, kv_heads: int) -> None:
    share = heads // kv_heads
    shell = Selection(torch.empty(0), torch.empty(0), queries_per_group, per_head)
    rows = torch.arange(2 * heads * 6 * 5).view(2, heads, 6, 5)
    members = shell.pairs_of(rows, kv_heads)
    groups = 6 // queries_per_group * (share if per_head else 1)
    size = queries_per_group * (1 if per_head else share)
    assert members.shape == (2, kv_heads, groups, size, 5)
    assert torch.equal(shell.queries_of(members, heads), rows)
    # A group holds consecutive rows, of heads that share one key head.
    for kv_head in range(kv_heads):
        for group in range(groups):
            found = {(int(x) // 30 % heads, int(x) // 5 % 6) for x in members[0, kv_head, group, :, 0]}
            in_head, start = divmod(group, 6 // queries_per_group) if per_head else (None, group)
            expected_heads = range(kv_head * share, kv_head * share + share)
            expected = {
                (head, row)
                for head in (expected_heads if in_head is None else [expected_heads[in_head]])
                for row in range(start * queries_per_group, (start + 1) * queries_per_group)
            }
            assert found == expected


@pytest.mark.parametrize(("queries_per_group", "per_head"), LAYOUTS)
def test_mask_and_counts_by_loops(queries_per_group: int, per_head: bool) -> None:
    call = calls.inputs(calls.causal_intervals(6, 9), 9)
    selection = calls.random_selection(call, queries_per_group, per_head)
    mask = selection.mask(4, 9)
    assert mask.shape == (2, 4, 6, 9)
    expected = torch.zeros_like(mask)
    batch, kv_heads, groups, members, width = selection.allowed.shape
    place = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    for b in range(batch):
        for h in range(kv_heads):
            for g in range(groups):
                for m in range(members):
                    row = int(selection.pairs_of(place, kv_heads)[b, h, g, m, 0])
                    for w in range(width):
                        if selection.allowed[b, h, g, m, w]:
                            expected.view(48, 9)[row, selection.positions[b, h, g, w]] = True
    assert torch.equal(mask, expected)
    assert torch.equal(selection.kept(4), expected.sum(-1))
    assert 0 < expected.sum() < calls.visible_mask(call).sum()


def test_padding_that_names_an_allowed_key_does_not_hide_it() -> None:
    positions = torch.tensor([2, 0, 2, 2]).view(1, 1, 1, 4)
    allowed = torch.tensor([True, False, False, False]).view(1, 1, 1, 1, 4)
    assert Selection(positions, allowed, 1, False).mask(1, 3).flatten().tolist() == [False, False, True]
    allowed = allowed.roll(2, dims=-1)
    assert Selection(positions, allowed, 1, False).mask(1, 3).flatten().tolist() == [False, False, True]


def test_rows_of_a_call() -> None:
    call = calls.inputs(calls.causal_intervals(6, 9), 9, softcap=2.0, sinks=True, dropout=0.1)
    part = call.queries(2, 5)
    assert torch.equal(part.query, call.query[:, :, 2:5])
    assert torch.equal(part.visible, call.visible[:, 2:5])
    assert part.key is call.key
    for name in ("scaling", "softcap", "sinks", "dropout"):
        assert getattr(part, name) is getattr(call, name)
    assert part.group_size == 2


def test_visible_counts_keys() -> None:
    intervals = calls.causal_intervals(4, 10, window=5, left=(0, 8), right=(1, 0))
    query = torch.zeros(2, 1, 4, 1)
    call = AttentionCall(query, query, query, intervals, 1.0)
    assert call.visible.tolist() == [[5, 5, 5, 0], [0, 0, 1, 2]]
