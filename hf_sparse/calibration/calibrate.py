"""`calibrate`: a law for every head, fitted to what its error costs the model, and checked on texts held out."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.calibration.laws import LawFit
from hf_sparse.calibration.run import SHORTEST, Run, reached
from hf_sparse.calibration.solve import highest_price, law_config, mean_density
from hf_sparse.calibration.target import Target
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.evaluation.data import Document
from hf_sparse.evaluation.perplexity_summary import Summary
from hf_sparse.evaluation.results import write_json
from hf_sparse.evaluation.windows import cut_windows
from hf_sparse.patching import base_model, is_patched
from hf_sparse.record import CalibrationRecord, Interval
from hf_sparse.support import inspect

LONGEST = 8192
"""Tokens of each text that are used, if not said otherwise and the texts have them."""

PROBE_TOKENS = 2048
"""Most tokens of a text on which layers are made sparse one at a time."""

PROBED = 2
"""Documents on which that is done."""

# Prices that are tried where a target has to be measured: every trial is a run over the held-out texts.
_TRIALS = 5
_TRIAL_DENSITIES = (0.02, 0.7)


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        config: The calibrated configuration, with its record.
        target: What it was to reach.
        met: Whether it did, on the held-out texts where it had to be measured.
        price: Nats a token that a key had to be worth.
        density: Kept over visible keys of the layers with laws, at the target's length.
        predicted: Nats a token that the laws cost, as predicted from single layers.
        families: Cost of heads on documents left out of the fit, by shape of law (`LawFit.held_out`).
        check: Perplexities on the held-out texts: dense, calibrated, and one law for all heads at equal cost.
    """

    config: SparseAttentionConfig
    target: Target
    met: bool
    price: float
    density: float
    predicted: float
    families: dict[str, float]
    check: Summary

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for `json.dumps`."""
        return {**vars(self), "config": self.config.to_dict(), "target": str(self.target)}


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Document],
    target: Target | str = "density=0.15",
    **options: Any,
) -> SparseAttentionConfig:
    """Fit alpha and exponent of every head to a target, and check the result on texts held out.

    Args:
        model: A causal language model that `patch` takes, unpatched.
        tokenizer: Its tokenizer.
        texts: Texts, of which the last quarter is held out.
        target: What to reach: a `Target`, or a text such as `"density=0.15@4096"` or `"perplexity_ratio=1.01"`.
        **options: Keyword arguments of `hf_sparse.calibration.calibrate.run_calibration`.

    Returns:
        The configuration for `patch`. Its `calibration` holds intervals, the names of the texts and what was reached.

    Raises:
        ValueError: See `run_calibration`.
    """
    return run_calibration(model, tokenizer, texts, target, **options).config


def run_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Document],
    target: Target | str = "density=0.15",
    *,
    config: SparseAttentionConfig | None = None,
    held_out: Sequence[str | Document] | None = None,
    length: int | None = None,
    folder: Path | None = None,
    extrapolate: bool = False,
    seed: int = 0,
) -> Calibration:
    """Measure every head's error against its budget, spread the budget where it saves most, and check the result.

    The error is that of the selector which will run, on the model's own activations. What an error in a layer costs
    the model is measured by making each layer sparse alone. Measurements are kept in `folder` as they come, and not
    repeated by a later run, whatever its target.

    Args:
        model: A causal language model that `patch` takes, unpatched.
        tokenizer: Its tokenizer.
        texts: Texts to fit on; two at least.
        target: What to reach.
        config: Everything but the laws: selector, floors, sinks; the default if `None`.
        held_out: Texts to check on; the last quarter of `texts`, one at least, if `None`.
        length: Tokens of each text that are used; if `None` as many as all texts and the model have, up to `LONGEST`.
        folder: Where measurements and the result (`calibration.json`) go; nothing is kept if `None`.
        extrapolate: Accept a target at a greater length than laws are fitted on.
        seed: Seed of the bootstraps.

    Raises:
        ValueError: If the model cannot be patched or is patched, there are too few texts, one is too short, or the
            target lies beyond the fitted length and `extrapolate` is not set.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    base = base_model(model)
    if is_patched(base):
        raise ValueError(f"{type(base).__name__} is patched: call hf_sparse.unpatch(model) before calibrating it")
    support = inspect(base)
    if not support.supported:
        raise ValueError(str(support))
    fitted, checked = _split(texts, held_out)
    length = _length([*fitted, *checked], tokenizer, base) if length is None else length
    if length < 2 * SHORTEST:
        raise ValueError(f"laws are fitted on texts of at least {2 * SHORTEST} tokens; got {length}")
    at = target.length or length
    if at > length and not extrapolate:
        raise ValueError(
            f"the target {target} lies at {at / length:.3g} times the {length} tokens that laws are fitted on: give "
            "longer texts, or extrapolate=True for laws that were not measured there"
        )
    base_config = replace(config or SparseAttentionConfig(), per_head=None, calibration=None)
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(base, tokenizer, support, base_config, folder or Path(temporary), seed)
        curves = run.curves(cut_windows(fitted, tokenizer, [length], targets=1))
        probes = cut_windows(fitted[:PROBED], tokenizer, [min(length, PROBE_TOKENS)], targets=1)
        fit = LawFit(curves, run.sensitivity(probes, curves), base_config.min_keys)
        price = _price(fit, run, target, at, checked)
        made = law_config(fit, price, base_config, run.sliding)
        check = run.check(made, checked, at)
    ratio = reached(check)["ratio"]
    density = mean_density(made, run.layers, at)
    found = {"density": density, "output_error": fit.error_of(fit.choose(price)), "perplexity_ratio": ratio}[
        target.metric
    ]
    record = CalibrationRecord(
        model_type=base.config.model_type,
        architecture=support.architecture,
        layers=len(support.layers),
        heads={layer.layer: layer.heads for layer in support.layers},
        base_model=run.about["model"]["name"] or None,
        revision=run.about["model"]["revision"],
        selector=base_config.selector,
        documents=tuple(document.name for document in fitted),
        texts_sha256=hashlib.sha256("".join(document.sha256 for document in fitted).encode()).hexdigest(),
        held_out=tuple(document.name for document in checked),
        fitted_from=fit.shortest,
        fitted_to=fit.longest,
        target=target.metric,
        target_value=target.value,
        reached=found,
        reached_at=at,
        intervals=_intervals(fit, price, seed),
        versions=run.about["versions"],
    )
    result = Calibration(
        config=replace(made, calibration=record),
        target=target,
        met=found <= target.value,
        price=price,
        density=density,
        predicted=fit.risk_of(fit.choose(price)),
        families=fit.held_out(price),
        check=check,
    )
    if not result.met:
        warnings.warn(f"the target {target} was not reached: {found:.4g}", UserWarning, stacklevel=2)
    if folder is not None:
        write_json(folder / "calibration.json", result.to_dict())
    return result


def _price(fit: LawFit, run: Run, target: Target, length: int, checked: Sequence[Document]) -> float:
    """The price of a key at which the laws meet the target; where none does, that which comes nearest."""

    def density(price: float) -> float:
        return mean_density(law_config(fit, price, run.config, run.sliding), run.layers, length)

    def dear(wanted: float) -> float:
        """The lowest price at which no more than the share `wanted` of keys is kept."""
        return highest_price(lambda price: density(price) > wanted)

    match target.metric:
        case "density":
            # Bisection ends a hair on the denser side of a step.
            return dear(target.value) * (1 + 1e-9)
        case "output_error":
            return highest_price(lambda price: fit.error_of(fit.choose(price)) <= target.value)
        case _:
            limits = [dear(share) for share in reversed(_TRIAL_DENSITIES)]

            def holds(price: float) -> bool:
                made = law_config(fit, price, run.config, run.sliding)
                return bool(reached(run.check(made, checked, length))["ratio"] <= target.value)

            return highest_price(holds, (limits[0], limits[1]), _TRIALS)


def _split(
    texts: Sequence[str | Document], held_out: Sequence[str | Document] | None
) -> tuple[list[Document], list[Document]]:
    """Documents to fit on and to check on."""
    documents = [_document(text, "text", i) for i, text in enumerate(texts)]
    if held_out is None:
        count = max(1, len(documents) // 4)
        documents, checked = documents[:-count], documents[-count:]
    else:
        checked = [_document(text, "held-out text", i) for i, text in enumerate(held_out)]
    if len(documents) < 2 or not checked:
        raise ValueError(
            f"calibration takes two texts to fit on and one to check on; got {len(documents)} and {len(checked)}"
        )
    both = {d.sha256 for d in documents} & {d.sha256 for d in checked}
    if both or len({d.sha256 for d in documents}) < len(documents):
        raise ValueError("the texts to fit on and to check on must all be different texts")
    names = [document.name for document in (*documents, *checked)]
    if len(set(names)) < len(names):
        raise ValueError(f"texts must have different names; got {', '.join(names)}")
    return documents, checked


def _document(text: str | Document, kind: str, index: int) -> Document:
    return text if isinstance(text, Document) else Document(f"{kind} {index + 1}", text)


def _length(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    tokens = (len(tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"]) for d in documents)
    return min(LONGEST, limit, min(tokens) - 1)


def _intervals(fit: LawFit, price: float, seed: int) -> dict[int, tuple[Interval, ...]]:
    out: dict[int, tuple[Interval, ...]] = {}
    for (layer, _), interval in zip(fit.heads, fit.intervals(price, seed), strict=True):
        low, high, exponent_low, exponent_high = (float(f"{value:.4g}") for value in interval)
        out[layer] = (*out.get(layer, ()), (low, high, exponent_low, exponent_high))
    return out
