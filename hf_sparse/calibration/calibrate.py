"""`calibrate`: a law for every head, fitted to what its error costs the model, and checked on held-out texts."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.calibration.answers import ask
from hf_sparse.calibration.laws import LawFit
from hf_sparse.calibration.lookups import with_lookups
from hf_sparse.calibration.measurements import Measurements, calibrated_ratio
from hf_sparse.calibration.solve import Solver
from hf_sparse.calibration.target import Target
from hf_sparse.calibration.texts import fitted_length, split
from hf_sparse.config import Policy, SparseAttentionConfig, origin_of
from hf_sparse.config import files as policy_files
from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document
from hf_sparse.measure.retrieval_prompts import Prompt
from hf_sparse.measure.windows import Window, cut_windows
from hf_sparse.patching import base_model, inspect, is_patched
from hf_sparse.results import CALIBRATE, CALIBRATION, Summary, check_folder, provenance, write_json
from hf_sparse.schema import CalibrationRecord
from hf_sparse.selectors import selector_name
from hf_sparse.share.source import check_config, describe

PROBE_TOKENS = 2048
"""Most tokens of a text on which layers are made sparse one at a time."""

PROBED = 2
"""Documents on which that is done."""

CHECKED_TOKENS = 512
"""Most predicted tokens of each held-out document."""


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        config: The calibrated configuration, with its record.
        target: What it was to reach.
        reached: The value of the target's metric that it reached; perplexities and answers are those of the held-out
            texts.
        met: Whether that is at most the value of the target.
        price: Nats a token that a key had to save.
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_dict`."""
        config, target = SparseAttentionConfig.from_dict(data["config"]), Target.parse(data["target"])
        return cls(**{**data, "config": config, "target": target})


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Document],
    target: Target | str = "density=0.15",
    **options: Any,
) -> SparseAttentionConfig:
    """Fit alpha and exponent of every head to a target, and check the result on held-out texts.

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
    lookups: bool = False,
    folder: Path | None = None,
    extrapolate: bool = False,
    seed: int = 0,
    info: Mapping[str, Any] | None = None,
) -> Calibration:
    """Measure every head's error against its budget, spread the budget where it saves most, and check the result.

    The error is that of the selector which will run, on the model's own activations. What an error in a layer costs
    the model is measured by making each layer sparse alone. Measurements are kept in `folder` as they come; a later
    run reuses them, whatever its target.

    Args:
        model: A causal language model that `patch` takes, unpatched.
        tokenizer: Its tokenizer.
        texts: Texts to fit laws to, two at least.
        target: What to reach.
        config: Everything but the laws: selector, `min_keys`, sinks, and layers to leave dense besides the
            sliding-window layers of a hybrid model; the default if `None`.
        held_out: Texts to check on; the last quarter of `texts`, one at least, if `None`.
        length: Tokens of each text that are used; if `None` as many as all texts and the model have, up to
            `hf_sparse.calibration.texts.LONGEST`.
        lookups: Fit to each text once more with notes in it that are repeated later (`with_lookups`), so that heads
            that look things up get the keys for it.
        folder: Where measurements, `calibration.json` and `sparse_config.json` go; nothing is kept if `None`. No
            `sparse_config.json` is written where `config` holds code, a selector or an engine of your own, and one of
            an earlier run is removed.
        extrapolate: Accept a target at a greater length than laws are fitted on.
        seed: Seed of the bootstraps.
        info: `ModelSource.info()` of the model for the results; from its configuration if `None`.

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
    length = fitted_length(target, length, [*fitted, *checked], tokenizer, base, support, extrapolate=extrapolate)
    at = target.length or length
    prose = fitted
    if lookups:
        # In pairs: layers are probed on a text with look-ups, too.
        pairs = zip(fitted, with_lookups(fitted, seed), strict=True)
        fitted = [document for pair in pairs for document in pair]
    # All windows first: a text that is too short is found before anything is measured.
    windows = cut_windows(fitted, tokenizer, [length], targets=1)
    probes = cut_windows(fitted[:PROBED], tokenizer, [min(length, PROBE_TOKENS)], targets=1)
    checks = cut_windows(checked, tokenizer, [at], min(CHECKED_TOKENS, at // 2))
    trials: Sequence[Window] = []
    questions: Sequence[Sequence[Prompt]] = []
    if target.metric == "perplexity_ratio":
        trials = cut_windows(prose[: len(checked)], tokenizer, [at], min(CHECKED_TOKENS, at // 2))
    elif target.metric == "retrieval_loss":
        # About all texts: laws that lose no answer about one kind of text may lose some about another.
        questions = [ask(documents, tokenizer, at, seed) for documents in (prose, checked)]
    about = provenance(info or _info(base), base, seed)
    if folder is not None:
        check_folder(folder, CALIBRATE, about["model"])
    with tempfile.TemporaryDirectory() as temporary, _evaluating(base):
        measured = Measurements(base, support, config, folder or Path(temporary), about)
        for asked in questions:
            measured.check_answers(asked, tokenizer)
        curves = measured.curves(windows)
        fit = LawFit(curves, measured.sensitivity(probes, curves), config.min_keys, config.budget().dense_below)
        solver = Solver(fit, config, measured.layers, measured.dense)

        def trial(config: SparseAttentionConfig) -> float:
            if questions:
                return measured.lost_answers(config, questions[0], tokenizer)
            return measured.ratio(config, trials)

        price = solver.price(target, at, trial)
        found = solver.config_at(price)
        check = measured.check(found, checks)
        reached = {
            "density": lambda: solver.density(price, at),
            "output_error": lambda: fit.held_out_error(price),
            "perplexity_ratio": lambda: calibrated_ratio(check),
            "retrieval_loss": lambda: measured.lost_answers(found, questions[1], tokenizer),
        }[target.metric]()
    intervals = fit.by_layer(fit.intervals(price, seed))
    revision = about["model"]["revision"]
    record = CalibrationRecord(
        model_type=base.config.model_type,
        architecture=support.architecture,
        layers=len(support.layers),
        heads={layer.layer: layer.heads for layer in support.layers},
        base_model=about["model"]["name"],
        revision=None if revision == "unknown" else revision,
        selector=selector_name(config.selector),
        documents=tuple(document.name for document in fitted),
        texts_sha256=hashlib.sha256("".join(document.sha256 for document in fitted).encode()).hexdigest(),
        held_out=tuple(document.name for document in checked),
        fitted_from=fit.shortest,
        fitted_to=fit.longest,
        target=target.metric,
        target_value=target.value,
        reached=reached,
        reached_at=at,
        intervals={layer: own for layer, own in intervals.items() if layer in (found.per_head or {})},
        versions=about["versions"],
    )
    result = Calibration(
        config=replace(found, calibration=record),
        target=target,
        reached=reached,
        met=reached <= target.value,
        price=price,
        density=solver.density(price, at),
        predicted=fit.risk_of(fit.choose(price)),
        families=fit.held_out(price),
        check=check,
    )
    if folder is not None:
        write_json(folder / CALIBRATION, result.to_dict())
    if folder is not None and config.code:
        # No file can hold it, and one of an earlier run says something else.
        (folder / policy_files.NAME).unlink(missing_ok=True)
    elif folder is not None:
        origin = origin_of(base)
        name, commit = (None, None) if origin.is_local else (origin.name, origin.revision)
        policy = Policy(result.config, name, commit, versions=about["versions"])
        policy_files.write(policy, folder / policy_files.NAME)
    return result


def _info(model: PreTrainedModel) -> dict[str, Any]:
    """Name and revision of a model in memory; no path of the machine."""
    name = model.config.name_or_path or type(model).__name__
    shown = Path(name).resolve().name if Path(name).exists() else name
    return describe(shown, getattr(model.config, "_commit_hash", None), model.config)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode: dropout would make every measurement random."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)
