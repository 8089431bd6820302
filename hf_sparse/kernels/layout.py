"""Memory layouts that kernels need: of their inputs, and of keys in few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How one package of kernels stores keys in few bits, for `hf_sparse.kernels.quantised.QuantisedKeys`.

    Attributes:
        allocate: `allocate(key, room)` returns storage for `room` keys or more like `key` `(batch, kv_heads, kv_len,
            head_dim)`: codes, and scales float32 `(batch, kv_heads, room)`, on the device of the keys. Both have the
            keys along dimension 2, alone or in tiles.
        quantise: `quantise(key, start, stop, storage, center)` writes there, less `center`, float32 `(batch, kv_heads,
            head_dim)`, the keys at positions `start` to `stop` - 1.
    """

    allocate: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    quantise: Callable[[Tensor, int, int, tuple[Tensor, Tensor], Tensor], None]


def adjacent(x: Tensor) -> Tensor:
    """`x` with the entries of its last dimension next to each other, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
