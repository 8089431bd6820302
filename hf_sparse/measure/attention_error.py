"""Attention-matrix error: how far sparse attention is from dense attention on the dense model's own activations.

The model runs dense, once per document, over the longest length. Attention is causal, so the queries before position L
are the last ones of a prefill of L tokens: one pass serves every length. At different lengths these are different
tokens of the text, unlike in the perplexity evaluation, which needs a pass per length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.diagnostics import observed
from hf_sparse.measure.layer_errors import Columns, block_queries, layer_errors
from hf_sparse.measure.windows import Window
from hf_sparse.patching import base_model
from hf_sparse.results import DENSE, Record, ResultFile, identity, is_main_process, my_share, record_key, resume

COMMAND = "attention-error"

QUERIES_PER_LENGTH = 128
"""Queries measured before each length."""


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    window: Window,
    lengths: Sequence[int],
    methods: Mapping[str, SparseAttentionConfig],
    queries_per_length: int = QUERIES_PER_LENGTH,
    progress: Callable[[], object] | None = None,
) -> list[Record]:
    """Attention errors of every layer and head in the first tokens of one window.

    Args:
        model: An unpatched model. All layers are measured, also those that a patch leaves dense by default.
        window: At least `max(lengths)` tokens.
        lengths: Tokens, rising.
        methods: From `error_methods`.
        queries_per_length: Queries measured before each length, rounded up to whole groups of the selectors.
        progress: Called after every layer.

    Returns:
        For each length, one dictionary per method and one for `"dense"`: `length`, `method`, `rows`, the number of
        queries measured, and `columns`: `layer`, `head`, `windowed` (whether a sliding window hides keys, so that
        `visible` does not grow with the length) and the columns of `layer_errors`, one entry per layer and head.

    Raises:
        ValueError: if the window is too short.
    """
    if window.length < max(lengths):
        raise ValueError(f"the window has {window.length} tokens, fewer than the length {max(lengths)}")
    found: dict[tuple[int, str], Columns] = {}
    starts = _starts(lengths, queries_per_length, block_queries(methods))

    def observer(layer: int, inputs: AttentionCall) -> None:
        heads = inputs.query.shape[1]
        windowed = bool((inputs.intervals[..., 0] > 0).any())
        place: Columns = {"layer": [layer] * heads, "head": list(range(heads)), "windowed": [windowed] * heads}
        for length, start in starts.items():
            for method, columns in layer_errors(layer, inputs, start, length, methods).items():
                whole = found.setdefault((length, method), {})
                for name, column in (place | columns).items():
                    whole.setdefault(name, []).extend(column)
        if progress is not None:
            progress()

    with observed(model, observer):
        # Without the head: the logits of a long text take more memory than all the rest.
        base_model(model).base_model(input_ids=window.input_ids[None, : max(lengths)].to(model.device), use_cache=False)
    return [
        {"length": length, "method": method, "rows": length - starts[length], "columns": columns}
        for (length, method), columns in sorted(found.items(), key=lambda item: item[0][0])
    ]


def _starts(lengths: Sequence[int], queries_per_length: int, block: int) -> dict[int, int]:
    """By length, the first query that is measured: the first of a block."""
    return {length: max(0, length - queries_per_length) // block * block for length in lengths}


def evaluate(
    model: PreTrainedModel,
    windows: Sequence[Window],
    lengths: Sequence[int],
    methods: Mapping[str, SparseAttentionConfig],
    results: ResultFile,
    about: Record,
    queries_per_length: int = QUERIES_PER_LENGTH,
) -> list[Record]:
    """Measure every window that `results` does not hold yet, and return the records of all.

    Under `accelerate launch` each process takes its share of the windows; all get all records. Those are the records
    of `measure`, with `key`, `command`, `config`, what is known about the window, and `about`, the `provenance`.
    """
    configs = {DENSE: None, **{name: config.to_dict() for name, config in methods.items()}}
    starts = _starts(lengths, queries_per_length, block_queries(methods))

    def key(window: Window, length: int, name: str) -> str:
        place = {"window": window.sha256, "rows": [starts[length], length], "method": name, "config": configs[name]}
        return record_key(command=COMMAND, model=identity(about), **place)

    cells = {key(window, length, name): (window, name) for window in windows for length in lengths for name in configs}
    layers = model.config.get_text_config().num_hidden_layers

    def measured(missing: Mapping[str, tuple[Window, str]]) -> Iterator[tuple[str, Record]]:
        names: dict[str, set[str]] = {}
        for window, name in missing.values():
            names.setdefault(window.sha256, set()).add(name)
        mine = my_share([window for window in windows if window.sha256 in names], lambda window: window.length)
        with tqdm(total=len(mine) * layers, desc=COMMAND, unit="layer", disable=not is_main_process()) as bar:
            for window in mine:
                left = {name: config for name, config in methods.items() if name in names[window.sha256]}
                for found in measure(model, window, lengths, left, queries_per_length, progress=bar.update):
                    own = key(window, found["length"], found["method"])
                    if own in missing:
                        place = {"command": COMMAND, **window.about()}
                        yield own, {**place, **found, "config": configs[found["method"]], **about}

    return resume(results, cells, measured)
