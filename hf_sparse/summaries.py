"""Running statistics of blocks of keys, for a coarse look at many keys at once.

`KeySummaries` belongs to the keys of one layer and grows with them: a cache layer keeps one from token to token
(`hf_sparse.cache`), and a call without such a cache makes its own, shared by its blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_sparse.quantised import QuantisedKeys

BLOCK = 16
"""Neighbouring keys that are summarised together, and neighbouring blocks that make a super-block."""

# Blocks that are summarised at a time: what is alive besides the keys is this many of them.
_CHUNK_BLOCKS = 512

# The attribute of a key tensor that names its summaries.
_ATTRIBUTE = "_hf_sparse_summaries"


class KeySummaries:
    """Mean and variance per component of every whole block of `BLOCK` keys, and of every super-block of `BLOCK` blocks.

    The blocks of a sequence begin at its own text start, so that padding in front does not move them. What was
    summarised stays, and more is added as keys arrive.
    """

    def __init__(self) -> None:
        self.quantised = QuantisedKeys()
        self._blocks: tuple[Tensor, Tensor] | None = None
        self._supers: tuple[Tensor, Tensor] | None = None
        # For each sequence: the column where its text begins, and how much of it is summarised.
        self._origins: list[int] = []
        self._whole_blocks: list[int] = []
        self._whole_supers: list[int] = []

    @torch.no_grad()
    def blocks(self, key: Tensor, origins: Sequence[int], stop: int, count: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of blocks 0 to `count - 1` of each sequence.

        Args:
            key: `(batch, kv_heads, kv_len, head_dim)`: the keys that were summarised so far, and more.
            origins: Column where each sequence's first block begins.
            stop: Keys from this column on are not to be summarised yet.
            count: Blocks to return.

        Returns:
            Two tensors `(batch, kv_heads, count, head_dim)`, in float32 or better; finite but meaningless for blocks
            that do not lie wholly before `stop`.
        """
        self._extend_blocks(key, origins, stop, count)
        assert self._blocks is not None
        return self._blocks[0][:, :, :count], self._blocks[1][:, :, :count]

    @torch.no_grad()
    def supers(self, key: Tensor, origins: Sequence[int], stop: int, count: int) -> tuple[Tensor, Tensor]:
        """As `blocks`, for super-blocks of `BLOCK` blocks."""
        self._extend_blocks(key, origins, stop, count * BLOCK)
        assert self._blocks is not None
        wanted = [whole // BLOCK for whole in self._whole_blocks]
        self._supers = _with_room(self._supers, key, max(count, *wanted))
        for batch, _, start, end in _runs([0] * len(wanted), self._whole_supers, wanted):
            mean, variance = (_in_blocks(x[batch, :, start * BLOCK : end * BLOCK]) for x in self._blocks)
            means = mean.mean(3)
            # The variance of a union of equal parts: that within the parts and that of their means.
            spread = (mean.square().mean(3) - means.square()).clamp_(min=0)
            self._supers[0][batch, :, start:end] = means
            self._supers[1][batch, :, start:end] = variance.mean(3) + spread
        self._whole_supers = wanted
        return self._supers[0][:, :, :count], self._supers[1][:, :, :count]

    def crop(self, length: int) -> None:
        """Forget what was summarised of keys from column `length` on."""
        self.quantised.crop(length)
        whole = [max(0, length - origin) // BLOCK for origin in self._origins]
        self._whole_blocks = [min(pair) for pair in zip(self._whole_blocks, whole, strict=True)]
        self._whole_supers = [min(have, new // BLOCK) for have, new in zip(self._whole_supers, whole, strict=True)]

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Select, reorder or repeat sequences: `change` does so along dimension 0 of any tensor."""
        self.quantised.rearrange(change)
        if not self._origins:
            return
        places: list[int] = change(torch.arange(len(self._origins))).tolist()
        for name in ("_origins", "_whole_blocks", "_whole_supers"):
            setattr(self, name, [getattr(self, name)[place] for place in places])
        for name in ("_blocks", "_supers"):
            if (pair := getattr(self, name)) is not None:
                setattr(self, name, (change(pair[0]), change(pair[1])))

    def _extend_blocks(self, key: Tensor, origins: Sequence[int], stop: int, count: int) -> None:
        if len(self._origins) != len(origins):
            self._origins = list(origins)
            self._blocks = self._supers = None
            self._whole_blocks = [0] * len(origins)
            self._whole_supers = [0] * len(origins)
        wanted = []
        for i, origin in enumerate(origins):
            whole = max(0, stop - origin) // BLOCK
            # Where nothing is to be summarised, the origin may be that of a row that sees nothing.
            if whole and origin != self._origins[i]:
                self._origins[i], self._whole_blocks[i], self._whole_supers[i] = origin, 0, 0
            wanted.append(max(whole, self._whole_blocks[i]))
        self._blocks = _with_room(self._blocks, key, max(count, *wanted))
        if wanted == self._whole_blocks:
            return
        for batch, origin, start, end in _runs(self._origins, self._whole_blocks, wanted):
            for low in range(start, end, _CHUNK_BLOCKS):
                high = min(end, low + _CHUNK_BLOCKS)
                keys = key[batch, :, origin + low * BLOCK : origin + high * BLOCK].to(self._blocks[0].dtype)
                keys = _in_blocks(keys)
                mean = keys.mean(3)
                self._blocks[0][batch, :, low:high] = mean
                self._blocks[1][batch, :, low:high] = (keys.square().mean(3) - mean.square()).clamp_(min=0)
        self._whole_blocks = wanted


def summaries_of(key: Tensor) -> KeySummaries:
    """The summaries that a cache keeps of these very keys, or new ones."""
    found = getattr(key, _ATTRIBUTE, None)
    return found if isinstance(found, KeySummaries) else KeySummaries()


def attach(key: Tensor, summaries: KeySummaries) -> None:
    """Say that `summaries` are those of `key`. Views and copies of it do not inherit them."""
    setattr(key, _ATTRIBUTE, summaries)


def _in_blocks(states: Tensor) -> Tensor:
    """`(batch, kv_heads, count * BLOCK, dim)` -> `(batch, kv_heads, count, BLOCK, dim)`."""
    return states.view(*states.shape[:2], -1, BLOCK, states.shape[3])


def _with_room(pair: tuple[Tensor, Tensor] | None, key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`pair` with place for `count` entries, zeros where nothing was written: a masked NaN would still spread."""
    room = 0 if pair is None else pair[0].shape[2]
    # What was made in inference mode cannot be written to outside of it.
    if pair is not None and room >= count and (not pair[0].is_inference() or torch.is_inference_mode_enabled()):
        return pair
    if room < count:
        room = max(count, room + room // 4, BLOCK)
    dtype = torch.promote_types(key.dtype, torch.float32)
    grown = tuple(key.new_zeros((*key.shape[:2], room, key.shape[3]), dtype=dtype) for _ in range(2))
    if pair is not None:
        for new, old in zip(grown, pair, strict=True):
            new[:, :, : old.shape[2]] = old
    return grown[0], grown[1]


def _runs(origins: list[int], start: list[int], stop: list[int]) -> list[tuple[slice, int, int, int]]:
    """Work for each sequence, as `(sequences, origin, start, stop)`; one piece for all of them if they are alike."""
    if len(set(zip(origins, start, stop, strict=True))) == 1:
        whole = [(slice(None), origins[0], start[0], stop[0])]
    else:
        whole = [(slice(i, i + 1), *work) for i, work in enumerate(zip(origins, start, stop, strict=True))]
    return [run for run in whole if run[2] < run[3]]
