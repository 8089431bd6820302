"""`calibrate`: a law for every head, fitted to what its error costs the model, and checked on texts held out."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.calibration.laws import LawFit
from hf_sparse.calibration.run import SHORTEST, Run, calibrated
from hf_sparse.calibration.solve import Solver
from hf_sparse.calibration.target import Target
from hf_sparse.calibration.texts import longest_input, most_tokens, split
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document
from hf_sparse.measure.perplexity_summary import Summary
from hf_sparse.measure.windows import cut_windows
from hf_sparse.patching import base_model, is_patched
from hf_sparse.policy import Policy
from hf_sparse.policy import files as policy_files
from hf_sparse.policy.origin import origin_of
from hf_sparse.record import CalibrationRecord, Interval
from hf_sparse.results import CALIBRATE, CALIBRATION, Row, check_folder, provenance, write_json
from hf_sparse.selectors import selector_name
from hf_sparse.share.source import ModelInfo, check_config
from hf_sparse.support import SupportReport, inspect

PROBE_TOKENS = 2048
"""Most tokens of a text on which layers are made sparse one at a time."""

PROBED = 2
"""Documents on which that is done."""

CHECKED_TOKENS = 512
"""Most tokens of each held-out document on which a calibration is checked."""


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        config: The calibrated configuration, with its record.
        target: What it was to reach.
        reached: The value of the target's metric that it reached; a perplexity is that of the held-out texts.
        met: Whether that is no more than what was to be reached.
        price: Nats a token that a key had to be worth.
        density: Kept over visible keys of the layers with laws, at the target's length.
        predicted: Nats a token that the laws cost, as predicted from single layers.
        families: Cost of a head on documents left out of the fit, by shape of law (`LawFit.held_out`).
        check: Perplexities on the held-out texts: dense, calibrated, and one law for all heads at equal cost.
    """

    config: SparseAttentionConfig
    target: Target
    reached: float
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
        A target that was not reached gives a warning.

    Raises:
        UserError: (a `ValueError`) see `run_calibration`.
    """
    result = run_calibration(model, tokenizer, texts, target, **options)
    if not result.met:
        warnings.warn(f"the target {result.target} was not reached: {result.reached:.4g}", UserWarning, stacklevel=2)
    return result.config


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
    info: ModelInfo | None = None,
) -> Calibration:
    """Measure every head's error against its budget, spread the budget where it saves most, and check the result.

    The error is that of the selector which will run, on the model's own activations. What an error in a layer costs
    the model is measured by making each layer sparse alone. Measurements are kept in `folder` as they come, and not
    repeated by a later run, whatever its target.

    Args:
        model: A causal language model that `patch` takes, unpatched.
        tokenizer: Its tokenizer.
        texts: Texts to fit laws to, two at least.
        target: What to reach.
        config: Everything but the laws: selector, floors, sinks, and layers to leave dense besides the sliding-window
            layers of a hybrid model; the default if `None`.
        held_out: Texts to check on; the last quarter of `texts`, one at least, if `None`.
        length: Tokens of each text that are used; if `None` as many as all texts and the model have, up to
            `hf_sparse.calibration.texts.LONGEST`.
        folder: Where measurements, `calibration.json` and `sparse_config.json` go; nothing is kept if `None`.
        extrapolate: Accept a target at a greater length than laws are fitted on.
        seed: Seed of the bootstraps.
        info: What identifies the model; what its configuration says if `None`.

    Raises:
        UserError: (a `ValueError`) if the model cannot be patched or is patched, there are too few texts, one is too
            short, `config` limits what laws can be or does not suit the model, the target lies beyond the fitted
            length and `extrapolate` is not set, or `folder` cannot be written to or holds something else.
        TypeError: if `texts` or `held_out` is not a list of texts.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    config = SparseAttentionConfig() if config is None else config
    if config.law != "power" or config.per_head is not None or config.max_keys is not None:
        raise UserError("laws are fitted from a configuration with law='power' and without per_head and max_keys")
    base = base_model(model)
    if is_patched(base):
        raise UserError(f"{type(base).__name__} is patched: call hf_sparse.unpatch(model) before calibrating it")
    support = inspect(base)
    if not support.supported:
        raise UserError(str(support))
    fitted, checked = split(texts, held_out)
    check_config(base, config)
    most, least = most_tokens(base, support), 2 * SHORTEST
    if most < least:
        raise UserError(f"laws are fitted to {least} tokens or more, above the maximum of this model, {most}")
    if length is None:
        length = longest_input([*fitted, *checked], tokenizer, base, support, least)
    at = target.length or length
    _check_lengths(target, length, at, most, extrapolate=extrapolate)
    # All windows first: a text that is too short is found before anything is measured.
    windows = cut_windows(fitted, tokenizer, [length], targets=1)
    probes = cut_windows(fitted[:PROBED], tokenizer, [min(length, PROBE_TOKENS)], targets=1)
    checks = cut_windows(checked, tokenizer, [at], min(CHECKED_TOKENS, at // 2))
    trials = []
    if target.metric == "perplexity_ratio":
        trials = cut_windows(fitted[: len(checked)], tokenizer, [at], min(CHECKED_TOKENS, at // 2))
    about = provenance((info or _info(base)).to_dict(), base, seed)
    if folder is not None:
        check_folder(folder, CALIBRATE, about["model"])
    with tempfile.TemporaryDirectory() as temporary, _evaluating(base):
        run = Run(base, support, config, folder or Path(temporary), about)
        curves = run.curves(windows)
        fit = LawFit(curves, run.sensitivity(probes, curves), config.min_keys, config.budget().dense_below)
        solver = Solver(fit, config, run.layers, run.dense)
        price = solver.price(target, at, lambda made: run.ratio(made, trials))
        made = solver.made(price)
        check = run.check(made, checks)
    density = solver.density(price, at)
    reached = {
        "density": density,
        "output_error": fit.held_out_error(price),
        "perplexity_ratio": calibrated(check)["ratio"],
    }[target.metric]
    record = _record(about, base, support, fit, target, fitted, checked)
    record = replace(
        record,
        selector=selector_name(config.selector),
        reached=reached,
        reached_at=at,
        intervals=_intervals(fit, price, seed, made),
    )
    result = Calibration(
        config=replace(made, calibration=record),
        target=target,
        reached=reached,
        met=reached <= target.value,
        price=price,
        density=density,
        predicted=fit.risk_of(fit.choose(price)),
        families=fit.held_out(price),
        check=check,
    )
    if folder is not None:
        write_json(folder / CALIBRATION, result.to_dict())
        origin = origin_of(base)
        name, commit = (None, None) if origin.is_local else (origin.name, origin.revision)
        policy = Policy(result.config, name, commit, versions=about["versions"])
        policy_files.write(policy, folder / policy_files.NAME)
    return result


def _check_lengths(target: Target, length: int, at: int, most: int, *, extrapolate: bool) -> None:
    if length < 2 * SHORTEST:
        raise UserError(f"length: laws are fitted to at least {2 * SHORTEST} tokens; got {length}")
    for what, tokens in ((f"length {length}", length), (f"the target {target}", at)):
        if tokens > most:
            raise UserError(
                f"{what} is above the maximum of this model, {most} tokens: no row sees more keys than are in its "
                "longest input, or its sliding window"
            )
    if at > length and not extrapolate:
        raise UserError(
            f"the target {target} lies at {at / length:.3g} times the {length} tokens that laws are fitted to: give "
            "longer texts, or ask for extrapolation, for laws that were not measured there"
        )


def _info(model: PreTrainedModel) -> ModelInfo:
    """What identifies a model that was handed over as an object; no path of the machine."""
    name = model.config.name_or_path or type(model).__name__
    return ModelInfo(
        Path(name).resolve().name if Path(name).exists() else name,
        getattr(model.config, "_commit_hash", None) or "unknown",
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        model.config.model_type,
    )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode: with dropout, no two runs measure the same."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)


def _record(
    about: Row,
    model: PreTrainedModel,
    support: SupportReport,
    fit: LawFit,
    target: Target,
    fitted: Sequence[Document],
    checked: Sequence[Document],
) -> CalibrationRecord:
    revision = about["model"]["revision"]
    return CalibrationRecord(
        model_type=model.config.model_type,
        architecture=support.architecture,
        layers=len(support.layers),
        heads={layer.layer: layer.heads for layer in support.layers},
        base_model=about["model"]["name"],
        revision=None if revision == "unknown" else revision,
        documents=tuple(document.name for document in fitted),
        texts_sha256=hashlib.sha256("".join(document.sha256 for document in fitted).encode()).hexdigest(),
        held_out=tuple(document.name for document in checked),
        fitted_from=fit.shortest,
        fitted_to=fit.longest,
        target=target.metric,
        target_value=target.value,
        versions=about["versions"],
    )


def _intervals(fit: LawFit, price: float, seed: int, made: SparseAttentionConfig) -> dict[int, tuple[Interval, ...]]:
    out: dict[int, tuple[Interval, ...]] = {}
    for (layer, _), interval in zip(fit.heads, fit.intervals(price, seed), strict=True):
        if layer in (made.per_head or {}):
            low, high, exponent_low, exponent_high = (float(f"{value:.4g}") for value in interval)
            out[layer] = (*out.get(layer, ()), (low, high, exponent_low, exponent_high))
    return out
