"""`CalibrationRecord`: what calibrated laws were fitted on, to which target, and with what confidence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Annotated, Any, Literal, get_args

from hf_sparse.schema import checks

Target = Literal["density", "output_error", "perplexity_ratio", "retrieval_loss"]
TARGETS: tuple[str, ...] = get_args(Target)

SCHEMA_VERSION = 1

Interval = tuple[float, float, float, float]


def _check_sha256(name: str, value: Any) -> Any:
    holds = value == "" or (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value))
    return checks.require(holds, name, value, "64 hexadecimal digits, or empty")


def _check_intervals(name: str, value: Any) -> tuple[Interval, ...]:
    out = checks.sequence(name, value, of="a list with one interval per head")
    return tuple(_check_interval(f"{name}[{head}]", interval) for head, interval in enumerate(out))


def _check_interval(name: str, value: Any) -> Interval:
    bounds = checks.sequence(name, value, of="(alpha low, alpha high, exponent low, exponent high)", length=4)
    alpha_low, alpha_high, exponent_low, exponent_high = bounds
    checks.number(f"{name} alpha low", alpha_low, least=0.0)
    checks.number(f"{name} alpha high", alpha_high, least=alpha_low)
    checks.number(f"{name} exponent low", exponent_low)
    checks.number(f"{name} exponent high", exponent_high, least=exponent_low)
    return alpha_low, alpha_high, exponent_low, exponent_high


_Heads = Annotated[Mapping[int, int], partial(checks.layers, check=partial(checks.integer, least=1))]
_Intervals = Annotated[Mapping[int, tuple[Interval, ...]], partial(checks.layers, check=_check_intervals)]


@dataclass(frozen=True)
class CalibrationRecord:
    """How the laws in `SparseAttentionConfig.per_head` came about. It decides nothing that a model computes.

    An empty text, a zero or `None` means: not said.

    Args:
        model_type: transformers' model type, such as `"llama"`.
        architecture: Class of the model, such as `"LlamaForCausalLM"`.
        layers: Number of attention layers.
        heads: Layer index -> query heads.
        base_model: Hub id, or name, of the model.
        revision: Its commit on the Hub.
        selector: The selector that spent the budgets.
        documents: Names of the texts that the laws were fitted on; no paths.
        texts_sha256: SHA-256 of those texts.
        held_out: Names of the texts that `reached` was measured on.
        fitted_from: Fewest visible keys of the queries that were fitted.
        fitted_to: Most visible keys of the queries that were fitted.
        target: What was aimed at, one of `TARGETS`.
        target_value: The value of it that was aimed at.
        reached: The value measured on the held-out texts.
        reached_at: Length in tokens at which it was measured.
        intervals: Layer index -> for each query head the 95 % interval of its law,
            `(alpha low, alpha high, exponent low, exponent high)`.
        versions: Package -> version that the calibration ran with.
        extra: Fields of a newer release, kept as they were read.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    model_type: checks.ShortText = ""
    architecture: checks.ShortText = ""
    layers: checks.Count = 0
    heads: _Heads = field(default_factory=dict)
    base_model: checks.GivenName | None = None
    revision: checks.GivenName | None = None
    selector: checks.ShortText = ""
    documents: checks.Names = ()
    texts_sha256: Annotated[str, _check_sha256] = ""
    held_out: checks.Names = ()
    fitted_from: checks.Count = 0
    fitted_to: checks.Count = 0
    target: Annotated[Target, partial(checks.choice, allowed=TARGETS)] = "density"
    target_value: checks.PositiveNumber = 1.0
    reached: Annotated[float, partial(checks.number, least=0.0)] | None = None
    reached_at: checks.PositiveCount | None = None
    intervals: _Intervals | None = None
    versions: checks.Versions = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.fitted_to < self.fitted_from:
            raise ValueError(f"fitted_to must be at least fitted_from ({self.fitted_from}); got {self.fitted_to}")
        if self.target == "density":
            checks.number("target_value", self.target_value, above=0.0, most=1.0)
        object.__setattr__(self, "extra", checks.extra("extra", self.extra, _KNOWN))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes and `from_dict` gives back."""
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: checks.as_json(getattr(self, name)) for name in _KNOWN},
            **self.extra,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CalibrationRecord:
        """The inverse of `to_dict`. Unknown keys are kept in `extra`, with a warning; missing ones are defaulted."""
        given, extra = checks.split_unknown("calibration", data, _KNOWN, SCHEMA_VERSION)
        return cls(**given, extra=extra)


_KNOWN = tuple(f.name for f in fields(CalibrationRecord) if f.name != "extra")
