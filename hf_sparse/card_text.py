"""The section of a model card that says what was patched and what was measured; nothing in it is estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.policy import Policy
from hf_sparse.quality import QualityRow
from hf_sparse.record import CalibrationRecord

BEGIN, END = "<!-- hf-sparse: begin -->", "<!-- hf-sparse: end -->"

_SHOWN_LENGTHS = (1024, 4096, 16384)
_SELECTORS = {
    "grouped": "64 neighbouring rows and the heads of a GQA group share their keys, found by a coarse look at blocks "
    "and exact scores inside the best ones",
    "topk": "the keys with the highest scores, exactly, for each row and head",
    "window": "the first and the most recent keys",
}
_TARGETS = {
    "density": "a density (kept / visible keys)",
    "output_error": "an error of a head's output",
    "perplexity_ratio": "a perplexity ratio to dense",
}


def section(policy: Policy, name: str, plots: Sequence[str] = (), license: str | None = None) -> str:
    """The section, between its markers.

    Args:
        policy: What it is about.
        name: What `from_pretrained` is to be given.
        plots: Paths of images beside the card.
        license: Licence of the base model, if it is known.
    """
    parts = [
        BEGIN,
        *_introduction(policy, license),
        *_how_to_load(policy, name),
        *_law(policy.config),
        *_quality(policy.quality, plots),
        END,
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(policy: Policy, license: str | None) -> Iterator[str]:
    base = "a model"
    if policy.base_model is not None and not policy.base_is_local:
        base = f"[{policy.base_model}](https://huggingface.co/{policy.base_model})"
        base += f" at revision `{policy.revision}`" if policy.revision else ""
    yield "## Sparse attention"
    holds = "a policy, `sparse_config.json`"
    holds = f"the weights of {base} and {holds}" if policy.weights else f"{holds}, for {base}, and no weights"
    yield (
        f"This repository holds {holds}. Under the policy, a row of attention "
        "that sees n keys reads the k(n) that matter most instead of all n "
        "([arXiv 2404.02690](https://arxiv.org/abs/2404.02690)). No weight is changed."
    )
    yield "The weights are under the licence of the base model" + (f": `{license}`." if license else ".")


def _how_to_load(policy: Policy, name: str) -> Iterator[str]:
    yield "### Load"
    yield f'```python\nimport hf_sparse\n\nmodel = hf_sparse.from_pretrained("{name}")\n```'
    patch = f'`hf_sparse.patch(model, "{name}")` patches a model that is loaded already.'
    if policy.weights:
        yield f"{patch} Plain `AutoModelForCausalLM` opens the same weights with dense attention."
    else:
        yield f"It loads the base model{' at that revision' if policy.revision else ''} and patches it. {patch}"


def _law(config: SparseAttentionConfig) -> Iterator[str]:
    yield "### The law"
    formula = {
        "power": f"k(n) = ceil({config.alpha:.4g} · n^{config.exponent:.4g})",
        "fixed": f"k(n) = {config.keys}",
        "fraction": f"k(n) = ceil({config.fraction} · n)",
        "log": f"k(n) = ceil({config.alpha:.4g} · ln n)",
    }[config.law]
    clamp = f"at least {config.min_keys}" + (f", at most {config.max_keys:,}" if config.max_keys else "")
    if config.per_head is None:
        yield f"`{formula}`, {clamp} and never more than n: {_budgets(config)}."
    else:
        yield f"Calibrated, `k(n) = ceil(alpha · n^C)` with {_spread(config)}; {clamp} and never more than n."
    if config.calibration is not None:
        yield _calibration(config.calibration)
    if config.dense_layers is None:
        dense = "The first layer and sliding-window layers stay dense."
    else:
        named = ", ".join(map(str, config.dense_layers))
        dense = f"Layers that stay dense: {named or 'none'}."
    if config.dense_below:
        dense += f" Rows that see fewer than {config.dense_below:,} keys stay dense."
    yield f"Selector `{config.selector}`: {_SELECTORS[config.selector]}. {dense}"


def _budgets(config: SparseAttentionConfig) -> str:
    budget = config.budget()
    table = budget.table(max(_SHOWN_LENGTHS))
    return ", ".join(f"{int(table[n]):,} of {n:,}" for n in _SHOWN_LENGTHS)


def _spread(config: SparseAttentionConfig) -> str:
    laws = [law for heads in (config.per_head or {}).values() for law in heads]
    alphas, exponents = ([law[i] for law in laws] for i in (0, 1))
    return (
        f"alpha from {min(alphas):.3g} to {max(alphas):.3g} (median {median(alphas):.3g}) and C from "
        f"{min(exponents):.3g} to {max(exponents):.3g} (median {median(exponents):.3g}) over the {len(laws)} heads of "
        f"{len(config.per_head or {})} layers"
    )


def _calibration(record: CalibrationRecord) -> str:
    out = f"The calibration aimed at {_TARGETS[record.target]} of {record.target_value:.4g}"
    if record.reached is not None:
        at = f" at {record.reached_at:,} tokens" if record.reached_at else ""
        out += f" and reached {record.reached:.4g}{at} on held-out texts"
    if record.documents:
        out += f". It was fitted on {_names(record.documents)}"
    if record.held_out:
        out += f"; held out: {_names(record.held_out)}"
    if record.fitted_to:
        out += (
            f". The rows that were fitted see {record.fitted_from:,} to {record.fitted_to:,} keys; beyond, nothing is "
            "known"
        )
    return out + "."


def _quality(rows: Sequence[QualityRow], plots: Sequence[str]) -> Iterator[str]:
    yield "### Measured"
    if not rows:
        yield "Nothing was measured with this configuration yet."
        return
    for model, dtype, device, documents in dict.fromkeys(
        (row.model, row.dtype, row.device, row.documents) for row in rows
    ):
        stored = ", dequantised" if model.endswith(".gguf") else ""
        yield f"Weights `{model}`{stored}, {dtype} on {device}; texts: {_names(documents)}."
    yield from _perplexity(rows, plots)
    yield from _attention_error(rows, plots)
    yield "### Where it loses"
    yield "\n".join(f"- {line}" for line in losses(rows))


def _perplexity(rows: Sequence[QualityRow], plots: Sequence[str]) -> Iterator[str]:
    ratios = [row for row in rows if row.metric == "perplexity_ratio"]
    if not ratios:
        return
    dense = {row.length: row.value for row in rows if row.metric == "perplexity" and row.method == "dense"}
    own = {row.length: row.value for row in rows if row.metric == "perplexity" and row.method != "dense"}
    yield (
        "**Perplexity** of the same tokens, dense and sparse, after contexts of each length; the ratio is sparse / "
        "dense with its 95 % bootstrap interval, density is kept / visible keys over all layers."
    )
    yield _table(
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
    yield from _images(plots, "perplexity/", "Perplexity ratio, perplexity and density against context length")


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


def losses(rows: Sequence[QualityRow]) -> Iterator[str]:
    """Where dense attention, or a fixed budget, was measured to be better, and what was not measured: one line each."""
    ratios = [row for row in rows if row.metric == "perplexity_ratio"]
    if ratios:
        worst = max(ratios, key=lambda row: row.value)
        yield (
            f"Perplexity against dense is worst at {worst.length:,} tokens, with a ratio of {worst.value:.4f} "
            f"({_interval(worst, '{:.4f}')})."
        )
        yield _lengths("Dense is better, beyond what resampling explains,", ratios, lambda row: (row.low or 0) > 1)
        longest = max(row.length for row in ratios)
        yield f"Perplexity was measured up to {longest:,} tokens; what happens beyond is not known."
    else:
        yield "Perplexity was not measured."
    fixed = [row for row in rows if row.metric == "ratio_to_fixed"]
    if fixed:
        yield _lengths(
            "A fixed number of keys at equal cost is better, beyond what resampling explains,",
            fixed,
            lambda row: (row.low or 0) > 1,
        )
    if not any(row.metric == "lost_mass" for row in rows):
        yield "Attention error was not measured."
    if not any(row.metric == "seconds" for row in rows):
        yield "Speed was not measured."


def _lengths(what: str, rows: Sequence[QualityRow], holds: Callable[[QualityRow], bool]) -> str:
    lengths = [f"{row.length:,}" for row in rows if holds(row)]
    return f"{what} at {_names(lengths)} tokens." if lengths else f"{what} at no length that was measured."


def _images(plots: Sequence[str], folder: str, text: str) -> Iterator[str]:
    return (f"![{text}]({path})" for path in plots if path.startswith(folder))


def _interval(row: QualityRow, form: str) -> str:
    if row.low is None or row.high is None:
        return "-"
    return f"{form.format(row.low)} to {form.format(row.high)}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _names(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "not named"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---:"] * len(header), *rows])
