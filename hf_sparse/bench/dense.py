"""Dense attention of PyTorch and of transformers, the baselines."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_sparse.call import AttentionCall
from hf_sparse.engines.dense import for_sdpa
from hf_sparse.visibility import interval_to_mask

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_BLOCK = 128


def backends(device: torch.device) -> list[str]:
    """Names of the SDPA kernels that are measured one by one on `device`; the CPU has only one."""
    return list(_BACKENDS) if device.type == "cuda" else []


def pinned(backend: str | None) -> AbstractContextManager[object]:
    """A context in which SDPA uses the kernel `backend`, or the one of its own choice if `None`."""
    return nullcontext() if backend is None else sdpa_kernel(_BACKENDS[backend])


def sdpa(inputs: AttentionCall, backend: str | None = None) -> Tensor:
    """SDPA called directly, causal if there is more than one query."""
    key, value, shared = for_sdpa(inputs.key, inputs.value, inputs.group_size, flash=backend != "efficient")
    with pinned(backend):
        return F.scaled_dot_product_attention(
            inputs.query,
            key,
            value,
            is_causal=inputs.query.shape[2] > 1,
            scale=inputs.scaling,
            enable_gqa=shared,
        )


def packed_sdpa(inputs: AttentionCall) -> Tensor:
    """SDPA for a single query, with the heads that share keys as the rows of one matrix."""
    rows = inputs.query.view(1, inputs.key.shape[1], inputs.group_size, -1)
    return F.scaled_dot_product_attention(rows, inputs.key, inputs.value, scale=inputs.scaling).view_as(inputs.query)


def cached_step(inputs: AttentionCall) -> Tensor:
    """A decode step of stock transformers: the last key and value are concatenated to all others, then attended to."""
    layer = DynamicLayer()  # type: ignore[no-untyped-call]
    layer.lazy_initialization(inputs.key, inputs.value)
    layer.keys, layer.values = inputs.key[:, :, :-1], inputs.value[:, :, :-1]
    key, value = layer.update(inputs.key[:, :, -1:], inputs.value[:, :, -1:])
    return _transformers_sdpa(replace(inputs, key=key, value=value), None)


class MaskedSdpa:
    """A prefill of stock transformers for a batch with padding: SDPA under an n x n mask.

    Models build the mask once for all layers, so the first call makes it and later ones are timed without.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def __call__(self, inputs: AttentionCall) -> Tensor:
        """Attend under the mask: `(1, heads, queries, head_dim)`."""
        if self._mask is None:
            self._mask = interval_to_mask(inputs.intervals, inputs.key.shape[2])
        return _transformers_sdpa(inputs, self._mask)


def causal_blocks(length: int, device: torch.device) -> BlockMask:
    """The block mask of causal attention, made without the n x n mask that `create_block_mask` would form."""
    count = -(-length // _BLOCK)
    index = torch.arange(count, dtype=torch.int32, device=device)
    # In row i of blocks, block i is cut by the diagonal and the i blocks before it are full.
    cut = ((index + index[:, None]) % count)[None, None]
    return BlockMask.from_kv_blocks(
        torch.ones_like(index)[None, None],
        cut,
        index[None, None],
        index.expand(count, count)[None, None].contiguous(),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_causal,
        seq_lengths=(length, length),
    )


def flex(inputs: AttentionCall, mask: BlockMask) -> Tensor:
    """FlexAttention under a block mask, compiled once for all lengths."""
    out = _compiled_flex()(
        inputs.query,
        inputs.key,
        inputs.value,
        block_mask=mask,
        scale=inputs.scaling,
        enable_gqa=inputs.group_size > 1,
    )
    assert isinstance(out, Tensor)
    return out


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _transformers_sdpa(inputs: AttentionCall, mask: Tensor | None) -> Tensor:
    # All that transformers' attention function reads of an attention module.
    module: Any = SimpleNamespace(num_key_value_groups=inputs.group_size, is_causal=True)
    out, _ = sdpa_attention_forward(module, inputs.query, inputs.key, inputs.value, mask, scaling=inputs.scaling)
    return out.transpose(1, 2)
