"""Runs experiments: measures what is missing, concludes, and writes rows, summary, tables and pages of plots."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_sparse.errors import UserError
from hf_sparse.lab import assumptions, phases, windows, workloads
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict
from hf_sparse.lab.pages import draw_page
from hf_sparse.machine import device_name
from hf_sparse.measure.tables import Table, markdown_table
from hf_sparse.results import ROWS, SUMMARY, TABLES, ResultFile, Row, row_key, software, write_json

SYNTHETIC = (windows.EXPERIMENT, phases.EXPERIMENT, workloads.EXPERIMENT, assumptions.EXPERIMENT)

NOT_TESTABLE = (
    Verdict(
        "The paper's own (epsilon, k) formula, its constants and its numbered theorems.",
        "machine summary",
        "not testable here",
        "-",
        "The body of the paper could not be obtained. Its abstract and machine-made summaries were read, and the "
        "summaries number the theorems differently.",
    ),
    Verdict(
        "The paper's experiments on LLaMA-3.",
        "machine summary",
        "not testable here",
        "-",
        "No task, length, exponent, window or score was visible.",
    ),
)
"""What the paper is said to contain and what nobody can check from what could be read."""


def find_experiments(names: Sequence[str], available: Sequence[Experiment]) -> list[Experiment]:
    """The experiments of these names; all if there are no names.

    Raises:
        UserError: for an unknown name.
    """
    by_name = {experiment.name: experiment for experiment in available}
    for name in names:
        if name not in by_name:
            raise UserError(f"experiment must be among {', '.join(by_name)}; got {name!r}")
    return [by_name[name] for name in dict.fromkeys(names)] or list(available)


def run(experiments: Sequence[Experiment], setting: Setting, folder: Path) -> dict[str, Any]:
    """Run experiments and write `rows.jsonl`, `summary.json`, `tables.md` and a page of plots for each.

    Rows that the folder has already are not measured again.

    Args:
        experiments: Which.
        setting: How.
        folder: Where results go.

    Returns:
        The summary.
    """
    results = ResultFile(folder / ROWS)
    results.repair()
    found = {}
    for experiment in experiments:
        rows = _measured(experiment, setting, results)
        with results.summed_up():
            found[experiment.name] = experiment.conclude(rows)
    summary = summarise(experiments, found) | {"about": _about(setting)}
    write_json(folder / SUMMARY, summary)
    markdown = "\n\n".join(markdown_table(*table) for table in all_tables(summary, found))
    (folder / TABLES).write_text(markdown + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        print('no plots are drawn without matplotlib: pip install "hf_sparse[plots]"', file=sys.stderr)
    else:
        for experiment in experiments:
            draw_page(_title(experiment, setting), found[experiment.name].panels, folder / f"{experiment.name}.png")
    return summary


def summarise(experiments: Sequence[Experiment], found: Mapping[str, Findings]) -> dict[str, Any]:
    """Verdicts, and the figures of each experiment; follows from the rows alone."""
    verdicts = [
        {"experiment": experiment.name, **verdict.to_dict()}
        for experiment in experiments
        for verdict in found[experiment.name].verdicts
    ]
    if not any(experiment.needs_model for experiment in experiments):
        verdicts += [{"experiment": "-", **verdict.to_dict()} for verdict in NOT_TESTABLE]
    about = {e.name: {"title": e.title, "claim": e.claim, "source": e.source} for e in experiments}
    figures = {e.name: about[e.name] | {"figures": found[e.name].figures} for e in experiments}
    return {"verdicts": verdicts, "experiments": figures}


def all_tables(summary: dict[str, Any], found: Mapping[str, Findings]) -> list[Table]:
    """The verdicts in short, the verdicts in full, and the tables of each experiment."""
    verdicts = summary["verdicts"]
    short = [[v["claim"], v["source"], v["answer"], v["where"]] for v in verdicts]
    full = [[v["claim"], v["experiment"], v["evidence"]] for v in verdicts]
    return [
        (["claim", "read in", "verdict", "where"], short),
        (["claim", "experiment", "evidence"], full),
        *(table for findings in found.values() for table in findings.tables),
    ]


def _measured(experiment: Experiment, setting: Setting, results: ResultFile) -> list[Row]:
    """The rows of an experiment in the order of its cells: those of `results`, and the others measured now."""
    cells = experiment.cells(setting)
    keys = [_key(experiment, cell, setting) for cell in cells]
    have = results.rows()
    missing = [(key, cell) for key, cell in zip(keys, cells, strict=True) if key not in have]
    for key, cell in tqdm(missing, desc=experiment.name, unit="cell", disable=not missing):
        row = {"key": key, "experiment": experiment.name, "seed": setting.seed, **cell}
        results.append(row | experiment.measure(cell, setting) | software())
    rows = results.rows()
    return [rows[key] for key in keys]


def _key(experiment: Experiment, cell: Cell, setting: Setting) -> str:
    subject = setting.subject
    about = {} if subject is None else {name: subject.about[name] for name in ("model", "dtype", "device")}
    return row_key(command="theory", experiment=experiment.name, seed=setting.seed, cell=cell, **about)


def _about(setting: Setting) -> Row:
    about: Row = {"scale": setting.scale, "seed": setting.seed, "device_name": device_name(torch.device("cpu"))}
    about |= software()
    return about if setting.subject is None else about | setting.subject.about


def _title(experiment: Experiment, setting: Setting) -> str:
    subject = setting.subject
    if subject is None:
        return experiment.title
    return f"{experiment.title}: {subject.about['model']['name']} ({subject.about['dtype']})"
