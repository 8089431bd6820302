"""From measured cells to medians, ratios, exponents of length and break-even lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from hf_sparse.bench import end_to_end, layer
from hf_sparse.bench.layer import SPARSE
from hf_sparse.bench.run import LAYER_KINDS
from hf_sparse.results import Record

Summary = dict[str, Any]

BASELINES = {
    "decode": layer.BASELINE,
    "prefill": layer.BASELINE,
    "cached": end_to_end.BASELINE,
    "generate": end_to_end.BASELINE,
    "padded": end_to_end.BASELINE,
}
"""The dense method of each kind that break-even is against."""

FIT_FROM = 16384
"""Exponents are fitted from this length on, where fixed costs no longer hide how a time grows, if two lengths are."""

_CONFIDENCE = 0.95
_FACTS = ("warm_up", "peak_mib", "density", "output_error", "same_tokens")


def summarise(rows: Sequence[Record]) -> Summary:
    """The summary of `run.evaluate`'s rows.

    Returns:
        `results`: one dictionary per kind, length, method and quantity: the `median` of its times in seconds with
        its interval `low` to `high`, the number of `repeats`, `ratio` (time over that of `SPARSE` in the same round,
        with its interval), and the method's other facts.
        `skipped`: what was left out, and why. `exponents`: see `exponent`. `break_even`: see `break_even`.
        `conditions`: what the rows of each kind have in common. `about`: the machine.
    """
    results, skipped = [], []
    for row in rows:
        place = {"kind": row["kind"], "length": row["length"]}
        for method, found in row["methods"].items():
            if "skipped" in found:
                skipped.append({**place, "method": method, "reason": found["skipped"]})
                continue
            for quantity, times in found["samples"].items():
                sparse = row["methods"][SPARSE]["samples"][quantity]
                pairs = [time / other for time, other in zip(times, sparse, strict=True)]
                results.append(
                    {
                        **place,
                        "method": method,
                        "quantity": quantity,
                        **_median(times),
                        "repeats": len(times),
                        "ratio": None if method == SPARSE else _median(pairs),
                        **{name: found[name] for name in _FACTS if name in found},
                    }
                )
    shared = ("model", "dtype", "device", "device_name", "threads", "seed", "versions", "commit")
    facts = {"config", "inputs", "heads", "kv_heads", "head_dim", "new_tokens"}
    return {
        "about": {name: rows[-1][name] for name in shared},
        "conditions": {row["kind"]: {name: row[name] for name in sorted(facts & row.keys())} for row in rows},
        "results": results,
        "skipped": skipped,
        "exponents": [exponent(series) for series in _series(results)],
        "break_even": {
            kind: break_even([r for r in results if r["kind"] == kind], BASELINES[kind])
            for kind in dict.fromkeys(row["kind"] for row in rows)
        },
    }


def exponent(series: Sequence[Summary]) -> Summary:
    """The least-squares slope of log time against log length.

    Returns:
        `kind`, `method`, `quantity`, `exponent` with its interval `low` to `high`, `seconds_at_1` and the `lengths`
        fitted: those from `FIT_FROM` on if there are two, else all; no exponent from one length. The interval is what
        the intervals of the medians make of it: it knows noise, not how far times are from a power of length.
    """
    long = [row for row in series if row["length"] >= FIT_FROM]
    fitted = long if len(long) > 1 else list(series)
    place = {name: series[0][name] for name in ("kind", "method", "quantity")}
    out: Summary = {**place, **dict.fromkeys(("exponent", "low", "high", "seconds_at_1"))}
    if len(fitted) > 1:
        x, y, low, high = (np.log([row[name] for row in fitted]) for name in ("length", "median", "low", "high"))
        slope, intercept = np.polyfit(x, y, 1)
        # The slope is a sum of the logs of the medians, whose errors are independent, with these weights.
        weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        error = float(np.linalg.norm(weights * (high - low) / 2))
        out |= {name: round(float(slope) + by, 3) for name, by in (("exponent", 0), ("low", -error), ("high", error))}
        out["seconds_at_1"] = float(np.exp(intercept))
    return {**out, "lengths": [row["length"] for row in fitted]}


def break_even(results: Sequence[Summary], baseline: str) -> Summary:
    """The smallest length from which ours is not slower than `baseline`, at every longer length that was measured.

    Between the last length at which it is slower and the next, log(ratio) is taken as linear in log(length).

    Args:
        results: Of one kind; the first quantity counts.
        baseline: The dense method.

    Returns:
        `against` and `quantity`; `length`, or `None` if ours is slower at the longest length; `measured`, the shortest
        and the longest length (a break-even at the shortest may really be below it).
    """
    quantity = results[0]["quantity"]
    ratios = sorted(
        (row["length"], row["ratio"]["median"])
        for row in results
        if row["method"] == baseline and row["quantity"] == quantity
    )
    measured = [ratios[0][0], ratios[-1][0]]
    out: Summary = {"against": baseline, "quantity": quantity, "length": None, "measured": measured}
    slower = [i for i, (_, ratio) in enumerate(ratios) if ratio < 1]
    if not slower:
        out["length"] = ratios[0][0]
    elif slower[-1] + 1 < len(ratios):
        (low, below), (high, above) = ratios[slower[-1]], ratios[slower[-1] + 1]
        share = -math.log(below) / (math.log(above) - math.log(below))
        out["length"] = math.ceil(low * (high / low) ** share)
    return out


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the true median with 95 %; the extremes if none does.

    With fewer than 6 values none does: three hold it with 75 %.
    """
    ordered = sorted(values)
    count = len(ordered)
    outside, cut = 0.0, 0
    for left_out in range(count // 2):
        # Both ends beyond `left_out` values: fewer than that many lie on one side of the median, twice.
        outside += 2 * math.comb(count, left_out) / 2**count
        if outside > 1 - _CONFIDENCE:
            break
        cut = left_out
    return ordered[cut], ordered[count - 1 - cut]


def _median(values: Sequence[float]) -> dict[str, float]:
    low, high = median_interval(values)
    return {"median": median(values), "low": low, "high": high}


def _series(results: Sequence[Summary]) -> list[list[Summary]]:
    """The results of each kind, method and quantity, by length."""
    names = dict.fromkeys((row["kind"], row["method"], row["quantity"]) for row in results)
    return [
        sorted(
            (row for row in results if (row["kind"], row["method"], row["quantity"]) == name),
            key=lambda row: row["length"],
        )
        for name in names
    ]


def is_layer(kind: str) -> bool:
    """Whether a kind is one attention layer alone."""
    return kind in LAYER_KINDS
