"""Perplexity across context lengths: the same tokens predicted by every method, with more or less text before them."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache, PreTrainedModel

from hf_sparse.cache import SparseCache, given_cache, grow_in_place
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure.evaluation import applied, check_finite, measure_each, sum_counts
from hf_sparse.measure.methods import DECODED, IN_8_BITS, Methods
from hf_sparse.measure.windows import Window
from hf_sparse.patching import inspect, report
from hf_sparse.patching.caches import cache_argument
from hf_sparse.results import Record, ResultFile

COMMAND = "perplexity"

BLOCK_TOKENS = 32
"""Neighbouring tokens whose likelihoods are stored as one sum, and resampled together."""

# Positions whose logits are turned into float32 at once: 64 x 262,144 tokens of vocabulary are 64 MiB.
_LOGIT_ROWS = 64


@torch.no_grad()
def token_nll(model: PreTrainedModel, input_ids: Tensor, targets: Tensor, cache: Cache | None = None) -> Tensor:
    """Negative log-likelihood, in nats, float64 `(targets,)` on the CPU, of what the last positions should predict.

    Input is int64 `(length,)`, targets are int64 `(targets,)`. Keys and values are put into `cache`, if there is one,
    which must be empty, and read from there.
    """
    options = {"use_cache": cache is not None, "logits_to_keep": len(targets)}
    output = model(input_ids=input_ids[None].to(model.device), **cache_argument(model, cache), **options)
    logits: Tensor = output.logits[0, -len(targets) :]
    out = torch.empty(len(targets), dtype=torch.float64)
    for start in range(0, len(targets), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        out[part] = cross_entropy(logits[part].float(), targets[part].to(logits.device), reduction="none")
    return out


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Tensor) -> Cache | None:
    """The cache, growing in place, of a model that has read int64 `(length,)`; `None` if there is nothing to read."""
    if not len(input_ids):
        return None
    output = model(input_ids=input_ids[None].to(model.device), use_cache=True, logits_to_keep=1)
    cache: Cache = given_cache(output)
    if isinstance(cache, DynamicCache):
        grow_in_place(cache)
    return cache


@torch.no_grad()
def decoded_nll(model: PreTrainedModel, cache: Cache | None, input_ids: Tensor, targets: Tensor) -> Tensor:
    """The same as in generation: one pass over `input_ids`, then a call for each of the targets that follow.

    The cache holds what the model has read before, and is extended; `None` for nothing.
    """
    out = torch.empty(len(targets), dtype=torch.float64)
    step = input_ids
    for i in range(len(targets)):
        ids, options = step[None].to(model.device), cache_argument(model, cache)
        output = model(input_ids=ids, **options, use_cache=True, logits_to_keep=1)
        cache, step = given_cache(output), targets[i : i + 1]
        out[i] = cross_entropy(output.logits[0, -1:].float(), step.to(output.logits.device))
    return out


def measure(
    model: PreTrainedModel,
    window: Window,
    config: SparseAttentionConfig | None,
    *,
    decode: bool = False,
    nbits: int | None = None,
    sliding_layers: Collection[int] = (),
) -> Record:
    """Likelihood of the targets of one window under one method; `None` is the model as it is.

    Args:
        model: The model, unpatched.
        window: What to predict.
        config: What to patch it with.
        decode: Whether the positions that predict the targets are read one at a time. Only these are counted then.
        nbits: Of a `SparseCache` that keys and values are read from in one pass; `None` for no cache.
        sliding_layers: Left out of `sparse_density`.

    Returns:
        `tokens`; `nll`, their sum in nats; `block_nll`, sums over blocks of `block_tokens`; `density` (kept / visible
        keys, all layers); `sparse_density`, the same without `sliding_layers`; `mean_keys` that a query and
        head keeps; `rows`, queries summed over the layers, and `dense_rows` of them by reason (both `None` for
        the dense model, whose keys are not counted); `seconds` of the forward pass or passes.

    Raises:
        UserError: if a likelihood is not finite.
    """
    counts: Record = {"density": 1.0, "sparse_density": 1.0, "mean_keys": None, "rows": None, "dense_rows": None}
    before = None
    with applied(model, config):
        start = time.perf_counter()
        if decode:
            context = window.length - len(window.targets)
            cache = prefill(model, window.input_ids[:context])
            before = None if config is None else report(model)
            nll = decoded_nll(model, cache, window.input_ids[context : context + 1], window.targets)
        else:
            own = None if nbits is None else SparseCache(model.config, nbits=nbits)
            nll = token_nll(model, window.input_ids, window.targets, own)
        seconds = time.perf_counter() - start
        if config is not None:
            counts = sum_counts(report(model), sliding_layers, before)
    check_finite(nll, window.document, model)
    return {
        "tokens": len(nll),
        "block_tokens": BLOCK_TOKENS,
        "nll": nll.sum().item(),
        "block_nll": [nll[start : start + BLOCK_TOKENS].sum().item() for start in range(0, len(nll), BLOCK_TOKENS)],
        **counts,
        "seconds": round(seconds, 3),
    }


def evaluate(
    model: PreTrainedModel, windows: Sequence[Window], methods: Methods, results: ResultFile, about: Record
) -> list[Record]:
    """Measure every window under every method (`perplexity_methods`), as `measure_each` does.

    The model is patched for each sparse measurement, and restored.
    """
    sliding_layers = inspect(model).sliding_layers

    def measured(window: Window, name: str) -> Record:
        decode, nbits = name in DECODED, 8 if name in IN_8_BITS else None
        return measure(model, window, methods[name], decode=decode, nbits=nbits, sliding_layers=sliding_layers)

    return measure_each(COMMAND, windows, methods, results, about, measured)
