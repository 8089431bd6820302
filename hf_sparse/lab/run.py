"""Runs experiments: measures what is missing, concludes, and writes records, summary, tables and pages of plots."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_sparse.errors import UserError
from hf_sparse.lab import alpha, assumptions, collapse, depth, norms, phases, rope, windows, workloads
from hf_sparse.lab.experiment import CLAIMS, Experiment, Findings, Setting
from hf_sparse.lab.fits import shortened
from hf_sparse.lab.plots import draw_page
from hf_sparse.machine import device_name
from hf_sparse.results import ROWS, SUMMARY, TABLES, Record, ResultFile, record_key, software, write_json
from hf_sparse.tables import Table, markdown_table

EXPERIMENTS = tuple(
    module.EXPERIMENT for module in (windows, phases, workloads, assumptions, norms, rope, depth, collapse, alpha)
)


def find_experiments(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names; all if there are no names.

    Raises:
        UserError: for an unknown name.
    """
    by_name = {experiment.name: experiment for experiment in EXPERIMENTS}
    for name in names:
        if name not in by_name:
            raise UserError(f"experiment must be among {', '.join(by_name)}; got {name!r}")
    return [by_name[name] for name in dict.fromkeys(names)] or list(EXPERIMENTS)


def run(experiments: Sequence[Experiment], setting: Setting, folder: Path) -> dict[str, Any]:
    """Run experiments, write their results into `folder` and return the summary; see `write`.

    Records that the folder has already are not measured again.
    """
    results = ResultFile(folder / ROWS)
    results.repair()
    found = {}
    for experiment in experiments:
        records = _measured(experiment, setting, results)
        with results.summed_up():
            found[experiment.name] = experiment.conclude(records)
    name = device_name(torch.device("cpu"))
    about: Record = {"scale": setting.scale, "seed": setting.seed, "device_name": name, **software()}
    if setting.model_subject is not None:
        about |= setting.model_subject.about
    return write(experiments, found, about, folder)


def _measured(experiment: Experiment, setting: Setting, results: ResultFile) -> list[Record]:
    """The records of an experiment in the order of its cells: those of `results`, and the others measured now."""
    about = {} if setting.model_subject is None else setting.model_subject.about
    decisive: Record = {name: about[name] for name in ("model", "dtype", "device") if name in about}
    decisive |= {"command": "theory", "experiment": experiment.name, "seed": setting.seed}
    cells = {record_key(cell=cell, **decisive): cell for cell in experiment.cells(setting)}
    missing = cells.keys() - results.records().keys()
    for key in tqdm([key for key in cells if key in missing], desc=experiment.name, unit="cell", disable=not missing):
        record = {"key": key, "experiment": experiment.name, "seed": setting.seed, **cells[key]}
        results.append(record | experiment.measure(cells[key], setting) | software())
    records = results.records()
    return [records[key] for key in cells]


def write(
    experiments: Sequence[Experiment], found: Mapping[str, Findings], about: Record, folder: Path
) -> dict[str, Any]:
    """Write `summary.json`, `tables.md` and a page of plots for each experiment.

    Args:
        experiments: The experiments.
        found: The findings of each, by its name.
        about: Scale, seed and provenance, added to the summary that is returned.
        folder: Where results go.
    """
    summary = summarise(experiments, found) | {"about": about}
    write_json(folder / SUMMARY, summary)
    tables = "\n\n".join(markdown_table(*table) for table in all_tables(summary, found))
    (folder / TABLES).write_text(tables + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        print('no plots are drawn without matplotlib: pip install "hf_sparse[plots]"', file=sys.stderr)
        return summary
    subject = f": {about['model']['name']} ({about['dtype']})" if "model" in about else ""
    for experiment in experiments:
        own = [verdict for verdict in summary["verdicts"] if verdict["experiment"] == experiment.name]
        captions = [f"{verdict['answer'].upper()}: {verdict['claim']}" for verdict in own]
        page = folder / f"{experiment.name}.png"
        draw_page(CLAIMS[experiment.name]["title"] + subject, found[experiment.name].panels, captions, page)
    return summary


def summarise(experiments: Sequence[Experiment], found: Mapping[str, Findings]) -> dict[str, Any]:
    """Verdicts, and the figures of each experiment; follows from the records alone."""
    verdicts = [
        {"experiment": experiment.name, **verdict}
        for experiment in experiments
        for verdict in experiment.verdicts(found[experiment.name])
    ]
    if not any(experiment.needs_model for experiment in experiments):
        untested = {"experiment": "-", "source": "machine summary", "answer": "not testable here", "where": "-"}
        verdicts += [untested | {"claim": claim["text"], "evidence": claim["why"]} for claim in CLAIMS["untested"]]
    abouts: dict[str, Any] = {}
    for experiment in experiments:
        abouts[experiment.name] = {name: CLAIMS[experiment.name][name] for name in ("title", "claim", "source")}
        figures = found[experiment.name].figures
        # Figures of synthetic inputs are rounded where they are made, and hold whole numbers.
        abouts[experiment.name]["figures"] = shortened(figures) if experiment.needs_model else figures
    return {"verdicts": verdicts, "experiments": abouts}


def all_tables(summary: dict[str, Any], found: Mapping[str, Findings]) -> list[Table]:
    """The verdicts in short, the verdicts with their evidence, and the tables of each experiment."""
    verdicts = summary["verdicts"]
    return [
        (
            ["claim", "read in", "verdict", "where"],
            [[v["claim"], v["source"], v["answer"], v["where"]] for v in verdicts],
        ),
        (["claim", "experiment", "evidence"], [[v["claim"], v["experiment"], v["evidence"]] for v in verdicts]),
        *(table for findings in found.values() for table in findings.tables),
    ]
