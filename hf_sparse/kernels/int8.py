"""Keys and values stored in 8 bits, which act like the tensor of the model's dtype that they stand for.

Every 32 components of a key or value are rounded to whole numbers up to 127 and share a scale, by the largest of them,
as in llama.cpp's Q8_0 (`model_cards/memory/README.md` compares other scales). No vector depends on another one, so that
appending, padding and batches leave it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PART = 32  # components that share a scale, of vectors that it divides; all components of others

# A code is never larger than 127, although the scale, which has 8 bits, may be rounded down.
_MOST = 126.5

# What a vector's largest component counts as, where it is smaller still: zeros are divided by it.
_LEAST = 1e-30

_aten = torch.ops.aten


class Int8States(Tensor):
    """A tensor `(..., dim)` of a floating-point dtype that is stored in 8 bits.

    Taking parts along all dimensions but the last, copies and moves give another one of its kind. Kernels read its
    attributes. For any other operation, PyTorch gets the numbers that it stands for, in a new tensor; what would write
    to them is refused, for it would be lost.

    Attributes:
        codes: int8 `(..., dim)`.
        scales: bfloat16 `(..., parts)`, what a code of 1 stands for in each part of a vector.
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Int8States:
        """The product of codes and scales in `dtype`; nothing is copied."""
        out: Int8States = Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )
        out.codes, out.scales = codes, scales
        return out

    @classmethod
    def rounded(cls, states: Tensor) -> Int8States:
        """`states` `(..., dim)` in 8 bits. A vector with a component that is not finite has no finite one."""
        if isinstance(states, Int8States):
            return states
        exact = states.float().view(*states.shape[:-1], _parts(states.shape[-1]), -1)
        scales = torch.linalg.vector_norm(exact, torch.inf, dim=-1, keepdim=True).clamp_min_(_LEAST).div_(_MOST)
        scales = scales.bfloat16()
        return cls((exact / scales).round_().to(torch.int8).flatten(-2), scales.squeeze(-1), states.dtype)

    @classmethod
    def empty(cls, shape: Sequence[int], states: Tensor) -> Int8States:
        """Storage of that shape, of the dtype and on the device of `states`."""
        codes, scales = (
            torch.empty(size, dtype=dtype, device=states.device)
            for size, dtype in ((shape, torch.int8), ((*shape[:-1], _parts(shape[-1])), torch.bfloat16))
        )
        return cls(codes, scales, states.dtype)

    def part(self, start: int, stop: int) -> Int8States:
        """The keys or values `(batch, kv_heads, length, dim)` at positions `start` to `stop` - 1, where they lie."""
        return self.map(lambda x: x.narrow(2, start, stop - start))

    def write(self, start: int, states: Tensor) -> None:
        """Round `states` `(batch, kv_heads, new, dim)` into the places from `start` on."""
        new = Int8States.rounded(states)
        for to, part in ((self.codes, new.codes), (self.scales, new.scales)):
            to.narrow(2, start, states.shape[2]).copy_(part)

    def dequantize(self) -> Tensor:
        """The numbers that it stands for: a plain tensor of its shape and dtype."""
        parts = self.codes.view(*self.scales.shape, -1)
        return (parts * self.scales[..., None].float()).flatten(-2).to(self.dtype)

    def map(self, change: Callable[[Tensor], Tensor]) -> Int8States:
        """The same with `change` made to codes and to scales, which leaves the last dimension of the codes alone."""
        return Int8States(change(self.codes), change(self.scales), self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8States(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Int8States, (self.codes, self.scales, self.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first, *rest = args if args else (None,)
        options = dict(kwargs or {})
        if isinstance(first, Int8States):
            if func is _aten._to_copy.default and options.get("dtype") in (None, first.dtype):
                return first.map(lambda x: func(x, **{**options, "dtype": x.dtype}))
            if func in _PARTS and _keeps_vectors(func, rest, first.dim()):
                return first.map(lambda x: func(x, *rest, **options))
            if func in _NEW:  # needs no more than the dtype and the device
                return func(first.scales.new_empty(0, dtype=first.dtype), *rest, **options)
        if func._schema.is_mutable:
            raise RuntimeError(f"keys and values in 8 bits cannot be written to, which {func} does: assign new ones")
        return func(*tree_map(_plain, tuple(args)), **tree_map(_plain, options))


_NEW = {_aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default}
_WHOLE = {_aten.detach.default, _aten.alias.default, _aten.clone.default}
_PARTS = _WHOLE | {_aten.slice.Tensor, _aten.index.Tensor}


def _parts(dim: int) -> int:
    return 1 if dim % _PART else dim // _PART


def _keeps_vectors(func: Any, rest: Sequence[Any], dims: int) -> bool:
    """Whether an operation of `_PARTS` leaves the last dimension as it is."""
    if func is _aten.slice.Tensor:
        return bool(rest) and rest[0] % dims != dims - 1
    return func in _WHOLE or len(rest[0]) < dims


def _plain(x: Any) -> Any:
    return x.dequantize() if isinstance(x, Int8States) else x
