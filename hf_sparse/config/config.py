"""`SparseAttentionConfig`: everything that decides what a patched model attends to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Annotated, Any

from hf_sparse.call import AlwaysKept
from hf_sparse.engines import AUTO, ENGINES, Engine
from hf_sparse.laws import LAWS, Budget, Law, LawName
from hf_sparse.schema import CalibrationRecord, checks, custom
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
        selector: `"grouped"` (neighbouring queries keep the same past keys), `"topk"` (exact, for each query, and
            slow), `"window"` (sinks and the most recent keys), or a `Selector` of your own.
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

    alpha: checks.PositiveNumber = 16.0
    exponent: checks.Share = 0.5
    law: Annotated[LawName | Law, _check_law] = "power"
    keys: checks.PositiveCount | None = None
    fraction: Annotated[float, partial(checks.number, above=0.0, most=1.0)] | None = None
    min_keys: checks.PositiveCount = 128
    max_keys: checks.PositiveCount | None = None
    sink_keys: checks.Count = 4
    recent_keys: checks.Count = 64
    selector: Annotated[str | Selector, partial(_check_part, kind=Selector, names=SELECTORS)] = "grouped"
    engine: Annotated[str | Engine, partial(_check_part, kind=Engine, names=(AUTO, *ENGINES))] = AUTO
    dense_layers: Annotated[tuple[int, ...], _check_dense_layers] | None = None
    dense_below: checks.Count = DENSE_BELOW
    per_head: Annotated[Mapping[int, tuple[HeadLaw, ...]], _check_per_head] | None = field(default=None, hash=False)
    calibration: CalibrationRecord | None = field(default=None, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # Spellings of earlier releases, which published files have.
        if self.engine == "native":
            object.__setattr__(self, "engine", "cpu")
        if self.dense_below is None:
            object.__setattr__(self, "dense_below", DENSE_BELOW)
        checks.fields(self)
        if self.max_keys is not None and self.max_keys < self.min_keys:
            raise ValueError(f"max_keys must be at least min_keys ({self.min_keys}); got {self.max_keys}")
        for law, name in (("fixed", "keys"), ("fraction", "fraction")):
            if (self.law == law) != (getattr(self, name) is not None):
                raise ValueError(
                    f"{name} goes with law={law!r}, and with it alone; got law={self.law!r}, "
                    f"{name}={getattr(self, name)!r}"
                )
        if self.per_head is not None and self.law != "power":
            raise ValueError(f"per_head needs law='power'; got law={self.law!r}")
        if self.calibration is not None and not isinstance(self.calibration, CalibrationRecord):
            raise ValueError(f"calibration must be a CalibrationRecord or None; got {checks.shown(self.calibration)}")
        object.__setattr__(self, "extra", checks.extra("extra", self.extra, _KNOWN))

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
        out: dict[str, Any] = {name: checks.as_json(getattr(self, name)) for name in _KNOWN}
        out |= {name: custom.describe(part) for name, part in self.code.items()}
        # Left out where there is none: results measured without one are found again by their configuration.
        del out["calibration"]
        if self.calibration is not None:
            out["calibration"] = self.calibration.to_dict()
        return {"schema_version": SCHEMA_VERSION, **out, **self.extra}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparseAttentionConfig:
        """The inverse of `to_dict`. Unknown keys are kept in `extra`, with a warning; missing ones are defaulted."""
        given, extra = checks.split_unknown("config", data, _KNOWN, SCHEMA_VERSION)
        if given.get("calibration") is not None:
            given["calibration"] = CalibrationRecord.from_dict(given["calibration"])
        return cls(**given, extra=extra)


def _check_law(name: str, value: Any) -> Any:
    return value if callable(value) else checks.choice(name, value, allowed=LAWS)


def _check_part(name: str, value: Any, *, kind: type[Any], names: Collection[str]) -> Any:
    """Refuse what is neither one of the built-in `names` nor a part of a user's own with a name of its own."""
    if isinstance(value, str) and value in names:
        return value
    allowed = f"one of {', '.join(names)}, or a {kind.__name__} of your own"
    checks.require(isinstance(value, kind), name, value, allowed)
    named = isinstance(value.name, str) and value.name and value.name not in names
    checks.require(named, f"{name}: {type(value).__name__}.name", value.name, f"a name that no built-in {name} has")
    if isinstance(value, Selector):
        checks.integer(f"{name}: {type(value).__name__}.group_queries", value.group_queries, least=1)
    return value


def _check_dense_layers(name: str, value: Any) -> tuple[int, ...]:
    layers = checks.sequence(name, value, of="layer indices or None")
    return tuple(sorted({checks.integer(name, layer, least=0) for layer in layers}))


def _check_per_head(name: str, value: Any) -> dict[int, tuple[HeadLaw, ...]]:
    holds = isinstance(value, Mapping) and value
    checks.require(holds, name, value, "a mapping of layer indices to one (alpha, exponent) per head")
    return checks.layers(name, value, check=_check_laws)


def _check_laws(name: str, value: Any) -> tuple[HeadLaw, ...]:
    of = "one (alpha, exponent) per head, at least one"
    laws = checks.require(checks.sequence(name, value, of=of), name, value, of)
    return tuple(_check_law_of_head(f"{name}[{head}]", law) for head, law in enumerate(laws))


def _check_law_of_head(name: str, value: Any) -> HeadLaw:
    alpha, exponent = checks.sequence(name, value, of="(alpha, exponent)", length=2)
    checks.number(f"{name} alpha", alpha, above=0.0)
    checks.number(f"{name} exponent", exponent, least=0.0, most=1.0)
    return alpha, exponent


_KNOWN = tuple(f.name for f in fields(SparseAttentionConfig) if f.name != "extra")
