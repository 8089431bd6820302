"""What was measured, as the paragraphs of a model card, and where it loses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from hf_sparse.results import markdown_table
from hf_sparse.schema import DENSE, QualityRecord
from hf_sparse.share import card_retrieval

_PERPLEXITIES = {
    "decoded_perplexity": "**Perplexity in decoding**, as `generate` writes: the context is read in one pass, and the "
    "predicted tokens one at a time. The ratio is sparse / dense with its 95 % bootstrap interval; density is kept / "
    "visible keys over all layers, for these tokens, all of which see the whole context.",
    "perplexity": "**Perplexity in one pass**: the predicted tokens are read together with their context, the same "
    "tokens at each length; the ratio is sparse / dense with its 95 % bootstrap interval, density is kept / visible "
    "keys over all layers.",
}
_OTHERS = " These are not the tokens of the table above."
_ERRORS = [(metric, statistic) for metric in ("lost_mass", "output_error") for statistic in ("mean", "worst")]
_SPEEDUP = "-speedup"
_COMPARED = ("dense", "sparse", "ratio", "95 % interval")
_TIMES = {
    "decode-seconds": "decode of one layer, n cached keys",
    "prefill-seconds": "prefill of one layer, n tokens",
    "cached-token": "a token of the whole model, n tokens cached",
    "generate-first_token": "the first token of the whole model, after a prompt of n",
    "generate-token": "a further token of the whole model, after a prompt of n",
    "padded-first_token": "the first token of the whole model, after a padded prompt of n",
    "padded-token": "a further token of the whole model, after a padded prompt of n",
}


def measured(records: Sequence[QualityRecord], plots: Sequence[str]) -> Iterator[str]:
    """Headings, tables and images, for the records of one policy and the paths of plots beside the card."""
    yield "### Measured"
    if not records:
        yield "Nothing was measured with this configuration yet."
        return
    where: dict[tuple[str, str, str, tuple[str, ...]], dict[str, None]] = {}
    for record in records:
        if record.documents:
            what = "attention error" if (record.metric, record.statistic) in _ERRORS else "perplexity"
            what = "retrieval" if card_retrieval.is_retrieval(record) else what
            where.setdefault((record.model, record.dtype, record.device, record.documents), {})[what] = None
    for (model, dtype, device, documents), measures in where.items():
        stored = ", dequantised" if model.endswith(".gguf") else ""
        what = names(list(measures)).capitalize()
        yield f"{what}: weights `{model}`{stored}, {dtype} on {device}; texts: {names(documents)}."
    for kind, paragraphs, caption in (
        ("perplexity", _perplexity(records), "Perplexity ratio, perplexity and density against context length"),
        ("attention-error", _attention_error(records), "Attention error against visible keys"),
        ("retrieval", card_retrieval.tables(records), "Retrieval by task and length"),
        ("bench", _speed(records), "Time against length"),
    ):
        if found := list(paragraphs):
            yield from found
            yield from (f"![{caption}]({path})" for path in plots if re.match(f"{kind}(-[^/]*)?/", path))
    yield "### Where it loses"
    yield "\n".join(f"- {line}" for line in losses(records))


def _perplexity(records: Sequence[QualityRecord]) -> Iterator[str]:
    dense: dict[int, float] = {}
    for metric, text in _PERPLEXITIES.items():
        own = {record.length: record.value for record in records if (record.metric, record.method) == (metric, DENSE)}
        others = any(dense.get(length, value) != value for length, value in own.items())
        dense |= own
        if ratios := _ratios(records, metric):
            lines = _comparison(records, metric, ratios, value=".2f", ratio=".4f")
            densities = [_cell(record.density, ".3f") for record in ratios]
            lines = [[*line, density] for line, density in zip(lines, densities, strict=True)]
            yield text + (_OTHERS if others else "")
            yield markdown_table(["context length", *_COMPARED, "density"], lines, left=())


def _attention_error(records: Sequence[QualityRecord]) -> Iterator[str]:
    found = {(record.metric, record.statistic, record.length): record for record in records}
    lines = []
    for metric, statistic, length in found:
        if (metric, statistic) == _ERRORS[0]:
            errors = [found.get((*error, length)) for error in _ERRORS]
            cells = ["-" if error is None else f"{error.value:.4f}" for error in errors]
            lines.append([f"{length:,}", *cells, _cell(found[metric, statistic, length].density, ".3f")])
    if lines:
        yield (
            "**Attention error** on the dense model's own activations, all layers and heads, the mean and the worst "
            "1 % of the queries: lost mass is the share of a query's attention that falls on keys not kept, output "
            "error that of a head's output relative to its norm. Density is that of the measured queries, with no "
            "layer left dense."
        )
        header = ["context length", "lost mass", "worst 1 %", "output error", "worst 1 %", "density"]
        yield markdown_table(header, lines, left=())


def _speed(records: Sequence[QualityRecord]) -> Iterator[str]:
    for metric, ratios in _speedups(records).items():
        first = ratios[0]
        lines = _comparison(records, metric, ratios, value=".3g", ratio=".2f")
        yield (
            f"**Speed**, {_TIMES.get(metric, metric)}: median seconds in the same run on {first.device} "
            f"(`{first.model}`, {first.dtype}); the ratio is dense / sparse, above 1 where sparse is faster."
        )
        yield markdown_table(["length", *_COMPARED], lines, left=())


def _comparison(
    records: Sequence[QualityRecord], metric: str, ratios: Sequence[QualityRecord], *, value: str, ratio: str
) -> list[list[str]]:
    """A line for each of `ratios`: its length, `metric` dense and sparse, and the ratio, in these formats."""
    values = {(record.metric, record.method == DENSE, record.length): record.value for record in records}
    return [
        [
            f"{record.length:,}",
            *(_cell(values.get((metric, dense, record.length)), value) for dense in (True, False)),
            f"{record.value:{ratio}}",
            _interval(record, ratio),
        ]
        for record in ratios
    ]


def losses(records: Sequence[QualityRecord]) -> Iterator[str]:
    """Where dense attention, or a fixed budget, was measured to be better, and what was not measured: one line each."""
    for metric in _PERPLEXITIES:
        yield from _perplexity_losses(metric, _ratios(records, metric))
    fixed = [record for record in records if record.metric == "ratio_to_fixed"]
    if fixed:
        what = "A fixed number of keys at equal cost is better, beyond what resampling explains,"
        yield _lengths(what, fixed, _surely_above_one)
    if not any((record.metric, record.statistic) in _ERRORS for record in records):
        yield "Attention error was not measured."
    yield from card_retrieval.losses(records)
    found = _speedups(records)
    for metric, own in found.items():
        yield _lengths(f"Slower than dense ({_TIMES.get(metric, metric)})", own, lambda record: record.value < 1)
    if not found:
        yield "Speed was not measured."


def _perplexity_losses(metric: str, ratios: Sequence[QualityRecord]) -> Iterator[str]:
    decoding = " in decoding" if metric != "perplexity" else ""
    if not ratios:
        yield f"Perplexity{decoding} was not measured."
        return
    worst = max(ratios, key=lambda record: record.value)
    yield (
        f"Perplexity{decoding} against dense is worst at {worst.length:,} tokens, with a ratio of {worst.value:.4f} "
        f"({_interval(worst, '.4f')})."
    )
    yield _lengths(f"Dense is better{decoding}, beyond what resampling explains,", ratios, _surely_above_one)
    longest = max(record.length for record in ratios)
    yield f"Perplexity{decoding} was measured up to {longest:,} tokens, and not beyond."


def _ratios(records: Sequence[QualityRecord], metric: str) -> list[QualityRecord]:
    return [record for record in records if record.metric == f"{metric}_ratio"]


def _speedups(records: Sequence[QualityRecord]) -> dict[str, list[QualityRecord]]:
    """Kind of time -> its ratios to dense."""
    out: dict[str, list[QualityRecord]] = {}
    for record in records:
        if record.metric.endswith(_SPEEDUP):
            out.setdefault(record.metric.removesuffix(_SPEEDUP), []).append(record)
    return out


def _surely_above_one(record: QualityRecord) -> bool:
    return (record.low or 0) > 1


def _lengths(what: str, records: Sequence[QualityRecord], holds: Callable[[QualityRecord], bool]) -> str:
    lengths = [f"{record.length:,}" for record in records if holds(record)]
    return f"{what} at {names(lengths)} tokens." if lengths else f"{what} at no length that was measured."


def _interval(record: QualityRecord, form: str) -> str:
    return "-" if record.low is None or record.high is None else f"{record.low:{form}} to {record.high:{form}}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def names(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "not named"
