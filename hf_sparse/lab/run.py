"""Runs experiments: measures what is missing, concludes, and writes records, summary, tables and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_sparse.errors import UserError
from hf_sparse.lab import alpha, assumptions, collapse, depth, norms, phases, rope, windows, workloads
from hf_sparse.lab.experiment import CLAIMS, Cell, Experiment, Findings, Setting
from hf_sparse.lab.fits import shortened
from hf_sparse.lab.tables import figure_tables
from hf_sparse.measure.run import Outcome, write_outcome
from hf_sparse.results import ROWS, Record, ResultFile, Table, device_name, record_key, resume, software

_SYNTHETIC = (windows, phases, workloads, assumptions)
_ON_MODELS = (norms, rope, depth, collapse, alpha)

EXPERIMENTS = {
    name: Experiment(name, module.cells, module.measure, module.conclude, module in _ON_MODELS)
    for module in (*_SYNTHETIC, *_ON_MODELS)
    for name in [module.__name__.rpartition(".")[2]]
}


def find_experiments(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names; all if there are no names.

    Raises:
        UserError: for an unknown name.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise UserError(f"experiment must be among {', '.join(EXPERIMENTS)}; got {name!r}")
    return [EXPERIMENTS[name] for name in dict.fromkeys(names or EXPERIMENTS)]


def run(experiments: Sequence[Experiment], setting: Setting, folder: Path) -> dict[str, Any]:
    """Run experiments, write their results into `folder` and return the summary; see `write`.

    Records that the folder has already are not measured again.
    """
    results = ResultFile(folder / ROWS)
    found = {}
    for experiment in experiments:
        records = _measured(experiment, setting, results)
        with results.summed_up():
            found[experiment.name] = experiment.conclude(records)
    about = {
        "scale": setting.scale,
        "seed": setting.seed,
        "device_name": device_name(torch.device("cpu")),
        **software(),
    }
    return write(experiments, found, about | setting.about, folder)


def _measured(experiment: Experiment, setting: Setting, results: ResultFile) -> list[Record]:
    about = {"experiment": experiment.name, "seed": setting.seed}
    decisive = {name: setting.about[name] for name in ("model", "dtype", "device") if name in setting.about}
    cells = {record_key(command="theory", cell=cell, **about, **decisive): cell for cell in experiment.cells(setting)}

    def measure(missing: dict[str, Cell]) -> Iterator[tuple[str, Record]]:
        for key, cell in tqdm(missing.items(), desc=experiment.name, unit="cell", disable=not missing):
            yield key, {**about, **cell, **experiment.measure(cell, setting), **software()}

    return resume(results, cells, measure)


def write(
    experiments: Sequence[Experiment], found: Mapping[str, Findings], about: Record, folder: Path
) -> dict[str, Any]:
    """Write `summary.json`, `tables.md` and the plot of each experiment from its findings, by its name.

    Returns:
        The summary: that of `summarise`, and `about`: scale, seed and provenance.
    """
    summary = summarise(experiments, found) | {"about": about}
    subject = f": {about['model']['name']} ({about['dtype']})" if "model" in about else ""

    def draw(_: Record, plots: Path) -> None:
        for name, findings in found.items():
            findings.plot.draw(CLAIMS[name]["title"] + subject, plots / f"{name}.png")

    return write_outcome(Outcome(summary, all_tables(summary)), folder, "", draw).summary


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
    described = {}
    for experiment in experiments:
        about = {name: CLAIMS[experiment.name][name] for name in ("title", "claim", "source")}
        figures = found[experiment.name].figures
        # Figures of synthetic inputs are rounded where they are made, and hold whole numbers.
        described[experiment.name] = about | {"figures": shortened(figures) if experiment.needs_model else figures}
    return {"verdicts": verdicts, "experiments": described}


def all_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The verdicts in short, the verdicts with their evidence, and the figures of each experiment."""
    verdicts = summary["verdicts"]
    short = [[v["claim"], v["source"], v["answer"], v["where"]] for v in verdicts]
    tables: list[Table] = [
        (["claim", "read in", "verdict", "where"], short),
        (["claim", "experiment", "evidence"], [[v["claim"], v["experiment"], v["evidence"]] for v in verdicts]),
    ]
    for name, about in summary["experiments"].items():
        tables += figure_tables(name, about["figures"])
    return tables
