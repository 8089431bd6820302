"""What was measured, as the paragraphs of a model card, and where it loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hf_sparse.policy.quality import QualityRow

_PERPLEXITIES = {
    "perplexity": "**Perplexity** of the same tokens, dense and sparse, after contexts of each length; the ratio is "
    "sparse / dense with its 95 % bootstrap interval, density is kept / visible keys over all layers.",
    "decoded_perplexity": "**Perplexity in decoding**: the same, with the context read in one pass and the predicted "
    "tokens one at a time; density is that of these rows, all of which see the whole context.",
}
_TIMES = {
    "decode-seconds": "decode of one layer, n cached keys",
    "prefill-seconds": "prefill of one layer, n rows",
    "cached-token": "a token of the whole model, n tokens cached",
    "generate-first_token": "the first token of the whole model, after a prompt of n",
    "generate-token": "a further token of the whole model, after a prompt of n",
    "padded-first_token": "the first token of the whole model, after a padded prompt of n",
    "padded-token": "a further token of the whole model, after a padded prompt of n",
}


def measured(rows: Sequence[QualityRow], plots: Sequence[str]) -> Iterator[str]:
    """Headings, tables and images.

    Args:
        rows: Of one policy.
        plots: Paths of images beside the card.
    """
    yield "### Measured"
    if not rows:
        yield "Nothing was measured with this configuration yet."
        return
    where: dict[tuple[str, str, str, tuple[str, ...]], dict[str, None]] = {}
    for row in rows:
        if row.documents:
            what = "attention error" if row.metric in ("lost_mass", "output_error") else "perplexity"
            where.setdefault((row.model, row.dtype, row.device, row.documents), {})[what] = None
    for (model, dtype, device, documents), measures in where.items():
        stored = ", dequantised" if model.endswith(".gguf") else ""
        what = names(list(measures)).capitalize()
        yield f"{what}: weights `{model}`{stored}, {dtype} on {device}; texts: {names(documents)}."
    yield from _perplexity(rows, plots)
    yield from _attention_error(rows, plots)
    yield from _speed(rows, plots)
    yield "### Where it loses"
    yield "\n".join(f"- {line}" for line in losses(rows))


def _perplexity(rows: Sequence[QualityRow], plots: Sequence[str]) -> Iterator[str]:
    found = {metric: [row for row in rows if row.metric == f"{metric}_ratio"] for metric in _PERPLEXITIES}
    for metric, ratios in found.items():
        if ratios:
            yield _PERPLEXITIES[metric]
            yield _perplexity_table(rows, metric, ratios)
    if any(found.values()):
        yield from _images(plots, "perplexity/", "Perplexity ratio, perplexity and density against context length")


def _perplexity_table(rows: Sequence[QualityRow], metric: str, ratios: Sequence[QualityRow]) -> str:
    dense = {row.length: row.value for row in rows if row.metric == metric and row.method == "dense"}
    own = {row.length: row.value for row in rows if row.metric == metric and row.method != "dense"}
    return _table(
        ["context length", "dense", "sparse", "ratio", "95 % interval", "density"],
        [
            [
                f"{row.length:,}",
                _cell(dense.get(row.length), "{:.2f}"),
                _cell(own.get(row.length), "{:.2f}"),
                f"{row.value:.4f}",
                _interval(row, "{:.4f}"),
                _cell(row.density, "{:.3f}"),
            ]
            for row in ratios
        ],
    )


def _attention_error(rows: Sequence[QualityRow], plots: Sequence[str]) -> Iterator[str]:
    cells = {(row.metric, row.statistic, row.length): row for row in rows}
    lengths = [row.length for row in rows if row.metric == "lost_mass" and row.statistic == "mean"]
    if not lengths:
        return
    yield (
        "**Attention error** on the dense model's own activations, all layers and heads, the mean row and the worst "
        "1 % of rows: lost mass is the share of a row's attention that falls on keys not kept, output error that of a "
        "head's output relative to its norm. Density is that of the measured rows, with no layer left dense."
    )
    columns = [(metric, statistic) for metric in ("lost_mass", "output_error") for statistic in ("mean", "worst")]
    header = ["context length", "lost mass", "worst 1 %", "output error", "worst 1 %", "density"]
    body = []
    for length in lengths:
        found = [cells.get((metric, statistic, length)) for metric, statistic in columns]
        body.append([f"{length:,}", *("-" if row is None else f"{row.value:.4f}" for row in found)])
        body[-1].append(_cell(cells["lost_mass", "mean", length].density, "{:.3f}"))
    yield _table(header, body)
    yield from _images(plots, "attention-error/", "Attention error against visible keys")


def _speed(rows: Sequence[QualityRow], plots: Sequence[str]) -> Iterator[str]:
    found = {(row.metric, row.method == "dense", row.length): row for row in rows}
    speedups = [row for row in rows if row.metric.endswith("-speedup")]
    for metric in dict.fromkeys(row.metric for row in speedups):
        own = [row for row in speedups if row.metric == metric]
        what = metric.removesuffix("-speedup")
        first = own[0]
        yield (
            f"**Speed**, {_TIMES.get(what, what)}: median seconds in the same run on {first.device} (`{first.model}`, "
            f"{first.dtype}); the ratio is dense / sparse, above 1 where sparse is faster."
        )
        body = []
        for row in own:
            times = (found.get((what, dense, row.length)) for dense in (True, False))
            seconds = ("-" if time is None else f"{time.value:.3g}" for time in times)
            body.append([f"{row.length:,}", *seconds, f"{row.value:.2f}", _interval(row, "{:.2f}")])
        yield _table(["length", "dense", "sparse", "ratio", "95 % interval"], body)
    if speedups:
        yield from _images(plots, "bench/", "Time against length")


def losses(rows: Sequence[QualityRow]) -> Iterator[str]:
    """Where dense attention, or a fixed budget, was measured to be better, and what was not measured: one line each."""
    for metric in _PERPLEXITIES:
        yield from _perplexity_losses(metric, [row for row in rows if row.metric == f"{metric}_ratio"])
    fixed = [row for row in rows if row.metric == "ratio_to_fixed"]
    if fixed:
        yield _lengths(
            "A fixed number of keys at equal cost is better, beyond what resampling explains,",
            fixed,
            lambda row: (row.low or 0) > 1,
        )
    if not any(row.metric == "lost_mass" for row in rows):
        yield "Attention error was not measured."
    speedups = [row for row in rows if row.metric.endswith("-speedup")]
    for metric in dict.fromkeys(row.metric for row in speedups):
        what = metric.removesuffix("-speedup")
        slower = [row for row in speedups if row.metric == metric]
        yield _lengths(f"Slower than dense ({_TIMES.get(what, what)})", slower, lambda row: row.value < 1)
    if not speedups:
        yield "Speed was not measured."


def _perplexity_losses(metric: str, ratios: Sequence[QualityRow]) -> Iterator[str]:
    decoding = " in decoding" if metric != "perplexity" else ""
    if not ratios:
        yield f"Perplexity{decoding} was not measured."
        return
    worst = max(ratios, key=lambda row: row.value)
    yield (
        f"Perplexity{decoding} against dense is worst at {worst.length:,} tokens, with a ratio of {worst.value:.4f} "
        f"({_interval(worst, '{:.4f}')})."
    )
    what = f"Dense is better{decoding}, beyond what resampling explains,"
    yield _lengths(what, ratios, lambda row: (row.low or 0) > 1)
    longest = max(row.length for row in ratios)
    yield f"Perplexity{decoding} was measured up to {longest:,} tokens; what happens beyond is not known."


def _lengths(what: str, rows: Sequence[QualityRow], holds: Callable[[QualityRow], bool]) -> str:
    lengths = [f"{row.length:,}" for row in rows if holds(row)]
    return f"{what} at {names(lengths)} tokens." if lengths else f"{what} at no length that was measured."


def _images(plots: Sequence[str], folder: str, text: str) -> Iterator[str]:
    return (f"![{text}]({path})" for path in plots if path.startswith(folder))


def _interval(row: QualityRow, form: str) -> str:
    if row.low is None or row.high is None:
        return "-"
    return f"{form.format(row.low)} to {form.format(row.high)}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---:"] * len(header), *rows])


def names(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "not named"
