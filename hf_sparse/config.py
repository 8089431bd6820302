"""`SparseAttentionConfig`: everything that decides what a patched model attends to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hf_sparse import custom
from hf_sparse.call import AlwaysKept
from hf_sparse.checks import check_choice, check_extra, check_integer, check_number, shown, split_unknown
from hf_sparse.engines import AUTO, ENGINES, Engine
from hf_sparse.laws import LAWS, Budget, Law, LawName
from hf_sparse.record import CalibrationRecord
from hf_sparse.selectors import SELECTORS, Selector

SCHEMA_VERSION = 1

DENSE_BELOW = 256
"""The default of `dense_below`."""

HeadLaw = tuple[float, float]


@dataclass(frozen=True)
class SparseAttentionConfig:
    """What a query keeps: a budget law, the selector that spends it and the engine that attends to the result.

    Args:
        alpha: Factor of the `power` and `log` laws.
        exponent: C of the power law k(n) = alpha * n ** C, in `[0, 1]`.
        law: `"power"`, `"fixed"` (needs `keys`), `"fraction"` (needs `fraction`), `"log"`, or a function n -> k of your
            own: see `Budget`.
        keys: Keys that a query keeps under `law="fixed"`.
        fraction: Share of its visible keys that a query keeps under `law="fraction"`, in `(0, 1]`.
        min_keys: A query never keeps fewer keys than this (or all it sees).
        max_keys: A query never keeps more keys than this; `None` for no limit.
        sink_keys: First visible keys that are always kept, counted in the budget.
        recent_keys: Most recent visible keys that are always kept, counted in the budget. Where the budget is
            smaller than `sink_keys + recent_keys`, the recent keys go first.
        selector: `"grouped"` (neighbouring queries share candidate keys), `"topk"` (exact, for each query), `"window"`
            (sinks and the most recent keys), or a `Selector` of your own.
        engine: `"auto"` (the fastest that can take a call), `"cpu"` (compiled kernels; files of earlier releases say
            `"native"`), `"triton"` (kernels for GPUs), `"gather"` (any device), `"reference"` (dense, masked: the
            specification), or an `Engine` of your own.
        dense_layers: Indices of layers left dense. `None` means the first layer, where sparsity costs most, and
            every sliding-window layer, whose cost is bounded already.
        dense_below: A query that sees fewer keys than this keeps them all. `hf-sparse bench` prints the length from
            which sparse attention is faster on a machine.
        per_head: Calibrated laws: layer index -> one `(alpha, exponent)` for each query head; `None` for one law
            for all. Layers without an entry follow `alpha` and `exponent`. Only with `law="power"`.
        calibration: What `per_head` was fitted on; it changes no result.
        extra: Fields of a newer release, kept as they were read; they change no result.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    alpha: float = 8.0
    exponent: float = 0.5
    law: LawName | Law = "power"
    keys: int | None = None
    fraction: float | None = None
    min_keys: int = 128
    max_keys: int | None = None
    sink_keys: int = 4
    recent_keys: int = 64
    selector: str | Selector = "grouped"
    engine: str | Engine = AUTO
    dense_layers: tuple[int, ...] | None = None
    dense_below: int = DENSE_BELOW
    per_head: Mapping[int, tuple[HeadLaw, ...]] | None = field(default=None, hash=False)
    calibration: CalibrationRecord | None = field(default=None, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # Spellings of earlier releases, which published files have.
        if self.engine == "native":
            object.__setattr__(self, "engine", "cpu")
        if self.dense_below is None:
            object.__setattr__(self, "dense_below", DENSE_BELOW)
        if not callable(self.law):
            check_choice("law", self.law, LAWS)
        _check_part("selector", self.selector, Selector, SELECTORS)
        _check_part("engine", self.engine, Engine, (AUTO, *ENGINES))
        check_number("alpha", self.alpha, above=0.0)
        check_number("exponent", self.exponent, least=0.0, most=1.0)
        for name in ("min_keys", "max_keys", "keys"):
            if name == "min_keys" or getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        for name in ("sink_keys", "recent_keys", "dense_below"):
            check_integer(name, getattr(self, name), least=0)
        if self.max_keys is not None and self.max_keys < self.min_keys:
            raise ValueError(f"max_keys must be at least min_keys ({self.min_keys}); got {self.max_keys}")
        if self.fraction is not None:
            check_number("fraction", self.fraction, above=0.0, most=1.0)
        for law, name in (("fixed", "keys"), ("fraction", "fraction")):
            if (self.law == law) != (getattr(self, name) is not None):
                raise ValueError(
                    f"{name} goes with law={law!r}, and with it alone; got law={self.law!r}, "
                    f"{name}={getattr(self, name)!r}"
                )
        if self.dense_layers is not None:
            object.__setattr__(self, "dense_layers", _normalise_layers(self.dense_layers))
        if self.per_head is not None:
            if self.law != "power":
                raise ValueError(f"per_head needs law='power'; got law={self.law!r}")
            object.__setattr__(self, "per_head", _normalise_heads(self.per_head))
        if self.calibration is not None and not isinstance(self.calibration, CalibrationRecord):
            raise ValueError(f"calibration must be a CalibrationRecord or None; got {shown(self.calibration)}")
        object.__setattr__(self, "extra", check_extra("extra", self.extra, _KNOWN))

    @property
    def always(self) -> AlwaysKept:
        """The keys that every query keeps within its budget."""
        return AlwaysKept(self.sink_keys, self.recent_keys)

    @property
    def code(self) -> dict[str, Any]:
        """The fields that hold a user's own code, which no file can hold: name -> value."""
        parts = {name: getattr(self, name) for name in ("law", "selector", "engine")}
        return {name: part for name, part in parts.items() if not isinstance(part, str)}

    def budget(self, layer: int | None = None) -> Budget:
        """The budget of `layer`, or of a layer without a calibrated law when `layer` is `None`."""
        alpha: float | tuple[float, ...] = self.alpha
        exponent: float | tuple[float, ...] = self.exponent
        if self.per_head is not None and layer is not None and layer in self.per_head:
            laws = self.per_head[layer]
            alpha, exponent = tuple(a for a, _ in laws), tuple(c for _, c in laws)
        return Budget(
            law=self.law,
            alpha=alpha,
            exponent=exponent,
            keys=self.keys or 1,
            fraction=self.fraction or 1.0,
            min_keys=self.min_keys,
            max_keys=self.max_keys,
            dense_below=self.dense_below,
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes and `from_dict` gives back, unless parts of it are `code`."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        out |= {name: custom.describe(part) for name, part in self.code.items()}
        out["dense_layers"] = None if self.dense_layers is None else list(self.dense_layers)
        if self.per_head is not None:
            out["per_head"] = {str(layer): [list(law) for law in laws] for layer, laws in self.per_head.items()}
        # Left out where there is none: results measured without one are found again by their configuration.
        del out["calibration"]
        if self.calibration is not None:
            out["calibration"] = self.calibration.to_dict()
        return {"schema_version": SCHEMA_VERSION, **out, **self.extra}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparseAttentionConfig:
        """The inverse of `to_dict`. Unknown keys are kept in `extra`, with a warning; missing ones are defaulted."""
        extra = split_unknown("config", data, _KNOWN, SCHEMA_VERSION)
        given = {name: value for name, value in data.items() if name in _KNOWN}
        if given.get("calibration") is not None:
            given["calibration"] = CalibrationRecord.from_dict(given["calibration"])
        return cls(**given, extra=extra)


_KNOWN = frozenset(f.name for f in fields(SparseAttentionConfig)) - {"extra"}


def _check_part(name: str, value: Any, kind: type[Any], names: Iterable[str]) -> None:
    """Refuse what is neither one of the built-in `names` nor a part of a user's own with a name of its own."""
    names = tuple(names)
    if not isinstance(value, kind):
        allowed = ", ".join(names)
        if isinstance(value, str) and value in names:
            return
        raise ValueError(f"{name} must be one of {allowed}, or a {kind.__name__} of your own; got {shown(value)}")
    if not isinstance(value.name, str) or not value.name or value.name in names:
        raise ValueError(
            f"{name}: {type(value).__name__}.name must be a name that no built-in {name} has; got {shown(value.name)}"
        )
    if isinstance(value, Selector):
        check_integer(f"{name}: {type(value).__name__}.group_queries", value.group_queries, least=1)


def _normalise_layers(layers: Any) -> tuple[int, ...]:
    if isinstance(layers, str | bytes | Mapping) or not hasattr(layers, "__iter__"):
        raise ValueError(f"dense_layers must be layer indices or None; got {shown(layers)}")
    layers = tuple(layers)
    for layer in layers:
        check_integer("dense_layers", layer, least=0)
    return tuple(sorted(set(layers)))


def _normalise_heads(per_head: Any) -> dict[int, tuple[HeadLaw, ...]]:
    if not isinstance(per_head, Mapping) or not per_head:
        raise ValueError(f"per_head must map layer indices to one (alpha, exponent) per head; got {shown(per_head)}")
    out: dict[int, tuple[HeadLaw, ...]] = {}
    for layer, laws in per_head.items():
        try:
            index = int(layer) if isinstance(layer, str) else layer
            pairs = tuple((alpha, exponent) for alpha, exponent in laws)
        except (TypeError, ValueError):
            raise ValueError(
                f"per_head[{shown(layer)}] must be one (alpha, exponent) per head; got {shown(laws)}"
            ) from None
        check_integer("per_head layer", index, least=0)
        if not pairs:
            raise ValueError(f"per_head[{shown(layer)}] must hold at least one (alpha, exponent); got none")
        for head, (alpha, exponent) in enumerate(pairs):
            check_number(f"per_head[{shown(layer)}][{head}] alpha", alpha, above=0.0)
            check_number(f"per_head[{shown(layer)}][{head}] exponent", exponent, least=0.0, most=1.0)
        if index in out:
            raise ValueError(f"per_head names layer {index} twice")
        out[index] = pairs
    return out
