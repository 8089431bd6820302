"""`hf-sparse goals`: which goals of speed, memory and quality measured runs met."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sparse.cli.runs import Outcome
from hf_sparse.errors import UserError
from hf_sparse.evaluation.folders import check_folder
from hf_sparse.evaluation.results import write_json
from hf_sparse.evaluation.tables import markdown_table
from hf_sparse.goals import QUALITY_GOALS, SPEED_GOALS, goals_table, judge
from hf_sparse.outputs import SUMMARY, TABLES


def run_goals(folders: Sequence[Path], output: Path) -> Outcome:
    """Judge runs, and write summary and tables.

    Args:
        folders: Of `hf-sparse bench`, `memory` and `perplexity`; of two that measured the same the first counts.
        output: Where the result goes.

    Raises:
        UserError: if a folder holds no such run.
    """
    check_folder(output, "goals")
    runs = {_name(folder, folders): _read(folder) for folder in folders}
    judged = {"speed": judge(runs, SPEED_GOALS), "quality": judge(runs, QUALITY_GOALS)}
    outcome = Outcome({"runs": list(runs), **judged}, [goals_table(rows) for rows in judged.values()])
    write_json(output / SUMMARY, outcome.summary)
    tables = "\n\n".join(markdown_table(*table) for table in outcome.tables)
    (output / TABLES).write_text(tables + "\n", encoding="utf-8")
    return outcome


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """What results call a run: its folder as it was given, but of a path of the machine no more than tells runs apart.

    That is the fewest last parts of an absolute path with which no other of `folders` ends.
    """
    if not folder.is_absolute():
        return folder.as_posix()
    others = [other.parts for other in folders if other != folder]
    tails = (folder.parts[-count:] for count in range(1, len(folder.parts) + 1))
    return Path(*next(tail for tail in tails if all(other[-len(tail) :] != tail for other in others))).as_posix()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no run of bench, memory or perplexity: {path.name} cannot be read ({error})"
        ) from error
    if not (isinstance(run, dict) and "results" in run and ("exponents" in run or "configs" in run)):
        raise UserError(f"{folder} holds no run of bench, memory or perplexity: {path.name} is of something else")
    return run
