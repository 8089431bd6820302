"""Runs experiments: measures what is missing, concludes, and writes records, summary, tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_sparse.errors import UserError
from hf_sparse.lab import alpha, assumptions, collapse, depth, norms, phases, rope, windows, workloads
from hf_sparse.lab.experiment import CLAIMS, Cell, Experiment, Findings, Setting, words
from hf_sparse.lab.fits import shortened
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
    """The experiments of these names; all if there are no names. An unknown one is refused."""
    for name in names:
        if name not in EXPERIMENTS:
            raise UserError(f"experiment must be among {', '.join(EXPERIMENTS)}; got {name!r}")
    return [EXPERIMENTS[name] for name in dict.fromkeys(names or EXPERIMENTS)]


def run(experiments: Sequence[Experiment], setting: Setting, folder: Path) -> dict[str, Any]:
    """Run experiments, write their results into `folder` and return the summary; see `write`.

    Records that the folder has already are not measured again.
    """
    results = ResultFile(folder / ROWS)
    records = [record for experiment in experiments for record in _measured(experiment, setting, results)]
    with results.summed_up():
        found = conclude([experiment.name for experiment in experiments], records)
    about = {"scale": setting.scale, "seed": setting.seed, "device_name": device_name(torch.device("cpu"))}
    return write(found, about | software() | setting.about, folder)


def _measured(experiment: Experiment, setting: Setting, results: ResultFile) -> list[Record]:
    about = {"experiment": experiment.name, "seed": setting.seed}
    decisive = {name: setting.about[name] for name in ("model", "dtype", "device") if name in setting.about}
    cells = {record_key(command="theory", cell=cell, **about, **decisive): cell for cell in experiment.cells(setting)}

    def measure(missing: dict[str, Cell]) -> Iterator[tuple[str, Record]]:
        for key, cell in tqdm(missing.items(), desc=experiment.name, unit="cell", disable=not missing):
            yield key, {**about, **cell, **experiment.measure(cell, setting), **software()}

    return resume(results, cells, measure)


def conclude(names: Iterable[str], records: Sequence[Record]) -> dict[str, Findings]:
    """The findings of experiments by their names, each from its records."""
    return {
        name: EXPERIMENTS[name].conclude([record for record in records if record["experiment"] == name])
        for name in names
    }


def write(found: Mapping[str, Findings], about: Record, folder: Path) -> dict[str, Any]:
    """Write `summary.json`, `tables.md` and the plot of each experiment.

    Returns:
        The summary: that of `summarise`, and `about`: scale, seed and provenance.
    """
    summary = summarise(found) | {"about": about}
    subject = f": {about['model']['name']} ({about['dtype']})" if "model" in about else ""

    def draw(_: Record, plots: Path) -> None:
        for name, findings in found.items():
            findings.plot.draw(CLAIMS[name]["title"] + subject, plots / f"{name}.png")

    return write_outcome(Outcome(summary, all_tables(summary)), folder, "", draw).summary


def summarise(found: Mapping[str, Findings]) -> dict[str, Any]:
    """Verdicts, and the figures of each experiment; follows from the records alone."""
    verdicts = [
        {"experiment": name, **verdict}
        for name, findings in found.items()
        for verdict in EXPERIMENTS[name].verdicts(findings)
    ]
    if not any(EXPERIMENTS[name].needs_model for name in found):
        untested = {"experiment": "-", "source": "machine summary", "answer": "not testable here", "where": "-"}
        verdicts += [untested | {"claim": claim["text"], "evidence": claim["why"]} for claim in CLAIMS["untested"]]
    described = {}
    for name, findings in found.items():
        about = {part: CLAIMS[name][part] for part in ("title", "claim", "source")}
        # Figures of synthetic inputs are rounded where they are made, and hold whole numbers.
        figures = shortened(findings.figures) if EXPERIMENTS[name].needs_model else findings.figures
        described[name] = about | {"figures": figures}
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
        tables += _figure_tables(name, about["figures"])
    return tables


def _figure_tables(name: str, figures: Mapping[str, Any]) -> list[Table]:
    """The figures of an experiment: a table of each that has several records, and one of all the others."""
    tables: list[Table] = []
    single = []
    for what, value in figures.items():
        records = value
        if isinstance(value, Mapping) and all(isinstance(entry, Mapping) for entry in value.values()):
            records = [{what: key} | entry for key, entry in value.items()]
        if isinstance(records, Sequence) and isinstance(records[0], Mapping):
            tables.append((list(records[0]), [[_cell(cell) for cell in record.values()] for record in records]))
        else:
            single.append([what, _cell(value)])
    return [([name, "value"], single), *tables]


def _cell(value: Any) -> str:
    return "-" if value is None else words(value)
