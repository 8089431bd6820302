"""`QualityRecord`: one measured figure, as a policy carries it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from hf_sparse.schema import checks

DENSE = "dense"
"""The method of a record that was measured with dense attention."""


@dataclass(frozen=True)
class QualityRecord:
    """One figure that was measured with the policy's configuration, or with the dense model beside it.

    `None` and an empty text mean: not said.

    Args:
        metric: What `value` is, such as `"perplexity"`, `"perplexity_ratio"` (sparse / dense on the same tokens),
            either of these after `"decoded_"` (the targets read one at a time), `"ratio_to_fixed"` (sparse / a fixed
            number of keys at equal cost), `"lost_mass"`, `"output_error"`, `"retrieval_picked"` or `"retrieval_found"`
            (shares of answers, also after `"decoded_"`) with `"retrieval_picked_above_dense"` and so on (over all
            lengths up to `length`), or a time such as `"generate-token"` in seconds with its
            `"generate-token-speedup"` (dense / sparse).
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

    metric: Annotated[str, _check_identifier] = "perplexity_ratio"
    method: checks.ShortText = ""
    statistic: Annotated[str, _check_identifier] = "mean"
    length: checks.Count = 0
    value: checks.Number = 0.0
    low: checks.Number | None = None
    high: checks.Number | None = None
    density: checks.Share | None = None
    tokens: checks.Count | None = None
    documents: checks.Names = ()
    model: checks.Name = ""
    dtype: checks.ShortText = ""
    device: checks.ShortText = ""

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low must be at most high ({self.high!r}); got {checks.shown(self.low)}")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes and `from_dict` gives back; fields that are not said are left out."""
        out = {name: checks.as_json(getattr(self, name)) for name in _KNOWN}
        return {name: value for name, value in out.items() if value not in (None, "", [])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QualityRecord:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a field that does not exist, or a wrong value.
        """
        unknown = sorted(set(checks.mapping("quality record", data)) - set(_KNOWN))
        if unknown:
            raise ValueError(f"fields must be among {', '.join(_KNOWN)}; got {', '.join(unknown)}")
        return cls(**data)


def _check_identifier(name: str, value: Any) -> Any:
    holds = isinstance(value, str) and re.fullmatch("[a-z][a-z0-9_-]{0,63}", value)
    return checks.require(holds, name, value, "a name of lower-case letters, digits, - and _")


_KNOWN = tuple(f.name for f in fields(QualityRecord))
