"""Perplexity across context lengths: the same tokens predicted by every method, with more or less text before them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.laws import LawName, match_cost
from hf_sparse.measure.equal_cost import matched
from hf_sparse.measure.kept import row_counts
from hf_sparse.measure.processes import my_share, process_state, repair_together
from hf_sparse.measure.windows import Window
from hf_sparse.monitor import SparsityReport
from hf_sparse.results import ResultFile, Row, row_key
from hf_sparse.support import SupportReport

Methods = Mapping[str, SparseAttentionConfig | None]

DENSE = "dense"
METHODS = (DENSE, "topk", "grouped", "window", "fixed", "fixed-grouped")
FIXED_OF = {"topk": "fixed", "grouped": "fixed-grouped"}
"""Adaptive methods, and the method that spends as many keys with the same selector, the same number on every row."""

MORE_METHODS = ("uniform", "decode", "decode-topk")
"""Methods that are compared where they are asked for."""

DECODED = ("decode", "decode-topk")
"""Methods under which the targets' tokens go through the model one at a time, after the text before them."""

BLOCK_TOKENS = 32
"""Neighbouring tokens whose likelihoods are stored as one sum, and resampled together."""

# Rows of logits that are turned into float32 at once: 64 x 262,144 tokens of vocabulary are 64 MiB.
_LOGIT_ROWS = 64


def make_methods(
    names: Iterable[str], config: SparseAttentionConfig, lengths: Sequence[int], support: SupportReport | None = None
) -> Methods:
    """What to compare: `dense` first, then each of `names` from `METHODS` and `MORE_METHODS` with its configuration.

    - `topk`, `grouped` and `window` follow `config` but for the selector;
    - `fixed` and `fixed-grouped` keep the same number of keys on every row, the number with which prefills of all
      `lengths` together attend to as many keys as under `config`, over all heads and layers;
    - `uniform` follows one power law with the default exponent in all heads, at the same cost, with the selector of
      `config`;
    - `decode` is `config` itself, and `decode-topk` the same with the selector `topk`: the targets' tokens are read one
      at a time from the cache, as in generation.

    Args:
        names: Methods.
        config: What they are made from.
        lengths: Tokens of the windows.
        support: The model; needed for laws per head, and for `uniform`.

    Raises:
        UserError: for an unknown name, or if a law cannot match the cost.
    """
    methods: dict[str, SparseAttentionConfig | None] = {DENSE: None}
    for name in names:
        match name:
            case "dense":
                continue
            case "topk" | "grouped" | "window":
                methods[name] = replace(config, selector=name)
            case "fixed":
                methods[name] = replace(_fixed(config, lengths, support), selector="topk")
            case "fixed-grouped":
                methods[name] = replace(_fixed(config, lengths, support), selector="grouped")
            case "uniform":
                methods[name] = _matched(config, lengths, support, "power")
            case "decode":
                methods[name] = config
            case "decode-topk":
                methods[name] = replace(config, selector="topk")
            case _:
                raise UserError(f"methods must be among {', '.join(METHODS + MORE_METHODS)}; got {name!r}")
    return methods


def _fixed(
    config: SparseAttentionConfig, lengths: Sequence[int], support: SupportReport | None
) -> SparseAttentionConfig:
    if config.law == "fixed":
        raise UserError("the fixed methods are matched to an adaptive law: leave them out with --methods")
    if config.per_head is not None:
        return _matched(config, lengths, support, "fixed")
    try:
        keys = match_cost(config.budget(), "fixed", lengths).keys
    except ValueError as error:
        raise UserError(str(error)) from error
    return replace(config, law="fixed", keys=keys, fraction=None)


def _matched(
    config: SparseAttentionConfig, lengths: Sequence[int], support: SupportReport | None, law: LawName
) -> SparseAttentionConfig:
    if support is None or not support.supported:
        raise UserError(f"the cost of a model is not known: {support or 'its attention layers are needed'}")
    return matched(config, support, lengths, law)


@contextmanager
def applied(model: PreTrainedModel, config: SparseAttentionConfig | None) -> Iterator[None]:
    """The model patched with `config` for the length of a `with` block, or as it is if `None`."""
    if config is None:
        yield
        return
    with warnings.catch_warnings():
        # A fixed budget is here to be compared with: its user need not be warned of it.
        warnings.filterwarnings("ignore", message=".*grow no faster than log")
        with hf_sparse.patched(model, config):
            yield


@torch.no_grad()
def token_nll(model: PreTrainedModel, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in nats: float64 `(targets,)` on the CPU.

    Args:
        model: Any causal language model.
        input_ids: int64 `(length,)`.
        targets: int64 `(targets,)`: what the last positions of `input_ids` should predict.
    """
    output = model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=len(targets))
    logits: Tensor = output.logits[0, -len(targets) :]
    out = torch.empty(len(targets), dtype=torch.float64)
    for start in range(0, len(targets), _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        out[rows] = cross_entropy(logits[rows].float(), targets[rows].to(logits.device), reduction="none")
    return out


@torch.no_grad()
def decoded_nll(
    model: PreTrainedModel, input_ids: Tensor, targets: Tensor, before_decoding: Callable[[], object] | None = None
) -> Tensor:
    """The same as `token_nll`, as generation goes: one pass over the context, then each token in a call of its own.

    Args:
        model: Any causal language model with a cache.
        input_ids: int64 `(length,)`.
        targets: int64 `(targets,)`; the rows that predict them are those that go one at a time.
        before_decoding: Called between the context and the first of these.
    """
    ids = input_ids[None].to(model.device)
    context = len(input_ids) - len(targets)
    cache = None
    if context:
        cache = model(input_ids=ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
    if before_decoding is not None:
        before_decoding()
    out = torch.empty(len(targets), dtype=torch.float64)
    for i, target in enumerate(targets.to(model.device)):
        step = model(input_ids=ids[:, context + i : context + i + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        out[i] = cross_entropy(step.logits[0, -1].float(), target)
    return out


def measure(
    model: PreTrainedModel, window: Window, config: SparseAttentionConfig | None, *, decode: bool = False
) -> Row:
    """Likelihood of the targets of one window under one method; `None` is the model as it is.

    Args:
        model: The model, unpatched.
        window: What to predict.
        config: What to patch it with.
        decode: Whether the rows that predict the targets go one at a time. Only these rows are counted then.

    Returns:
        `tokens`; `nll`, their sum in nats; `block_nll`, sums over blocks of `BLOCK_TOKENS`; `density` (kept / visible
        keys, all layers); `sparse_density`, the same without the sliding-window layers of a hybrid model; `mean_keys`
        a row and head keeps on average over all layers; `rows`, summed over the layers, and `dense_rows` of them by
        reason (both `None` for the dense model, whose keys nobody counts); `seconds` of the forward pass or passes.

    Raises:
        UserError: if a likelihood is not finite.
    """
    with applied(model, config):
        start = time.perf_counter()
        counts: Row = {"density": 1.0, "sparse_density": 1.0, "mean_keys": None, "rows": None, "dense_rows": None}
        context: list[SparsityReport] = []
        if not decode:
            nll = token_nll(model, window.input_ids, window.targets)
        elif config is None:
            nll = decoded_nll(model, window.input_ids, window.targets)
        else:
            nll = decoded_nll(model, window.input_ids, window.targets, lambda: context.append(hf_sparse.report(model)))
        seconds = time.perf_counter() - start
        if config is not None:
            counts = row_counts(hf_sparse.report(model), hf_sparse.inspect(model).sliding_layers, *context)
    if not nll.isfinite().all():
        raise UserError(f"the likelihoods of {window.document} are not finite in {model.dtype}: try another --dtype")
    return {
        "tokens": len(nll),
        "nll": nll.sum().item(),
        "block_nll": [nll[start : start + BLOCK_TOKENS].sum().item() for start in range(0, len(nll), BLOCK_TOKENS)],
        **counts,
        "seconds": round(seconds, 3),
    }


def evaluate(
    model: PreTrainedModel, windows: Sequence[Window], methods: Methods, results: ResultFile, about: Row
) -> list[Row]:
    """Measure every window with every method that `results` does not hold yet, and give the rows of all.

    Under `accelerate launch` each process takes its share of the windows; all get all rows.

    Args:
        model: The model, unpatched; it is patched for each sparse measurement and restored.
        windows: What to predict.
        methods: From `make_methods`.
        results: Where rows are appended.
        about: From `provenance`; written into every row.
    """
    repair_together(results)
    keys = {
        (window.sha256, name): row_key(
            command="perplexity",
            model=[about["model"]["name"], about["model"]["revision"], about["dtype"], about["device"]],
            window=window.sha256,
            method=name,
            config=None if config is None else config.to_dict(),
        )
        for window in windows
        for name, config in methods.items()
    }
    done = results.rows()
    state = process_state()
    mine = my_share(windows, lambda window: window.length)
    tasks = [(window, name) for window in mine for name in methods if keys[window.sha256, name] not in done]
    for window, name in tqdm(tasks, desc="perplexity", unit="run", disable=not state.is_main_process):
        config = methods[name]
        row = {
            "key": keys[window.sha256, name],
            "command": "perplexity",
            "method": name,
            "length": window.length,
            "document": window.document,
            "text_sha256": window.text_sha256,
            "window_sha256": window.sha256,
            **measure(model, window, config, decode=name in DECODED),
            "block_tokens": BLOCK_TOKENS,
            "config": None if config is None else config.to_dict(),
            **about,
        }
        results.append(row)
    state.wait_for_everyone()
    done = results.rows()
    return [done[key] for key in keys.values()]
