"""Patched tiny models, and what tests of several files do with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_sparse
from hf_sparse import SparseAttentionConfig, attention, interface
from hf_sparse.selectors import SELECTORS
from tests import tiny

SPARSE = SparseAttentionConfig(
    alpha=2.0, exponent=0.5, min_keys=3, sink_keys=1, recent_keys=2, dense_layers=(), dense_below=0
)
EXACT = ("topk", "window")  # selectors whose queries do not share their keys

# How several tests write.
GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
}

# Asked for in some tests, where it makes engines work on all keys but one.
by_design = pytest.mark.filterwarnings("ignore:max_keys=39 makes the kept keys grow no faster")
every_architecture = pytest.mark.parametrize("name", tiny.ARCHITECTURES)
every_selector = pytest.mark.parametrize("selector", SELECTORS)
every_exact_selector = pytest.mark.parametrize("selector", EXACT)
every_cache = pytest.mark.parametrize("cache", ["dynamic", "static"])
every_side = pytest.mark.parametrize("side", ["left", "right"])


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Logits that differ by float32 rounding alone."""
    assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def sparse_model(name: str, selector: str, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    return hf_sparse.patch(tiny.model(name, dtype), SPARSE, selector=selector, **fields)


def new_cache(kind: str, model: PreTrainedModel, longest: int) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=longest)
    return DynamicCache(config=model.config)


@torch.no_grad()
def step_by_step(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: str, steps: list[int]) -> Tensor:
    """Logits of `ids` read a few tokens at a time: `steps` says how many, and they add up to the length."""
    past = new_cache(cache, model, ids.shape[1] + 5)
    place = tiny.positions(mask)
    logits, start = [], 0
    for size in steps:
        stop = start + size
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=place[:, start:stop],
            past_key_values=past,
            use_cache=True,
        )
        logits.append(out.logits.float())
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)


@contextmanager
def captured_weights() -> Iterator[dict[int, list[Tensor]]]:
    """The weights that each layer of patched models uses in a `with` block, whether the model hands them on or not."""
    weights: dict[int, list[Tensor]] = {layer: [] for layer in range(tiny.LAYERS)}

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        out = interface.sparse_attention_forward(module, *args, **{**kwargs, "output_attentions": True})
        weights[module.layer_idx].append(out[1])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, attend)
        yield weights


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Mean absolute difference, to compare rounding with rounding."""
    return float((ours - theirs).abs().mean())


def generated(model: PreTrainedModel, batch: int = 2, new: int = 12, **kwargs: Any) -> list[list[int]]:
    """The tokens that `model` continues a left-padded batch with."""
    ids, mask, _ = tiny.padded([24, 17][:batch], "left")
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **kwargs
    )
    tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return tokens
