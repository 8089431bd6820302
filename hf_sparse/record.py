"""`CalibrationRecord`: what calibrated laws were fitted on, to which target, and with what confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from hf_sparse.checks import (
    check_choice,
    check_extra,
    check_integer,
    check_mapping,
    check_name,
    check_names,
    check_number,
    check_text,
    check_versions,
    shown,
    split_unknown,
)

Target = Literal["density", "output_error", "perplexity_ratio"]
TARGETS: tuple[str, ...] = get_args(Target)

SCHEMA_VERSION = 1

Interval = tuple[float, float, float, float]


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
        target: What was aimed at: `"density"`, `"output_error"` or `"perplexity_ratio"`.
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

    model_type: str = ""
    architecture: str = ""
    layers: int = 0
    heads: Mapping[int, int] = field(default_factory=dict)
    base_model: str | None = None
    revision: str | None = None
    selector: str = ""
    documents: tuple[str, ...] = ()
    texts_sha256: str = ""
    held_out: tuple[str, ...] = ()
    fitted_from: int = 0
    fitted_to: int = 0
    target: Target = "density"
    target_value: float = 1.0
    reached: float | None = None
    reached_at: int | None = None
    intervals: Mapping[int, tuple[Interval, ...]] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model_type", "architecture", "selector"):
            check_text(name, getattr(self, name), longest=100)
        for name in ("base_model", "revision"):
            check_name(name, getattr(self, name), optional=True)
        for name in ("layers", "fitted_from", "fitted_to"):
            check_integer(name, getattr(self, name), least=0)
        if self.fitted_to < self.fitted_from:
            raise ValueError(f"fitted_to must be at least fitted_from ({self.fitted_from}); got {self.fitted_to}")
        _check_sha256("texts_sha256", self.texts_sha256)
        check_choice("target", self.target, TARGETS)
        check_number("target_value", self.target_value, above=0.0, most=1.0 if self.target == "density" else None)
        check_number("reached", self.reached, least=0.0, optional=True)
        check_integer("reached_at", self.reached_at, least=1, optional=True)
        made: dict[str, Any] = {name: check_names(name, getattr(self, name)) for name in ("documents", "held_out")}
        made["heads"] = _normalise_heads(self.heads)
        made["intervals"] = None if self.intervals is None else _normalise_intervals(self.intervals)
        made["versions"] = check_versions("versions", self.versions)
        made["extra"] = check_extra("extra", self.extra, _KNOWN)
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes and `from_dict` gives back."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        out["heads"] = {str(layer): heads for layer, heads in self.heads.items()}
        out["documents"], out["held_out"] = list(self.documents), list(self.held_out)
        if self.intervals is not None:
            out["intervals"] = {str(layer): [list(row) for row in rows] for layer, rows in self.intervals.items()}
        out["versions"] = dict(self.versions)
        return {"schema_version": SCHEMA_VERSION, **out, **self.extra}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CalibrationRecord:
        """The inverse of `to_dict`. Unknown keys are kept in `extra`, with a warning; missing ones are defaulted."""
        extra = split_unknown("calibration", data, _KNOWN, SCHEMA_VERSION)
        return cls(**{name: value for name, value in data.items() if name in _KNOWN}, extra=extra)


_KNOWN = frozenset(f.name for f in fields(CalibrationRecord)) - {"extra"}


def _check_sha256(name: str, value: Any) -> None:
    if not isinstance(value, str) or (value and (len(value) != 64 or set(value) - set("0123456789abcdef"))):
        raise ValueError(f"{name} must be 64 hexadecimal digits, or empty; got {shown(value)}")


def _by_layer(name: str, value: Any) -> dict[int, Any]:
    """`value` by layer index, whose keys JSON makes strings."""
    check_mapping(name, value)
    out: dict[int, Any] = {}
    for key, item in value.items():
        layer = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        check_integer(f"{name} layer", layer, least=0)
        if layer in out:
            raise ValueError(f"{name} must name each layer once; got layer {layer} twice")
        out[layer] = item
    return out


def _normalise_heads(heads: Any) -> dict[int, int]:
    out = _by_layer("heads", heads)
    for layer, count in out.items():
        check_integer(f"heads[{layer}]", count, least=1)
    return out


def _normalise_intervals(intervals: Any) -> dict[int, tuple[Interval, ...]]:
    out: dict[int, tuple[Interval, ...]] = {}
    for layer, rows in _by_layer("intervals", intervals).items():
        if isinstance(rows, str | Mapping) or not hasattr(rows, "__iter__"):
            raise ValueError(f"intervals[{layer}] must be a list with one interval per head; got {shown(rows)}")
        out[layer] = tuple(_interval(f"intervals[{layer}][{head}]", row) for head, row in enumerate(rows))
    return out


def _interval(name: str, row: Any) -> Interval:
    if isinstance(row, str | Mapping) or not hasattr(row, "__iter__") or len(tuple(row)) != 4:
        raise ValueError(f"{name} must be (alpha low, alpha high, exponent low, exponent high); got {shown(row)}")
    alpha_low, alpha_high, exponent_low, exponent_high = row
    check_number(f"{name} alpha low", alpha_low, least=0.0)
    check_number(f"{name} alpha high", alpha_high, least=alpha_low)
    check_number(f"{name} exponent low", exponent_low)
    check_number(f"{name} exponent high", exponent_high, least=exponent_low)
    return (alpha_low, alpha_high, exponent_low, exponent_high)
