"""`QualityRecord`: one measured figure, as a policy carries it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_sparse.checks import check_integer, check_mapping, check_name, check_names, check_number, check_text, shown

DENSE = "dense"
"""The method of a record that was measured with dense attention."""

_METRIC = re.compile(r"[a-z][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class QualityRecord:
    """One figure that was measured with the policy's configuration, or with the dense model beside it.

    `None` and an empty text mean: not said.

    Args:
        metric: What `value` is, such as `"perplexity"`, `"perplexity_ratio"` (sparse / dense on the same tokens),
            either of these after `"decoded_"` (the targets read one at a time), `"ratio_to_fixed"` (sparse / a fixed
            number of keys at equal cost), `"lost_mass"`, `"output_error"`, or a time such as `"generate-token"` in
            seconds with its `"generate-token-speedup"` (dense / sparse).
        method: `"dense"`, or the selector of the policy.
        statistic: Over the queries: `"mean"`, or `"worst"` (mean of the worst 1 %).
        length: Context length in tokens.
        value: The figure.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        density: Kept / visible keys, over all layers that were measured.
        tokens: How many predicted tokens, or queries, went into it.
        documents: Names of the texts.
        model: Name of the weights that were measured: a Hub id or a file name, no path.
        dtype: Type of the weights during the measurement.
        device: Kind of device, `"cpu"` or `"cuda"`, or its name where times were measured.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    metric: str = "perplexity_ratio"
    method: str = ""
    statistic: str = "mean"
    length: int = 0
    value: float = 0.0
    low: float | None = None
    high: float | None = None
    density: float | None = None
    tokens: int | None = None
    documents: tuple[str, ...] = ()
    model: str = ""
    dtype: str = ""
    device: str = ""

    def __post_init__(self) -> None:
        for name in ("metric", "statistic"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _METRIC.fullmatch(value):
                raise ValueError(f"{name} must be a name of lower-case letters, digits, - and _; got {shown(value)}")
        for name in ("method", "dtype", "device"):
            check_text(name, getattr(self, name), longest=100)
        check_name("model", self.model)
        check_integer("length", self.length, least=0)
        check_number("value", self.value)
        check_number("low", self.low, optional=True)
        check_number("high", self.high, optional=True)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low must be at most high ({self.high!r}); got {shown(self.low)}")
        check_number("density", self.density, least=0.0, most=1.0, optional=True)
        check_integer("tokens", self.tokens, least=0, optional=True)
        object.__setattr__(self, "documents", check_names("documents", self.documents))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes and `from_dict` gives back; fields that are not said are left out."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["documents"] = list(self.documents)
        return {name: value for name, value in out.items() if value not in (None, "", [])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QualityRecord:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a field that does not exist, or a wrong value.
        """
        check_mapping("quality record", data)
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"fields must be among {', '.join(known)}; got {', '.join(unknown)}")
        return cls(**data)
