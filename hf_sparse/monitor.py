"""Counters of what every patched layer did, and the report made from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Numbers of kept keys that may wait for being added up.
_MOST_WAITING = 1 << 10


@dataclass
class LayerCounters:
    """What one layer did since it was patched. Pad rows do not count.

    Attributes:
        calls: Attention calls.
        rows: Query rows, over all sequences.
        visible: Visible keys, summed over the rows.
        heads: Query heads of the layer; 0 before any call.
        dense_rows: Rows that attended to every visible key, by reason.
        uncompiled: Calls whose keys PyTorch looked for and no compiled kernel, which is slow, by reason.
    """

    calls: int = 0
    rows: int = 0
    visible: int = 0
    heads: int = 0
    dense_rows: Counter[str] = field(default_factory=Counter)
    uncompiled: Counter[str] = field(default_factory=Counter)
    # Keys that all heads kept alike, and on the layer's device those that each of them kept. Reading the latter
    # would make a GPU wait, so that they are added up there and read for the report; and many together, for a sum of
    # few numbers takes a decoded token as much time as one of many.
    _kept_by_all: int = 0
    _kept: Tensor | None = None
    _parts: list[Tensor] = field(default_factory=list)
    _waiting: int = 0

    def count(
        self, rows: int, visible: int, heads: int, dense_rows: dict[str, int], kept: list[Tensor] | None = None
    ) -> None:
        """Add one call.

        Args:
            rows: Query rows that see a key.
            visible: Visible keys, summed over the rows.
            heads: Query heads of the layer.
            dense_rows: Reason -> rows that ran dense for it.
            kept: int64 `(batch, heads, rows)`, kept keys, in parts; `None` if all visible keys were.
        """
        self.calls += 1
        self.rows += rows
        self.visible += visible
        self.heads = heads
        if kept is None:
            self._kept_by_all += visible
        for part in kept or ():
            self._parts.append(part)
            self._waiting += part.numel()
        if self._waiting > _MOST_WAITING:
            self._add_up()
        for reason, number in dense_rows.items():
            if number:
                self.dense_rows[reason] += number

    def kept(self) -> list[int]:
        """Attended keys, summed over the rows, for each query head."""
        self._add_up()
        own = [0] * self.heads if self._kept is None else self._kept.tolist()
        return [number + self._kept_by_all for number in own]

    def _add_up(self) -> None:
        for part in self._parts:
            own = part.sum((0, 2))
            self._kept = own if self._kept is None else self._kept.to(own.device) + own
        self._parts.clear()
        self._waiting = 0


@dataclass(frozen=True)
class SparsityReport:
    """What a patched model did: `str()` is a table, one line per layer.

    Attributes:
        rows: One dictionary per layer and query head: `layer`, `head`, `calls`, `rows`, `visible` and
            `kept` (keys, summed over the rows), `mean_visible`, `mean_keys`, `density`, `dense_rows` (reason -> rows).
        density: Kept over visible keys, over all layers, dense ones included; in `[0, 1]`, NaN before any call.
        notes: What else cost time and could be avoided, a line each.
        audit: After `hf_sparse.audit(model)` one dictionary per sparse layer and query head: `layer`, `head`, `rows`
            (measured), `retained_mass`, `least_retained_mass` (softmax mass of the kept keys under dense attention:
            mean row, worst row), `output_error` and `largest_output_error` (norm of what the head's output is off,
            over the norm of its dense output, on the activations that the layer was given: errors of earlier layers
            are not in it).
    """

    rows: list[dict[str, Any]]
    density: float
    notes: tuple[str, ...] = ()
    audit: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        if math.isnan(self.density):
            return "\n".join(["nothing was attended to yet: there is no density", *self.notes])
        header = ("layer", "heads", "calls", "rows", "mean visible", "mean keys", "density", "dense rows")
        lines = [header]
        for layer in dict.fromkeys(row["layer"] for row in self.rows):
            heads = [row for row in self.rows if row["layer"] == layer]
            one = heads[0]
            keys = [row["mean_keys"] for row in heads]
            density = sum(row["density"] for row in heads) / len(heads)
            spread = f"{min(keys):.1f}" if max(keys) - min(keys) < 0.05 else f"{min(keys):.1f}-{max(keys):.1f}"
            reasons = ", ".join(f"{number} ({reason})" for reason, number in one["dense_rows"].items())
            lines.append(
                (
                    str(layer),
                    str(len(heads)),
                    str(one["calls"]),
                    str(one["rows"]),
                    f"{one['mean_visible']:.1f}",
                    spread,
                    f"{density:.3f}",
                    reasons or "-",
                )
            )
        whole = [*_aligned(lines), f"density {self.density:.3f} (kept / visible keys, all layers)"]
        return "\n".join([*whole, *self.notes, *self._audit_lines()])

    def _audit_lines(self) -> list[str]:
        if not self.audit:
            return []
        lines = [("layer", "rows audited", "retained mass", "worst row", "output error", "worst row")]
        for layer in dict.fromkeys(row["layer"] for row in self.audit):
            heads = [row for row in self.audit if row["layer"] == layer]
            mass, error = (sum(row[name] for row in heads) / len(heads) for name in ("retained_mass", "output_error"))
            least = min(row["least_retained_mass"] for row in heads)
            largest = max(row["largest_output_error"] for row in heads)
            lines.append(
                (str(layer), str(heads[0]["rows"]), f"{mass:.4f}", f"{least:.4f}", f"{error:.4f}", f"{largest:.4f}")
            )
        return ["", *_aligned(lines)]


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: its last column to the left, the others to the right."""
    last = len(lines[0]) - 1
    widths = [max(len(line[i]) for line in lines) for i in range(last + 1)]
    return [
        "  ".join(
            cell.ljust(width) if i == last else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def make_report(layers: dict[int, LayerCounters], notes: tuple[str, ...] = ()) -> SparsityReport:
    """The report of a model from the counters of its layers, and what else there is to say."""
    rows: list[dict[str, Any]] = []
    total_kept = total_visible = 0.0
    for layer, counters in sorted(layers.items()):
        for head, kept in enumerate(counters.kept()):
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "calls": counters.calls,
                    "rows": counters.rows,
                    "visible": counters.visible,
                    "kept": kept,
                    "mean_visible": counters.visible / max(1, counters.rows),
                    "mean_keys": kept / max(1, counters.rows),
                    "density": kept / max(1, counters.visible),
                    "dense_rows": dict(counters.dense_rows),
                }
            )
            total_kept += kept
            total_visible += counters.visible
    uncompiled = sum((counters.uncompiled for counters in layers.values()), Counter[str]())
    slower = tuple(
        f"{number} attention calls looked for keys without compiled kernels, which chooses alike and is slower than "
        f"dense attention ({reason})"
        for reason, number in uncompiled.items()
    )
    return SparsityReport(rows, total_kept / total_visible if total_visible else float("nan"), (*notes, *slower))
