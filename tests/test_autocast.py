"""Under autocast: numbers of two types meet, and what must be exact stays so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hf_sparse
from tests import calls, tiny
from tests.sparse import SPARSE

IDS = tiny.tokens(2, 200)
# The second layer is dense, so that what one selector or engine rounds differently chooses no other keys later on.
CONFIG = replace(SPARSE, dense_layers=(1,))


def logits(**fields: str) -> torch.Tensor:
    model = hf_sparse.patch(tiny.model("llama"), replace(CONFIG, **fields))
    with torch.autocast("cpu", torch.bfloat16):
        return tiny.logits(model, IDS)


@pytest.mark.parametrize("selector", ["grouped", "topk", "window"])
@pytest.mark.parametrize("engine", ["auto", "gather", "cpu"])
def test_engines_agree(selector: str, engine: str) -> None:
    if reason := calls.unavailable(engine):
        pytest.skip(reason)
    torch.testing.assert_close(
        logits(selector=selector, engine=engine), logits(selector=selector, engine="reference"), atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize("selector", ["grouped", "topk", "window"])
def test_models_write_and_learn(selector: str) -> None:
    model = hf_sparse.patch(tiny.model("llama"), replace(SPARSE, selector=selector))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(IDS, max_new_tokens=3).shape == (2, 203)
        model(IDS, labels=IDS).loss.backward()
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)
