"""Visible intervals against the n x n masks of transformers' own `sdpa_mask`."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils

from hf_sparse.visibility import Visible, interval_mask, interval_to_mask, is_packed, visible_in
from hf_sparse.visibility import masks as mask_function

MaskFunction = Callable[..., Any]


@pytest.fixture(params=["whole", "bisected"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Small masks are evaluated whole, large ones bisected query by query: every test goes both ways."""
    monkeypatch.setattr(mask_function, "_SMALL_MASK", -1 if request.param == "bisected" else 1 << 40)
    return request.param


PATHS = (-1, 1 << 40)


def on_both_paths(arguments: dict[str, Any]) -> Tensor:
    """`interval_mask`, which must say the same on both paths."""
    results = []
    before = mask_function._SMALL_MASK
    try:
        for mask_function._SMALL_MASK in PATHS:
            results.append(interval_mask(**arguments))
    finally:
        mask_function._SMALL_MASK = before
    assert results[0].dtype == results[1].dtype
    assert torch.equal(*(as_mask(result, arguments) for result in results))
    return results[0]


def as_mask(out: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What comes out of `interval_mask`, as bool `(batch, 1, q_len, kv_len)`."""
    return shown_mask(Visible.unpacked(out, arguments["q_length"]), arguments["kv_length"]) if is_packed(out) else out


def shown_mask(visible: Visible, kv_len: int) -> Tensor:
    """What queries see, by loops."""
    batch, _, q_len, _ = visible.intervals.shape
    out = torch.zeros(batch, 1, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        positions = range(kv_len) if visible.shown is None else visible.shown[b].tolist()
        for query, (first, stop) in enumerate(visible.intervals[b, 0].tolist()):
            out[b, 0, query, list(positions[first:stop])] = True
    return out


def brute_force(arguments: dict[str, Any]) -> Tensor:
    """The mask as transformers makes it, with the queries of padding tokens emptied: bool `(batch, 1, q_len, keys)`."""
    mask = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert mask is not None
    padding = arguments["attention_mask"]
    if padding is not None:
        own = torch.arange(arguments["q_length"]) + int(arguments["q_offset"])
        mask = mask & padding[:, own][:, None, :, None]
    return mask


def is_made_of_intervals(mask: Tensor) -> bool:
    """By counting, query by query, how often the mask switches from hidden to visible."""
    edges = torch.nn.functional.pad(mask.int(), (1, 0)).diff(dim=-1) == 1
    return bool((edges.sum(-1) <= 1).all())


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A call of a mask function as `generate` or a forward pass makes it."""
    batch = draw(st.integers(1, 3))
    q_len = draw(st.integers(1, 24))
    q_offset = draw(st.integers(0, 24))
    kv_offset = draw(st.integers(0, q_offset))
    spare = draw(st.sampled_from([0, 0, 1, 17]))  # unwritten slots of a static cache
    kv_length = q_offset + q_len - kv_offset + spare
    length = q_offset + q_len
    kind = draw(st.sampled_from(["causal", "sliding", "chunked"]))
    function: MaskFunction = masking_utils.causal_mask_function
    if kind == "sliding":
        function = masking_utils.sliding_window_causal_mask_function(draw(st.integers(1, 30)))
    attention_mask = None
    match draw(st.sampled_from(["none", "left", "right", "both", "holes"])):
        case "left" | "right" | "both" as sides:
            attention_mask = torch.ones(batch, length, dtype=torch.bool)
            for sequence in attention_mask:
                real = draw(st.integers(0, length))
                left = {"left": length - real, "right": 0, "both": draw(st.integers(0, length - real))}[sides]
                sequence[:] = False
                sequence[left : left + real] = True
        case "holes":
            bits = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
            attention_mask = torch.tensor(bits).view(batch, length)
    if kind == "chunked":
        left_padding = torch.zeros(batch, dtype=torch.long)
        if attention_mask is not None:
            left_padding = (attention_mask.cumsum(-1) == 0).sum(-1)
        function = masking_utils.chunked_causal_mask_function(draw(st.integers(1, 30)), left_padding)
    return {
        "batch_size": batch,
        "q_length": q_len,
        "kv_length": kv_length,
        "q_offset": draw(st.sampled_from([q_offset, torch.tensor(q_offset)])),
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": attention_mask,
    }


@settings(max_examples=400)
@given(calls())
def test_intervals_are_the_mask(arguments: dict[str, Any]) -> None:
    out = on_both_paths(arguments)
    expected = brute_force(arguments)
    assert is_packed(out)
    assert torch.equal(as_mask(out, arguments), expected)
    visible = Visible.unpacked(out, arguments["q_length"])
    assert visible.intervals.shape == (arguments["batch_size"], 1, arguments["q_length"], 2)
    empty = visible.intervals[..., 0] >= visible.intervals[..., 1]
    assert (visible.intervals[empty] == 0).all()
    # Keys are left out only where intervals over all keys could not have said it.
    assert visible.shown is None or not is_made_of_intervals(expected)


@pytest.mark.parametrize("attention_mask", [None, torch.ones(2, 9, dtype=torch.bool)])
def test_rows_by_hand(path: str, attention_mask: Tensor | None) -> None:
    function = masking_utils.sliding_window_causal_mask_function(4)
    out = interval_mask(2, 3, 9, q_offset=6, mask_function=function, attention_mask=attention_mask)
    assert out.dtype == torch.int32
    assert out.tolist() == [[[[3, 7], [4, 8], [5, 9]]]] * 2


def test_padding_by_hand(path: str) -> None:
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    out = interval_mask(2, 5, 8, attention_mask=padding)
    assert out[0, 0].tolist() == [[0, 0], [0, 0], [2, 3], [2, 4], [2, 5]]
    assert out[1, 0].tolist() == [[0, 1], [0, 2], [0, 3], [0, 0], [0, 0]]


def test_keys_that_padding_hides_inside_a_text_are_left_out(path: str) -> None:
    padding = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    visible = Visible.unpacked(interval_mask(2, 1, 5, q_offset=4, attention_mask=padding), 1)
    assert visible.intervals.tolist() == [[[[1, 4]]], [[[0, 4]]]]
    assert visible.shown is not None
    assert visible.shown[0, 1:].tolist() == [0, 1, 4]
    assert visible.shown[1].tolist() == [1, 2, 3, 4]
    # A window counts tokens as they stand, hidden ones too.
    function = masking_utils.sliding_window_causal_mask_function(3)
    out = interval_mask(1, 5, 5, mask_function=function, attention_mask=padding[:1])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [0] * 5, [0, 0, 0, 0, 1]]
    assert as_mask(out, {"q_length": 5, "kv_length": 5}).int().tolist() == [[expected]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_hidden_keys_cost_no_square() -> None:
    """Neither from a padding mask, nor, beside the mask itself, from a whole mask with the same holes."""
    padding = torch.ones(1, 40_000, dtype=torch.bool)
    padding[0, [100, 20_000]] = False
    visible = Visible.unpacked(interval_mask(1, 40_000, 40_000, attention_mask=padding), 40_000)
    assert visible.shown is not None
    assert visible.shown.shape == (1, 39_998)
    whole = torch.ones(8_000, 8_000, dtype=torch.bool).tril() & padding[0, :8_000]
    before = peak_bytes()
    assert visible_in(whole[None, None]) is not None
    # A mask of so many whole numbers would take 512 MB.
    assert peak_bytes() - before < 256 << 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("use_vmap", [False, True])
def test_a_row_that_does_not_see_itself_is_no_padding(path: str, use_vmap: bool) -> None:
    """Strictly causal masks are intervals too: only the padding mask says which queries are padding."""
    out = interval_mask(1, 4, 4, mask_function=lambda b, h, q, k: k < q, use_vmap=use_vmap)
    expected = torch.ones(4, 4, dtype=torch.bool).tril(-1)[None, None]
    assert torch.equal(as_mask(out, {"q_length": 4, "kv_length": 4}), expected)


def test_a_prefix_that_sees_itself_both_ways(path: str) -> None:
    """A prefix-LM mask is not causal, but every query still sees one range of keys."""

    def prefix(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) | (k < 3)

    out = interval_mask(1, 5, 5, mask_function=prefix)
    expected = masking_utils.sdpa_mask(1, 5, 5, mask_function=prefix, allow_is_causal_skip=False)
    assert torch.equal(as_mask(out, {"q_length": 5, "kv_length": 5}), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: (k <= q) & ((k % 2 == 0) | (k == q)),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (k < 2) | (k > q - 2)),
        masking_utils.or_masks(masking_utils.sliding_window_causal_mask_function(2), lambda b, h, q, k: k == 0),
    ],
)
@pytest.mark.parametrize("use_vmap", [False, True])
def test_holes_come_back_as_the_mask(path: str, function: MaskFunction, use_vmap: bool) -> None:
    arguments = {"batch_size": 2, "q_length": 7, "kv_length": 9, "q_offset": 2, "mask_function": function}
    out = interval_mask(**arguments, use_vmap=use_vmap)
    expected = masking_utils.sdpa_mask(**arguments, use_vmap=use_vmap, allow_is_causal_skip=False)
    assert out.dtype == torch.bool
    assert torch.equal(out, expected)


def test_packed_sequences_see_their_own_sequence(path: str) -> None:
    sequence = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    function = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(sequence)
    )
    out = interval_mask(2, 6, 6, mask_function=function)
    assert out[0, 0].tolist() == [[0, 1], [0, 2], [0, 3], [3, 4], [3, 5], [5, 6]]
    assert out[1, 0].tolist() == [[0, 1], [1, 2], [1, 3], [1, 4], [1, 5], [1, 6]]


def test_long_causal_rows_need_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """The n x n mask is never made for the masks of transformers: that it is not asked for is the proof."""

    def forbidden(**_: Any) -> None:
        raise AssertionError("an n x n mask was made")

    monkeypatch.setattr(mask_function, "sdpa_mask", forbidden)
    length = 300_000
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[1, :1000] = False
    function = masking_utils.sliding_window_causal_mask_function(4096)
    out = interval_mask(2, length, length, mask_function=function, attention_mask=padding)
    query = torch.arange(length)
    assert torch.equal(out[0, 0, :, 0].long(), (query - 4095).clamp(min=0))
    assert torch.equal(out[0, 0, :, 1].long(), query + 1)
    assert torch.equal(out[1, 0, 1000:, 0].long(), (query - 4095).clamp(min=1000)[1000:])
    assert (out[1, 0, :1000] == 0).all()


def test_the_path_by_intervals_is_taken(path: str) -> None:
    """Were the functions of transformers renamed, masks would stay right and cost n x n: notice it here."""
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    sliding = masking_utils.sliding_window_causal_mask_function(4)
    for function in (masking_utils.causal_mask_function, sliding, chunked):
        assert mask_function._is_interval_function(function)
    assert not mask_function._is_interval_function(lambda b, h, q, k: k <= q)
    both = masking_utils.and_masks(sliding, lambda b, h, q, k: k % 2 == 0)
    assert not mask_function._is_interval_function(both)
    assert not mask_function._is_interval_function(masking_utils.or_masks(sliding, chunked))


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    batch, q_len, keys = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 8))
    if draw(st.booleans()):
        bits = draw(st.lists(st.booleans(), min_size=batch * q_len * keys, max_size=batch * q_len * keys))
        return torch.tensor(bits).view(batch, 1, q_len, keys)
    starts = draw(st.lists(st.integers(0, keys), min_size=batch * q_len, max_size=batch * q_len))
    stops = [draw(st.integers(start, keys)) for start in starts]
    return interval_to_mask(torch.tensor([starts, stops]).T.view(batch, 1, q_len, 2), keys)


@settings(max_examples=300)
@given(masks(), st.sampled_from(["bool", "finfo", "-inf"]), st.integers(1, 2))
def test_masks_are_recognised(mask: Tensor, form: str, heads: int) -> None:
    given_mask = mask.expand(-1, heads, -1, -1)
    if form != "bool":
        lowest = torch.finfo(torch.float32).min if form == "finfo" else -torch.inf
        given_mask = torch.zeros(given_mask.shape).masked_fill(~given_mask, lowest)
    found = visible_in(given_mask)
    if found is not None:
        assert torch.equal(shown_mask(found, mask.shape[-1]), mask)
    # Without the keys that no query of a sequence sees, it is made of intervals or it is not.
    shown = [sequence[:, :, sequence.any((0, 1))] for sequence in mask]
    assert (found is not None) == all(is_made_of_intervals(sequence) for sequence in shown)
    if is_made_of_intervals(mask):
        assert found is not None
        assert found.shown is None


def test_what_is_no_mask_of_intervals() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    two_heads = torch.cat([causal, causal | True], dim=1)
    bias = torch.where(causal, -0.5, -torch.inf)
    assert visible_in(causal) is not None
    assert visible_in(two_heads) is None
    assert visible_in(bias) is None
    assert visible_in(causal.long()) is None


def test_intervals_are_told_from_masks() -> None:
    assert is_packed(interval_mask(1, 2, 2))
    assert not is_packed(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert not is_packed(torch.zeros(1, 1, 2, 2))
    assert not is_packed(torch.zeros(1, 2, dtype=torch.int32))


def test_a_new_token_comes_last_of_all_that_is_shown() -> None:
    """So that a copy of the keys without hidden ones grows by that token alone."""
    real = torch.ones(2, 46, dtype=torch.bool)
    real[0, [5, 6, 20]] = real[1, 9] = False
    before = None
    for length in range(40, 46):
        mask = interval_mask(2, 1, length, q_offset=length - 1, attention_mask=real[:, :length])
        visible = Visible.unpacked(mask, 1)
        assert visible.shown is not None
        assert visible.shown[:, -1].tolist() == [length - 1] * 2
        assert visible.intervals[:, 0, 0, 1].tolist() == [visible.shown.shape[1]] * 2
        assert before is None or torch.equal(visible.shown[:, :-1], before)
        before = visible.shown
