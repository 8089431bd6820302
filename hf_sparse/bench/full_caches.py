"""Caches that are full already, without a prefill."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from hf_sparse.bench.layer import SPARSE
from hf_sparse.cache import SparseCache
from hf_sparse.diagnostics import observed
from hf_sparse.patching import base_model

STATIC = "static-cache"

# Tokens of text whose keys and values fill a real model's cache, repeated.
_CAPTURED_TOKENS = 2048


def cache_maker(
    model: PreTrainedModel, prompt: Tensor, real: bool, new_tokens: int
) -> Callable[[str], Callable[[], Cache]]:
    """Method -> what makes its cache, each time the same."""
    length = len(prompt) - 1
    states = list(_captured(model, prompt, length) if real else _random(model, length))

    @torch.no_grad()
    def make(name: str) -> Callable[[], Cache]:
        config = model.config.get_text_config()
        filled: Cache = SparseCache(config) if name == SPARSE else DynamicCache(config=config)
        if name == STATIC:
            filled = StaticCache(config=config, max_cache_len=length + 1 + new_tokens)
        for layer, (key, value) in enumerate(states):
            filled.update(key, value, layer)
        return lambda: copy.deepcopy(filled)

    return make


def _random(model: PreTrainedModel, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    config = model.config
    for _ in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        key, value = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        yield key, value


@torch.no_grad()
def _captured(model: PreTrainedModel, prompt: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of every layer on the first tokens of the prompt, repeated up to `length`."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with observed(model, lambda layer, inputs: found.update({layer: (inputs.key, inputs.value)})):
        ids = prompt[None, : min(_CAPTURED_TOKENS, length)].to(model.device)
        base_model(model).base_model(input_ids=ids, use_cache=False)
    for layer in sorted(found):
        key, value = found[layer]
        place = torch.arange(length, device=key.device) % key.shape[2]
        yield key[:, :, place], value[:, :, place]
