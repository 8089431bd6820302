"""What was measured of retrieval, as tables of a model card, and where it is below dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hf_sparse.results import markdown_table
from hf_sparse.schema import DENSE, QualityRecord

_TOGETHER, _APART = "read in one pass with the text", "read token by token"
_PICKED, _WRITTEN = "likelier than three wrong answers", "written"
_SCORES = {
    "retrieval_picked": (_TOGETHER, _PICKED),
    "retrieval_found": (_TOGETHER, _WRITTEN),
    "decoded_retrieval_picked": (_APART, _PICKED),
    "decoded_retrieval_found": (_APART, _WRITTEN),
}
"""Metric -> how the questions are read, and what is counted of the answers."""

_DIFFERENCE = "_above_dense"


def is_retrieval(record: QualityRecord) -> bool:
    """Whether a record is of retrieval."""
    return record.metric.removesuffix(_DIFFERENCE) in _SCORES


def tables(records: Sequence[QualityRecord]) -> Iterator[str]:
    """A paragraph, the scores by length, and their differences over all lengths; nothing if nothing was measured."""
    found = {(record.metric, record.method == DENSE, record.length): record.value for record in records}
    lines = [
        [
            *_SCORES[record.metric],
            f"{record.length:,}",
            *(_percent(found.get((record.metric, dense, record.length))) for dense in (True, False)),
            "-" if record.density is None else f"{record.density:.3f}",
        ]
        for record in records
        if record.metric in _SCORES and record.method != DENSE
    ]
    if not lines:
        return
    yield (
        "**Retrieval**: questions about what long texts say, in the manner of RULER; means over those tasks that the "
        "dense model does better than chance. Of a hundred answers, so many are likelier than three wrong ones; or so "
        "much of an answer is written, in per cent. Density is that of the pass over the text."
    )
    yield markdown_table(["questions", "answers", "context length", "dense", "sparse", "density"], lines, left=(0, 1))
    yield markdown_table(
        ["questions", "answers", "sparse - dense, points, all lengths", "95 % interval"],
        [[*_SCORES[metric], f"{100 * record.value:+.1f}", _points(record)] for metric, record in _differences(records)],
        left=(0, 1),
    )


def losses(records: Sequence[QualityRecord]) -> Iterator[str]:
    """Where retrieval is below dense: one line each."""
    differences = _differences(records)
    if not differences:
        yield "Retrieval was not measured."
        return
    below = [(metric, record) for metric, record in differences if record.value < 0]
    for metric, record in below:
        questions, answers = _SCORES[metric]
        surely = ", beyond what resampling explains" if (record.high or 0) < 0 else ""
        yield (
            f"Retrieval is {-100 * record.value:.1f} points below dense ({_points(record)}){surely}: questions "
            f"{questions}, answers {answers}."
        )
    if not below:
        yield "Retrieval is below dense in nothing that was measured."


def _differences(records: Sequence[QualityRecord]) -> list[tuple[str, QualityRecord]]:
    """Scores, and how much sparse attention gains or loses of them."""
    found = ((record.metric.removesuffix(_DIFFERENCE), record) for record in records)
    return [(metric, record) for metric, record in found if metric in _SCORES and metric != record.metric]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _points(record: QualityRecord) -> str:
    if record.low is None or record.high is None:
        return "-"
    return f"{100 * record.low:+.1f} to {100 * record.high:+.1f}"
