"""What a calibration aims at."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import cast

from hf_sparse.errors import UserError
from hf_sparse.schema import TARGETS
from hf_sparse.schema import Target as Metric

_SPELLED = re.compile(r"\s*(?P<metric>\w+)\s*=\s*(?P<value>[0-9.eE+-]+)\s*(@\s*(?P<length>\d+)\s*)?")


@dataclass(frozen=True)
class Target:
    """A metric, the value it should have, and the input length in tokens at which it should have it.

    - `density`: kept over visible keys, over all queries of an input of `length` tokens and the layers with laws: all
      attention layers, or in a hybrid model those without a sliding window;
    - `output_error`: the squared error of a layer's output relative to that output, mean over layers with laws and
      over queries at all fitted lengths, as measured layer by layer on documents left out of the fit;
    - `perplexity_ratio`: perplexity over that of the dense model at `length` tokens. It is sought on as many
      documents of the fit as are held out, and what was reached is measured on those;
    - `retrieval_loss`: of the answers to questions about `length` tokens of text that the dense model picks among wrong
      ones, the share that is lost (`hf_sparse.calibration.answers`). It is sought on all documents of the fit, and
      measured on held-out ones.

    Args:
        metric: One of `TARGETS`.
        value: The aim; a density, an error or a share below 1, a ratio above 1.
        length: Tokens; `None` for the length of the texts that laws are fitted to.

    Raises:
        UserError: (a `ValueError`) naming the field, its value and what is allowed.
    """

    metric: Metric
    value: float
    length: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in TARGETS:
            raise UserError(f"target metric must be one of {', '.join(TARGETS)}; got {self.metric!r}")
        low, high = (1.0, math.inf) if self.metric == "perplexity_ratio" else (0.0, 1.0)
        if not low < self.value < high:
            raise UserError(f"target {self.metric} must be above {low:g} and below {high:g}; got {self.value!r}")
        if self.length is not None and self.length < 2:
            raise UserError(f"target length must be 2 tokens or more; got {self.length!r}")

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}" + ("" if self.length is None else f"@{self.length}")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `metric=value` or `metric=value@length`, such as `density=0.15@4096`."""
        found = _SPELLED.fullmatch(text)
        try:
            value = float(found["value"]) if found else math.nan
        except ValueError:
            value = math.nan
        if found is None or math.isnan(value):
            raise UserError(
                f"target must be METRIC=VALUE or METRIC=VALUE@LENGTH, as in density=0.15@4096; got {text!r}"
            )
        return cls(cast(Metric, found["metric"]), value, int(found["length"]) if found["length"] else None)
