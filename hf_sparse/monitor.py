"""Counters of what every patched layer did, and the report made from them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from threading import RLock
from typing import Any

from torch import Tensor

from hf_sparse.results import text_table

# Numbers of kept keys that may wait for being added up.
_MOST_WAITING = 1 << 10

# Several threads may run one model. One lock for all counters, which are copied and pickled; no thread of a process
# that forks holds it meanwhile.
_counting = RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_counting.acquire, after_in_parent=_counting.release, after_in_child=_counting.release)


@dataclass
class LayerCounters:
    """What one layer did since it was patched. Pad tokens do not count.

    Attributes:
        calls: Attention calls.
        queries: Query positions, over all sequences.
        visible: Visible keys, summed over the queries.
        heads: Query heads of the layer; 0 before any call.
        dense_queries: Queries that attended to every visible key, by reason.
        slow: Calls that took longer than they need to, by what they did.
    """

    calls: int = 0
    queries: int = 0
    visible: int = 0
    heads: int = 0
    dense_queries: Counter[str] = field(default_factory=Counter)
    slow: Counter[str] = field(default_factory=Counter)
    # Keys that all heads kept alike, and on the layer's device those that each of them kept. Reading the latter
    # would make a GPU wait, so that they are added up there and read for the report; and many together, for a sum of
    # few numbers takes a decoded token as much time as one of many.
    _kept_by_all: int = 0
    _kept: Tensor | None = None
    _parts: list[Tensor] = field(default_factory=list)
    _waiting: int = 0

    def count(
        self,
        queries: int,
        visible: int,
        heads: int,
        dense_queries: Mapping[str, int],
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        """Add one call.

        Args:
            queries: Queries that see a key.
            visible: Visible keys, summed over the queries.
            heads: Query heads of the layer.
            dense_queries: Reason -> queries that ran dense for it.
            kept: int64 `(batch, heads or 1, q_len)`, kept keys, in parts; `None` if all visible keys were.
        """
        with _counting:
            self.calls += 1
            self.queries += queries
            self.visible += visible
            self.heads = heads
            if kept is None:
                self._kept_by_all += visible
            for part in kept or ():
                self._parts.append(part)
                self._waiting += part.numel()
            if self._waiting > _MOST_WAITING:
                self._add_up()
            for reason, number in dense_queries.items():
                if number:
                    self.dense_queries[reason] += number

    def kept(self) -> list[int]:
        """Attended keys, summed over the queries, for each query head."""
        with _counting:
            self._add_up()
        own = [0] * self.heads if self._kept is None else self._kept.expand(self.heads).tolist()
        return [number + self._kept_by_all for number in own]

    def _add_up(self) -> None:
        for part in self._parts:
            own = part.sum((0, 2))
            self._kept = own if self._kept is None else self._kept.to(own.device) + own
        self._parts.clear()
        self._waiting = 0


@dataclass
class DraftCounters:
    """What `hf_sparse.generate_lossless` did with a model since it was patched. First tokens of a text do not count.

    Attributes:
        drafted: Tokens that were drafted.
        accepted: Those that dense decoding chose as well.
        checks: Dense passes over a draft.
        checked: Tokens that these passes added: those accepted, and one of their own unless the text was finished.
        plain: Tokens that were decoded densely, one by one.
        draft_seconds: Time of drafts.
        check_seconds: Time of their checks.
        plain_seconds: Time of plain tokens.
    """

    drafted: int = 0
    accepted: int = 0
    checks: int = 0
    checked: int = 0
    plain: int = 0
    draft_seconds: float = 0.0
    check_seconds: float = 0.0
    plain_seconds: float = 0.0

    def count(self, drafted: int, accepted: int, added: int, draft: float, check: float) -> None:
        """Add one draft with the dense pass that checks it, or one plain token if nothing was `drafted`."""
        if drafted:
            self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
            self.checks, self.checked = self.checks + 1, self.checked + added
            self.draft_seconds, self.check_seconds = self.draft_seconds + draft, self.check_seconds + check
        else:
            self.plain, self.plain_seconds = self.plain + added, self.plain_seconds + check

    def lines(self) -> list[str]:
        """What a report says about it."""
        tokens = self.checked + self.plain
        if not tokens:
            return []
        seconds = self.draft_seconds + self.check_seconds + self.plain_seconds
        parts = [f"lossless: {tokens} tokens, {1000 * seconds / tokens:.3g} ms each"]
        if self.checks:
            parts.append(
                f"{self.checks} checks accepted {self.accepted} of {self.drafted} drafted tokens and added "
                f"{self.checked / self.checks:.2f} tokens each (a drafted token {self._ms('draft', self.drafted)}, a "
                f"check {self._ms('check', self.checks)})"
            )
        if self.plain:
            parts.append(f"{self.plain} tokens without a draft ({self._ms('plain', self.plain)} each)")
        return ["; ".join(parts)]

    def _ms(self, kind: str, number: int) -> str:
        return f"{1000 * getattr(self, f'{kind}_seconds') / number:.3g} ms"


@dataclass(frozen=True)
class SparsityReport:
    """What a patched model did: `str()` is a table, one line for all layers that did the same.

    Attributes:
        rows: One dictionary per layer and query head: `layer`, `head`, `calls`, `rows` (queries), `visible` and `kept`
            (keys, summed over the queries), `mean_visible`, `mean_keys`, `density` (kept / visible), `dense_rows`
            (reason -> queries).
        density: Kept over visible keys, over all layers, dense ones included; in `[0, 1]`, NaN before any call.
        notes: What else cost time and could be avoided, a line each.
        audit: After `hf_sparse.audit(model)` one dictionary per sparse layer and query head: `layer`, `head`, `rows`
            (queries measured), `retained_mass`, `least_retained_mass` (softmax mass of the kept keys under dense
            attention: mean query, worst query), `output_error` and `largest_output_error` (norm of what the head's
            output is off, over the norm of its dense output, on the activations that the layer was given: errors of
            earlier layers are not in it).
        drafts: What `hf_sparse.generate_lossless` drafted, accepted and took.
    """

    rows: list[dict[str, Any]]
    density: float
    notes: tuple[str, ...] = ()
    audit: list[dict[str, Any]] = field(default_factory=list)
    drafts: DraftCounters = field(default_factory=DraftCounters)

    def __str__(self) -> str:
        if math.isnan(self.density):
            return "\n".join(["nothing was attended to yet: there is no density", *self.notes])
        header = ("layers", "heads", "calls", "queries", "mean visible", "mean keys", "density", "dense queries")
        lines = _folded((layer, _line(list(heads))) for layer, heads in groupby(self.rows, lambda row: row["layer"]))
        whole = [
            text_table(header, lines, left=(len(header) - 1,)),
            f"density {self.density:.3f} (kept / visible keys, all layers)",
        ]
        return "\n".join([*whole, *self.drafts.lines(), *self.notes, *self._audit_lines()])

    def _audit_lines(self) -> list[str]:
        if not self.audit:
            return []
        lines = [("layer", "queries audited", "retained mass", "worst query", "output error", "worst query")]
        for layer, found in groupby(self.audit, lambda row: row["layer"]):
            heads = list(found)
            mass, error = (sum(row[name] for row in heads) / len(heads) for name in ("retained_mass", "output_error"))
            least = min(row["least_retained_mass"] for row in heads)
            largest = max(row["largest_output_error"] for row in heads)
            lines.append(
                (str(layer), str(heads[0]["rows"]), f"{mass:.4f}", f"{least:.4f}", f"{error:.4f}", f"{largest:.4f}")
            )
        return ["", text_table(lines[0], lines[1:], left=(5,))]


def _line(heads: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the heads of one layer did."""
    one = heads[0]
    keys = [row["mean_keys"] for row in heads]
    density = sum(row["density"] for row in heads) / len(heads)
    reasons = ", ".join(f"{number} ({reason})" for reason, number in one["dense_rows"].items())
    return (
        str(len(heads)),
        str(one["calls"]),
        str(one["rows"]),
        f"{one['mean_visible']:.1f}",
        f"{min(keys):.1f}" if max(keys) - min(keys) < 0.05 else f"{min(keys):.1f}-{max(keys):.1f}",
        f"{density:.3f}",
        reasons or "-",
    )


def _folded(lines: Iterable[tuple[int, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """One line for all layers that have the same, with their indices before it: `1-4, 6`."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer, line in lines:
        alike.setdefault(line, []).append(layer)
    return [(_ranges(layers), *line) for line, layers in alike.items()]


def _ranges(numbers: Sequence[int]) -> str:
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    ends = [[number for _, number in run] for run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)


def make_report(layers: Mapping[int, LayerCounters], notes: Sequence[str] = ()) -> SparsityReport:
    """The report of a model from the counters of its layers, and what else there is to say."""
    rows: list[dict[str, Any]] = [
        {
            "layer": layer,
            "head": head,
            "calls": counters.calls,
            "rows": counters.queries,
            "visible": counters.visible,
            "kept": kept,
            "mean_visible": counters.visible / max(1, counters.queries),
            "mean_keys": kept / max(1, counters.queries),
            "density": kept / max(1, counters.visible),
            "dense_rows": dict(counters.dense_queries),
        }
        for layer, counters in sorted(layers.items())
        for head, kept in enumerate(counters.kept())
    ]
    kept, visible = (sum(row[name] for row in rows) for name in ("kept", "visible"))
    slow = sum((counters.slow for counters in layers.values()), Counter[str]())
    slower = tuple(f"{number} attention calls {what}" for what, number in slow.items())
    return SparsityReport(rows, kept / visible if visible else float("nan"), (*notes, *slower))
