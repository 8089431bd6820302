"""The section of a model card that says what was patched and what was measured; nothing in it is estimated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from statistics import median

from hf_sparse.config import Policy, SparseAttentionConfig
from hf_sparse.schema import CalibrationRecord
from hf_sparse.share.card_tables import measured, names

BEGIN, END = "<!-- hf-sparse: begin -->", "<!-- hf-sparse: end -->"

_SHOWN_LENGTHS = (1024, 4096, 16384)
_SELECTORS = {
    "grouped": "64 neighbouring queries and the heads of a GQA group keep the same past keys, those with the largest "
    "attention weights summed over all of them",
    "topk": "the keys with the highest scores, exactly, for each query and head",
    "window": "the first and the most recent keys",
}
_TARGETS = {
    "density": "a density (kept / visible keys)",
    "output_error": "an error of a head's output",
    "perplexity_ratio": "a perplexity ratio to dense",
    "retrieval_loss": "a share of lost answers",
}


def section(policy: Policy, name: str, plots: Sequence[str] = (), license: str | None = None) -> str:
    """The section, between its markers: arguments as for `hf_sparse.share.card.make_card`."""
    base = "a model"
    if policy.base.is_on_hub:
        base = f"[{policy.base_model}](https://huggingface.co/{policy.base_model})"
        base += f" at revision `{policy.revision}`" if policy.revision else ""
    if policy.weights:
        holds = f"the weights of {base} and a policy, `sparse_config.json`"
        loads, plain = "", " Plain `AutoModelForCausalLM` opens the same weights with dense attention."
    else:
        holds = f"a policy, `sparse_config.json`, for {base}, and no weights"
        pinned = " at that revision" if policy.revision else ""
        loads, plain = f"It loads the base model{pinned} and patches it. ", ""
    quoted = json.dumps(name, ensure_ascii=False)
    paragraphs = "\n\n".join([*_law(policy.config), *measured(policy.quality, plots)])
    return f"""{BEGIN}

## Sparse attention

This repository holds {holds}. Under the policy, a query that sees n keys attends to the k(n) that matter most instead \
of all n ([arXiv 2404.02690](https://arxiv.org/abs/2404.02690)). No weight is changed.

The weights are under the licence of the base model{f": `{license}`" if license else ""}.

### Load

```python
import hf_sparse

model = hf_sparse.from_pretrained({quoted})
```

{loads}`hf_sparse.patch(model, {quoted})` patches a model that is loaded already.{plain}

{paragraphs}

{END}
"""


def _law(config: SparseAttentionConfig) -> Iterator[str]:
    yield "### The law"
    formula = {
        "power": f"k(n) = ceil({config.alpha:.4g} · n^{config.exponent:.4g})",
        "fixed": f"k(n) = {config.keys}",
        "fraction": f"k(n) = ceil({config.fraction} · n)",
        "log": f"k(n) = ceil({config.alpha:.4g} · ln n)",
    }[str(config.law)]
    clamp = f"at least {config.min_keys}" + (f", at most {config.max_keys:,}" if config.max_keys else "")
    if config.per_head is None:
        table = config.budget().table(max(_SHOWN_LENGTHS))
        budgets = ", ".join(f"{int(table[n]):,} of {n:,}" for n in _SHOWN_LENGTHS)
        yield f"`{formula}`, {clamp} and never more than n: {budgets}."
    else:
        yield f"Calibrated, `k(n) = ceil(alpha · n^C)` with {_spread(config)}; {clamp} and never more than n."
    if config.calibration is not None:
        yield _calibration(config.calibration)
    if config.dense_layers is None:
        dense = "The first layer and sliding-window layers stay dense."
    else:
        named = ", ".join(map(str, config.dense_layers))
        dense = f"Layers that stay dense: {named or 'none'}."
    if below := config.dense_below:
        dense += f" Queries that see fewer than {below:,} keys stay dense."
    yield f"Selector `{config.selector}`: {_SELECTORS[str(config.selector)]}. {dense}"


def _spread(config: SparseAttentionConfig) -> str:
    laws = [law for heads in (config.per_head or {}).values() for law in heads]
    alphas, exponents = ([law[i] for law in laws] for i in (0, 1))
    return (
        f"alpha from {min(alphas):.3g} to {max(alphas):.3g} (median {median(alphas):.3g}) and C from "
        f"{min(exponents):.3g} to {max(exponents):.3g} (median {median(exponents):.3g}) over the {len(laws)} heads of "
        f"{len(config.per_head or {})} layers"
    )


def _calibration(record: CalibrationRecord) -> str:
    made_for = f", for the {record.layers} attention layers of `{record.architecture}`," if record.layers else ""
    out = f"The calibration{made_for} aimed at {_TARGETS[record.target]} of {record.target_value:.4g}"
    if record.reached is not None:
        at = f" at {record.reached_at:,} tokens" if record.reached_at else ""
        out += f" and reached {record.reached:.4g}{at} on held-out texts"
    if record.documents:
        out += f". It was fitted on {names(record.documents)}"
    if record.held_out:
        out += f"; held out: {names(record.held_out)}"
    if record.fitted_to:
        out += (
            f". The queries that were fitted see {record.fitted_from:,} to {record.fitted_to:,} keys; beyond, the laws "
            "are extrapolated"
        )
    return out + "."
