"""`hf-sparse goals`: which goals of speed and memory measured runs met."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sparse.bench.goals import goals_table, judge
from hf_sparse.cli.runs import Outcome
from hf_sparse.errors import UserError
from hf_sparse.evaluation.results import write_json
from hf_sparse.evaluation.tables import markdown_table


def run_goals(folders: Sequence[Path], output: Path) -> Outcome:
    """Judge runs, and write summary and table.

    Args:
        folders: Of `hf-sparse bench` and `hf-sparse memory`; of two that measured the same the first counts.
        output: Where the result goes.

    Raises:
        UserError: if a folder holds no such run.
    """
    runs = {_name(folder): _read(folder) for folder in folders}
    rows = judge(runs)
    outcome = Outcome({"runs": list(runs), "goals": rows}, [goals_table(rows)])
    write_json(output / "summary.json", outcome.summary)
    (output / "tables.md").write_text(markdown_table(*outcome.tables[0]) + "\n", encoding="utf-8")
    return outcome


def _name(folder: Path) -> str:
    """What results call a run: its folder as it was given, but never a path of the machine."""
    return folder.name if folder.is_absolute() else folder.as_posix()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no run of bench or memory: {path.name} cannot be read ({error})") from error
    if not (isinstance(run, dict) and {"results", "exponents"} <= run.keys()):
        raise UserError(f"{folder} holds no run of bench or memory: {path.name} is of something else")
    return run
