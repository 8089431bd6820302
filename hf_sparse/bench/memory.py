"""Peak memory of one attention call above its inputs, and of a prefill above the model and its cache; caches.

Every measurement runs in a new process, because memory that an earlier call gave back to the allocator would hide what
a later one takes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from hf_sparse.attention import LayerState, attend
from hf_sparse.bench.caches import cache_table, measure_caches
from hf_sparse.bench.generation import WARM_UP_TOKENS
from hf_sparse.bench.inputs import gaussian
from hf_sparse.bench.plot import draw_method, finish_panel
from hf_sparse.bench.shapes import Shape, check_shape, random_model
from hf_sparse.bench.tables import ratio_text
from hf_sparse.bench.tasks import MASKED, SDPA, SPARSE
from hf_sparse.bench.timing import mebibytes, with_peak
from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.engines.common import masked_weights, weighted_values
from hf_sparse.errors import UserError
from hf_sparse.measure.plots import figure, save
from hf_sparse.measure.statistics import log_slope
from hf_sparse.patching import patch, report
from hf_sparse.patching.caches import cache_argument
from hf_sparse.results import Summary, Table, device_name, software
from hf_sparse.selectors import SELECTORS
from hf_sparse.visibility import interval_to_mask

COMMAND = "memory"

CALL_METHODS = ("eager", MASKED, SDPA, *SELECTORS)
"""`eager` forms all scores, `masked-sdpa` only the mask, as stock models do for a padded batch, and `sdpa` neither; the
others are the selectors."""

PREFILL_METHODS = (SDPA, "generate", SPARSE)
"""`sdpa` is the model called without a mask, the baseline of all ratios; `generate` that of the stock model, and
`hf_sparse` that of the patched one."""

_CPU = torch.device("cpu")
_DTYPE = torch.float32
_WARM_UP_QUERIES = 64


def evaluate(
    lengths: Sequence[int],
    prefill: Sequence[int],
    cached: Sequence[int],
    shape: Shape,
    config: SparseAttentionConfig,
    *,
    most_bytes: float,
    repeats: int,
    seed: int,
) -> Summary:
    """Measure single calls of `lengths` queries and keys, and `prefill` prompts of a model, on the CPU in float32.

    `cached` are tokens in the caches of a whole model (`measure_caches`). All layers of the model are sparse unless the
    configuration names dense ones. See `measure_calls` for `most_bytes`.

    Raises:
        UserError: for a shape or configuration that cannot be used, or where the system does not tell a process's peak
            memory.
    """
    _peak(lambda: None)  # refuses a system that does not tell it
    sparse = config if config.dense_layers is not None else replace(config, dense_layers=())
    check_shape(shape, sparse, _DTYPE, _CPU, weights=bool(prefill or cached))
    return {
        **summarise(measure_calls(lengths, shape, config, most_bytes, seed)),
        "prefill": measure_prefills(prefill, shape, sparse, repeats, seed),
        "cached": measure_caches(cached, shape, sparse, seed, _in_new_process),
        "shape": {**asdict(shape), "dtype": "float32"},
        "config": config.to_dict(),
        "seed": seed,
        "device": _CPU.type,
        "device_name": device_name(_CPU),
        **software(),
    }


def measure_calls(
    lengths: Sequence[int], shape: Shape, config: SparseAttentionConfig, most_bytes: float, seed: int
) -> list[Summary]:
    """Measure every one of `CALL_METHODS` at every length.

    A method that took `p` bytes at one length is left out at longer ones where `p` times the squared ratio of the
    lengths is above `most_bytes`.

    Returns:
        A dictionary per method and length: `method`, `length`, `peak_mib`, and for sparse methods `mean_keys`, the mean
        number of keys that a query keeps.
    """
    found: list[Summary] = []
    last: dict[str, tuple[int, float]] = {}
    tasks = [(method, length) for method in CALL_METHODS for length in lengths]
    for method, length in tqdm(tasks, desc="memory", unit="run"):
        if method in last and last[method][1] * (length / last[method][0]) ** 2 > most_bytes:
            continue
        peak = _in_new_process(call_peak, method, length, shape, config, seed)
        last[method] = (length, peak)
        keys = config.budget().table(length)[1:].double().mean().item() if method in SELECTORS else None
        found.append({"method": method, "length": length, "peak_mib": mebibytes(peak), "mean_keys": keys})
    return found


@torch.no_grad()
def call_peak(method: str, length: int, shape: Shape, config: SparseAttentionConfig, seed: int) -> float:
    """Peak bytes of one causal attention call above its inputs, its output included; to be called in a new process."""
    inputs = gaussian(shape, _DTYPE, _CPU, seed)
    _attend(method, inputs.prefill(min(length, _WARM_UP_QUERIES)), config)  # loads the libraries of the method
    call = inputs.prefill(length)
    return _peak(lambda: _attend(method, call, config))


def _attend(method: str, call: AttentionCall, config: SparseAttentionConfig) -> object:
    query, key, value = call.query, call.key, call.value
    if method in SELECTORS:
        return attend(LayerState(0, replace(config, selector=method)), call)
    if method == SDPA:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    mask = interval_to_mask(call.intervals, key.shape[2])
    if method == MASKED:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return weighted_values(call, masked_weights(call, mask))


def measure_prefills(
    lengths: Sequence[int], shape: Shape, config: SparseAttentionConfig, repeats: int, seed: int
) -> list[Summary]:
    """Measure every one of `PREFILL_METHODS` at every length, `repeats` times in turn.

    Returns:
        A dictionary per length and method: `method`, `length`, `peaks_mib`, their median `peak_mib`, `ratio` (`median`
        of the peaks over those of the baseline in the same round, with the extremes `low` and `high`) and `density`.
    """
    tasks = [(length, index, method) for length in lengths for index in range(repeats) for method in PREFILL_METHODS]
    measured = {}
    for length, index, method in tqdm(tasks, desc="prefill memory", unit="run"):
        measured[length, index, method] = _in_new_process(prefill_peak, method, length, shape, config, seed)
    found = []
    for length in lengths:
        for method in PREFILL_METHODS:
            peaks, dense = ([measured[length, i, name][0] for i in range(repeats)] for name in (method, SDPA))
            ratios = [peak / other for peak, other in zip(peaks, dense, strict=True)]
            found.append(
                {
                    "method": method,
                    "length": length,
                    "peaks_mib": [mebibytes(peak) for peak in peaks],
                    "peak_mib": mebibytes(median(peaks)),
                    "ratio": {"median": median(ratios), "low": min(ratios), "high": max(ratios)},
                    "density": measured[length, 0, method][1],
                }
            )
    return found


@torch.no_grad()
def prefill_peak(
    method: str, length: int, shape: Shape, config: SparseAttentionConfig, seed: int
) -> tuple[float, float]:
    """Peak bytes of a prefill above the model, less the keys and values that it caches, and its density.

    To be called in a new process.
    """
    model = random_model(shape, _DTYPE, _CPU, seed)
    if method == SPARSE:
        patch(model, config)
    ids = torch.randint(shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    _prefill(model, method, ids[:, :WARM_UP_TOKENS])
    peak = _peak(lambda: _prefill(model, method, ids))
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * _DTYPE.itemsize * length
    return peak - cache, report(model).density if method == SPARSE else 1.0


def _prefill(model: PreTrainedModel, method: str, ids: torch.Tensor) -> object:
    if method == SDPA:
        return model(input_ids=ids, **cache_argument(model, DynamicCache(config=model.config)), logits_to_keep=1)
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)  # type: ignore[operator]


def _in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    # Forked from a server that has imported this module and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Unlike a pool of multiprocessing's own, this one raises if its process dies.
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _peak(call: Callable[[], object]) -> float:
    _, peak = with_peak(call, _CPU)
    if peak is None:
        raise UserError("peak memory is read from /proc, which only Linux has")
    return peak


def summarise(calls: Sequence[Summary]) -> Summary:
    """The results of `measure_calls`, and for each method the exponent of length with which its peak grows.

    Exponents are least-squares slopes on logs; `mean kept keys` is that of `mean_keys`. A method with a peak of 0, from
    a call too short for the system to see anything, has none.
    """
    exponents = {}
    for method in dict.fromkeys(each["method"] for each in calls):
        own = [each for each in calls if each["method"] == method]
        if len(own) > 1:
            if all(each["peak_mib"] > 0 for each in own):
                exponents[method] = _exponent(own, "peak_mib")
            if own[0]["mean_keys"] is not None:
                exponents["mean kept keys"] = _exponent(own, "mean_keys")
    return {"results": list(calls), "exponents": exponents}


def _exponent(calls: Sequence[Summary], quantity: str) -> float:
    lengths, values = ([each[name] for each in calls] for name in ("length", quantity))
    return round(float(log_slope(lengths, values)[0]), 3)


def memory_tables(summary: Summary) -> list[Table]:
    """The tables of single calls, of prefills and of full caches, those that were measured."""
    tables = (_call_table, summary["results"]), (_prefill_table, summary["prefill"])
    made = [table(summary) for table, results in tables if results]
    cached = summary.get("cached")  # earlier versions did not measure any
    return [*made, cache_table(cached)] if cached else made


def _call_table(summary: Summary) -> Table:
    lengths = sorted({each["length"] for each in summary["results"]})
    peaks = {(each["method"], each["length"]): f"{each['peak_mib']:.0f}" for each in summary["results"]}
    exponents = {method: f"{exponent:.2f}" for method, exponent in summary["exponents"].items()}
    return ["peak MiB above the inputs", *(f"n = {length:,}" for length in lengths), "grows as n to the"], [
        [method, *(peaks.get((method, length), "-") for length in lengths), exponents.get(method, "-")]
        for method in dict.fromkeys(each["method"] for each in summary["results"])
    ]


def _prefill_table(summary: Summary) -> Table:
    lengths = sorted({each["length"] for each in summary["prefill"]})
    found = {(each["method"], each["length"]): each for each in summary["prefill"]}

    def line(name: str, method: str, text: Callable[[Summary], str]) -> list[str]:
        return [name, *(text(found[method, length]) for length in lengths)]

    return ["prefill, peak MiB over model and cache", *(f"n = {length:,}" for length in lengths)], [
        *(line(method, method, lambda each: f"{each['peak_mib']:.0f}") for method in PREFILL_METHODS),
        *(line(f"{name} / {SDPA}", name, lambda each: ratio_text(each["ratio"])) for name in PREFILL_METHODS[1:]),
        line(f"{SPARSE}: density", SPARSE, lambda each: f"{each['density']:.3f}"),
    ]


def plot_memory(summary: Summary, path: Path) -> None:
    """Draw the peaks of single calls against length: dense attention, and every selector beside SDPA."""
    series: dict[str, list[Summary]] = {}
    for each in summary["results"]:
        series.setdefault(each["method"], []).append(each)
    drawing = figure(11, 4.8)
    panels = drawing.subplots(1, 2, sharey=True)
    dense = {method for method, own in series.items() if own[0]["mean_keys"] is None}
    for axes, title, methods in zip(panels, ("dense", "sparse"), (dense, series.keys() - dense | {SDPA}), strict=True):
        for method in sorted(methods, key=list(series).index):
            draw_method(axes, list(series), method, series[method], "peak_mib", summary["exponents"].get(method))
        axes.set_title(title)
        finish_panel(axes, {each["length"] for each in summary["results"]})
    seen = any(each["peak_mib"] > 0 for each in summary["results"])
    panels[0].set(yscale="log" if seen else "linear", ylabel="peak memory above the inputs, MiB")
    shape = summary["shape"]
    heads = f"{shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}"
    drawing.suptitle(f"One attention call, {heads}, {shape['dtype']}, CPU", fontsize=11)
    save(drawing, path)
