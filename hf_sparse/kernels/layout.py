"""How kernels want their numbers to lie, and how a package of them keeps keys in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What `hf_sparse.kernels.quantised.QuantisedKeys` needs to know of it.

    Attributes:
        allocate: Called with the keys `(batch, kv_heads, kv_len, head_dim)` and how many of them there is to be room
            for at least. Gives codes, and scales float32 `(batch, kv_heads, room)`, on the device of the keys. Both
            have the keys along dimension 2, alone or in tiles.
        quantise: Called with the keys, the first column, the column after the last one and what `allocate` gave:
            writes these keys there.
    """

    allocate: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    quantise: Callable[[Tensor, int, int, tuple[Tensor, Tensor]], None]


def adjacent(x: Tensor) -> Tensor:
    """`x` with the entries of its last dimension next to each other, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
