"""Attention-matrix error: how far sparse attention is from dense attention on the dense model's own activations.

The model runs dense, once per document, over the longest length. Attention is causal, so the rows before position L
are the last rows of a prefill of L tokens: one pass serves every length. At different lengths these are different
tokens of the text, unlike in the perplexity evaluation, which needs a pass per length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.diagnostics import observed
from hf_sparse.errors import UserError
from hf_sparse.laws import Budget, LawName, match_cost
from hf_sparse.measure.equal_cost import matched, with_dense_layers
from hf_sparse.measure.layer_errors import DENSE, Columns, layer_errors
from hf_sparse.measure.processes import my_share, process_state, repair_together
from hf_sparse.measure.windows import Window
from hf_sparse.patching import base_model
from hf_sparse.results import ResultFile, Row, row_key
from hf_sparse.selectors.grouped import GROUP_QUERIES
from hf_sparse.support import SupportReport

COMMAND = "attention-error"
ADAPTIVE = "topk"
"""The method that the others are compared with, where there is one law for all heads."""

CALIBRATED = "calibrated"
"""The method that the others are compared with, where each head has a law of its own."""

ROWS_PER_LENGTH = 128

Methods = Mapping[str, SparseAttentionConfig]


def make_methods(
    config: SparseAttentionConfig, lengths: Sequence[int], support: SupportReport | None = None
) -> Methods:
    """What to compare: every selector with the law of `config`, and every other law with the exact selector.

    A law gets the parameter with which prefills of all `lengths` together attend to as many keys as under `config`.
    Where `config` has laws calibrated per head, these are compared with one law for all heads at equal cost over all
    heads and layers, every one with the selector of `config`, for which it was calibrated.

    Args:
        config: What the methods are made from.
        lengths: Tokens.
        support: The model; needed for laws per head.

    Returns:
        Configurations by name: `"topk"` first, the other laws by their names, then `"grouped"` and `"window"`. For
        laws per head: `"calibrated"` first, then all laws by their names.

    Raises:
        UserError: if a law cannot match the cost.
    """
    laws: tuple[LawName, ...] = get_args(LawName)
    if config.per_head is not None:
        if support is None or not support.supported:
            raise UserError(f"the cost of a model is not known: {support or 'its attention layers are needed'}")
        whole = with_dense_layers(config, support)
        return {CALIBRATED: whole} | {law: matched(whole, support, lengths, law) for law in laws}
    exact = replace(config, selector=ADAPTIVE)
    methods: dict[str, SparseAttentionConfig] = {ADAPTIVE: exact}
    for law in laws:
        if law != config.law:
            try:
                methods[law] = _with_law(exact, match_cost(config.budget(), law, lengths, exponent=config.exponent))
            except ValueError as error:
                raise UserError(str(error)) from error
    return methods | {"grouped": replace(config, selector="grouped"), "window": replace(config, selector="window")}


def _with_law(config: SparseAttentionConfig, budget: Budget) -> SparseAttentionConfig:
    assert isinstance(budget.alpha, float)
    return replace(
        config,
        law=budget.law,
        alpha=budget.alpha,
        keys=budget.keys if budget.law == "fixed" else None,
        fraction=budget.fraction if budget.law == "fraction" else None,
    )


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    window: Window,
    lengths: Sequence[int],
    methods: Methods,
    rows_per_length: int | None = ROWS_PER_LENGTH,
    progress: Callable[[], object] | None = None,
) -> list[Row]:
    """Attention errors of every layer and head in the first tokens of one window.

    Args:
        model: An unpatched model. All layers are measured, those too that a patch would leave dense by itself.
        window: At least `max(lengths)` tokens.
        lengths: Tokens, rising.
        methods: From `make_methods`.
        rows_per_length: Rows measured before each length, rounded up to begin with a group of the grouped selector;
            `None` for all rows that no shorter length has measured.
        progress: Called after every layer.

    Returns:
        For each length, one dictionary per method and one for `"dense"`: `length`, `method`, `rows`, the number of
        rows measured, and `columns`: `layer`, `head`, `windowed` (whether a sliding window hides keys, so that
        `visible` does not grow with the length) and the columns of `layer_errors`, one entry per layer and head.

    Raises:
        ValueError: if the window is too short.
    """
    if window.length < max(lengths):
        raise ValueError(f"the window has {window.length} tokens, fewer than the length {max(lengths)}")
    found: dict[tuple[int, str], Columns] = {}
    starts = dict(zip(lengths, _first_rows(lengths, rows_per_length), strict=True))

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


def _first_rows(lengths: Sequence[int], rows_per_length: int | None) -> list[int]:
    shorter = [0, *lengths[:-1]]
    wanted = shorter if rows_per_length is None else [max(0, length - rows_per_length) for length in lengths]
    return [start // GROUP_QUERIES * GROUP_QUERIES for start in wanted]


def evaluate(
    model: PreTrainedModel,
    windows: Sequence[Window],
    lengths: Sequence[int],
    methods: Methods,
    results: ResultFile,
    about: Row,
    rows_per_length: int | None = ROWS_PER_LENGTH,
) -> list[Row]:
    """Measure every window that `results` does not hold yet, and give the rows of all.

    Under `accelerate launch` each process takes its share of the windows; all get all rows.

    Args:
        model: The model, unpatched.
        windows: One a document, of `max(lengths)` tokens.
        lengths: Tokens, rising.
        methods: From `make_methods`.
        results: Where rows are appended: for each window those of `measure`, with `key`, `command`, `document`,
            `text_sha256`, `window_sha256`, `config` and what is in `about`.
        about: From `provenance`; written into every row.
        rows_per_length: As for `measure`.
    """
    repair_together(results)
    configs = {name: config.to_dict() for name, config in methods.items()}
    starts = dict(zip(lengths, _first_rows(lengths, rows_per_length), strict=True))

    def key(window: Window, length: int, method: str) -> str:
        return row_key(
            command=COMMAND,
            model=[about["model"]["name"], about["model"]["revision"], about["dtype"], about["device"]],
            window=window.sha256,
            rows=[starts[length], length],
            method=method,
            config=configs.get(method),
        )

    def missing(window: Window, method: str) -> bool:
        return any(key(window, length, method) not in done for length in lengths)

    done = results.rows()
    state = process_state()
    mine = my_share(windows, lambda window: window.length)
    todo = [window for window in mine if any(missing(window, name) for name in (DENSE, *methods))]
    layers = model.config.get_text_config().num_hidden_layers
    with tqdm(total=len(todo) * layers, desc=COMMAND, unit="layer", disable=not state.is_main_process) as bar:
        for window in todo:
            left = {name: config for name, config in methods.items() if missing(window, name)}
            for row in measure(model, window, lengths, left, rows_per_length, progress=bar.update):
                row_config = configs.get(row["method"])
                own = {"key": key(window, row["length"], row["method"]), "command": COMMAND}
                if own["key"] not in done:
                    text = {"document": window.document, "text_sha256": window.text_sha256}
                    results.append(
                        {**own, **text, "window_sha256": window.sha256, **row, "config": row_config, **about}
                    )
    state.wait_for_everyone()
    done = results.rows()
    return [done[key(window, length, name)] for window in windows for length in lengths for name in (DENSE, *methods)]
