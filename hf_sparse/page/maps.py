"""Maps with a coloured cell for each layer and head, or for each method and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.config import SparseAttentionConfig

# From little to much, as in matplotlib's "viridis": light and dark are told apart without colours, too.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class HeatMap:
    """Numbers in rows and columns, each shown as a colour.

    Attributes:
        title: What the numbers are.
        rows: Names of the rows.
        columns: Names of the columns.
        values: A list for each row; `None` where there is no number.
        low: Number of the darkest colour; the least one if `None`.
        high: Number of the lightest; the largest one if `None`.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float | None = None
    high: float | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """The numbers of the darkest and of the lightest colour."""
        known = [x for row in self.values for x in row if x is not None]
        low = min(known) if self.low is None else self.low
        return low, max(known) if self.high is None else self.high

    def colour(self, value: float | None) -> str:
        """A CSS colour for a number; none for `None`."""
        if value is None:
            return "transparent"
        low, high = self.limits
        place = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5
        index = min(int(place * (len(_COLOURS) - 1)), len(_COLOURS) - 2)
        share = place * (len(_COLOURS) - 1) - index
        mixed = (round(a + share * (b - a)) for a, b in zip(_COLOURS[index], _COLOURS[index + 1], strict=True))
        return f"rgb({','.join(map(str, mixed))})"


def laws_by_head(config: SparseAttentionConfig) -> list[HeatMap]:
    """Exponent and keys of each head's own law; nothing without such laws.

    Keys are those of a query at the length that the laws were fitted to, or at 8,192 tokens.
    """
    if not config.per_head:
        return []
    length = (config.calibration.fitted_to if config.calibration else None) or 8192
    layers = sorted(config.per_head)
    heads = max(len(config.per_head[layer]) for layer in layers)

    def by_head(number: Any) -> list[list[float | None]]:
        laws = [config.per_head[layer] for layer in layers] if config.per_head else []
        return [[number(*own[h]) if h < len(own) else None for h in range(heads)] for own in laws]

    names = [f"layer {layer}" for layer in layers], [f"head {head}" for head in range(heads)]
    kept = by_head(lambda alpha, exponent: min(length, max(config.min_keys, alpha * length**exponent)))
    return [
        HeatMap(f"keys kept of {length:,}", *names, kept, low=0),
        HeatMap("exponent of the law", *names, by_head(lambda _, exponent: exponent), low=0, high=1),
    ]


def mass_by_layer(summary: Mapping[str, Any]) -> list[HeatMap]:
    """Retained attention mass of each method and layer, from a summary of attention errors."""
    found = [each for each in summary["layers"] if "retained_mass_mean" in each]
    if not found:
        return []
    layers = sorted({each["layer"] for each in found})
    methods = list(dict.fromkeys(each["method"] for each in found))
    values = {(each["method"], each["layer"]): each["retained_mass_mean"] for each in found}
    title = f"retained attention mass at {found[0]['length']:,} tokens, mean query"
    numbers = [[values.get((method, layer)) for layer in layers] for method in methods]
    return [HeatMap(title, methods, [f"layer {layer}" for layer in layers], numbers, high=1)]
