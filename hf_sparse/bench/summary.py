"""From records of measurements to medians, ratios, exponents of length and break-even lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from statistics import fmean, linear_regression, median

from hf_sparse.bench.tasks import BASELINES, LAYER_BASELINES, LAYER_TASKS, SPARSE
from hf_sparse.results import Record, Summary

FIT_FROM = 16384
"""Exponents are fitted to lengths from here on, if there are two: below, fixed costs hide how a time grows."""

_CONFIDENCE = 0.95
_ABOUT = ("model", "dtype", "device", "device_name", "gpu", "cpu_capability", "threads", "seed", "versions", "commit")
_CONDITIONS = ("config", "head_dim", "heads", "inputs", "kv_heads", "new_tokens")
_FACTS = ("warm_up", "peak_mib", "density", "output_error", "same_tokens", "drafts")


def summarise(rows: Sequence[Record]) -> Summary:
    """The summary of the records of `run.evaluate`.

    Returns:
        `about`: model, machine and versions.
        `conditions`: task -> what its records have in common.
        `results`: one dictionary per task, length, method and quantity: the `median` of its times in seconds with its
        interval `low` to `high`, the number of `repeats`, `ratio` (time over that of `SPARSE` in the same round, with
        its interval), and the method's other facts.
        `skipped`: methods that were not measured, with the reason.
        `exponents`: see `exponent`.
        `break_even`: task -> see `break_even`.
        `dense_below`: if both tasks of one layer were measured, the length from which neither is slower than the
        baseline; the longest measured length of a task that is slower there.
    """
    results: list[Summary] = []
    skipped = []
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
    tasks = list(dict.fromkeys(row["kind"] for row in rows))
    crossings = {}
    for task in tasks:
        own = [each for each in results if each["kind"] == task]
        measured = {each["method"] for each in own}
        dense = [name for name in dict.fromkeys((BASELINES[task], *LAYER_BASELINES)) if name in measured]
        # Against the way to attend to all keys that stays ahead the longest.
        found = [break_even(own, name) for name in dense]
        crossings[task] = max(found, key=lambda crossing: crossing["length"] or math.inf)
    series: dict[tuple[str, str, str], list[Summary]] = {}
    for row in results:
        series.setdefault((row["kind"], row["method"], row["quantity"]), []).append(row)
    summary = {
        "about": {name: rows[-1][name] for name in _ABOUT if name in rows[-1]},
        "conditions": {row["kind"]: {name: row[name] for name in _CONDITIONS if name in row} for row in rows},
        "results": results,
        "skipped": skipped,
        "exponents": [exponent(sorted(rows, key=itemgetter("length"))) for rows in series.values()],
        "break_even": crossings,
    }
    if all(task in crossings for task in LAYER_TASKS):
        found = [crossings[task] for task in LAYER_TASKS]
        summary["dense_below"] = max(each["length"] or each["measured"][1] for each in found)
    return summary


def exponent(series: Sequence[Summary]) -> Summary:
    """The least-squares slope of log time against log length.

    Args:
        series: Results of one task, method and quantity, by length.

    Returns:
        `kind`, `method`, `quantity`, `exponent` with its interval `low` to `high`, `seconds_at_1`, and the `lengths`
        fitted: those from `FIT_FROM` on if there are two, else all. One length gives no exponent. The interval follows
        from those of the medians: it covers noise, not the distance of the times from a power of length.
    """
    long = [row for row in series if row["length"] >= FIT_FROM]
    fitted = long if len(long) > 1 else list(series)
    place = {name: series[0][name] for name in ("kind", "method", "quantity")}
    out: Summary = {**place, **dict.fromkeys(("exponent", "low", "high", "seconds_at_1"))}
    if len(fitted) > 1:
        x = [math.log(row["length"]) for row in fitted]
        slope, intercept = linear_regression(x, [math.log(row["median"]) for row in fitted])
        # The slope is a weighted sum of the logs of the medians, whose errors are independent.
        mean, errors = fmean(x), [math.log(row["high"] / row["low"]) / 2 for row in fitted]
        spread = math.hypot(*(value - mean for value in x)) ** 2
        error = math.hypot(*((value - mean) / spread * each for value, each in zip(x, errors, strict=True)))
        out |= {name: round(slope + by, 3) for name, by in (("exponent", 0), ("low", -error), ("high", error))}
        out["seconds_at_1"] = math.exp(intercept)
    return {**out, "lengths": [row["length"] for row in fitted]}


def break_even(results: Sequence[Summary], baseline: str) -> Summary:
    """The smallest length from which `SPARSE` is never slower than `baseline`, of those measured.

    Between the last length at which it is slower and the next, log(ratio) is taken as linear in log(length).

    Args:
        results: Of one task. Only its first quantity is used.
        baseline: The dense method.

    Returns:
        `against` and `quantity`; `length`, or `None` if `SPARSE` is slower at the longest length; `measured`, the
        shortest and the longest length (a break-even at the shortest may really be below it).
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
    for beyond in range(count // 2):
        # Twice the probability that exactly `beyond` values lie below the true median.
        outside += 2 * math.comb(count, beyond) / 2**count
        if outside > 1 - _CONFIDENCE:
            break
        cut = beyond
    return ordered[cut], ordered[count - 1 - cut]


def _median(values: Sequence[float]) -> dict[str, float]:
    low, high = median_interval(values)
    return {"median": median(values), "low": low, "high": high}
