"""`hf-sparse report`: the tables of a folder of results, made anew from its records, in the terminal or as a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_sparse.bench import memory
from hf_sparse.calibration.calibrate import Calibration
from hf_sparse.calibration.tables import calibration_tables
from hf_sparse.cli.bench import BENCH
from hf_sparse.cli.options import Json
from hf_sparse.cli.theory import print_theory
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.config import files as policy_files
from hf_sparse.errors import UserError, first_line
from hf_sparse.measure.run import ATTENTION_ERROR, PERPLEXITY, RETRIEVAL, Kind, Outcome, write_outcome
from hf_sparse.page import Section, laws_by_head, mass_by_layer, render
from hf_sparse.results import (
    CALIBRATE,
    CALIBRATION,
    ROWS,
    SUMMARY,
    Record,
    ResultFile,
    Summary,
    Table,
    check_writable,
    command_of,
    plot_name,
    read_json,
    write_tables,
    write_whole,
)

_KINDS = {kind.command: kind for kind in (PERPLEXITY, ATTENTION_ERROR, RETRIEVAL, BENCH)}


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder that a command wrote its results into.", show_default=False)],
    write: Annotated[bool, typer.Option("--write", help="Write summary, tables and plots anew.")] = False,
    page: Annotated[
        Path | None,
        typer.Option(help="Write a self-contained HTML page of all results in the folder and those inside it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the tables of a folder of results again, made anew from its records; or make a page of them."""
    if page is not None:
        if write or as_json:
            raise UserError("--page takes neither --write nor --json")
        _write_page(run_dir, page)
        return
    found = _found(run_dir)
    if write:
        found.write()
    if as_json:
        print(json.dumps(found.summary))
    else:
        found.show()


def _write_page(folder: Path, page: Path) -> None:
    """Write an HTML page of the results in a folder and in those inside it, and of the policy that lies with them."""
    names = {ROWS, SUMMARY, CALIBRATION}
    folders = sorted({path.parent for path in folder.rglob("*") if path.name in names})
    policies = {path: policy_files.read(path) for path in sorted(folder.rglob(policy_files.NAME))}
    drawn = [policy.config.per_head for policy in policies.values()]
    sections = [_section(each, each.relative_to(folder), drawn) for each in folders]
    for path, policy in policies.items():
        about = {"base model": str(policy.base_model)} if policy.base_model else {}
        sections.append(
            Section("configuration", facts=about, maps=laws_by_head(policy.config), details={"fields": read_json(path)})
        )
    if not sections:
        raise UserError(f"{folder} holds no results: pass a folder that a command of hf-sparse wrote")
    check_writable(page.parent, (page.name,))
    write_whole(page, render(folder.resolve().name, sections).encode())
    print(page)


def _section(folder: Path, name: Path, drawn: Sequence[object]) -> Section:
    """The section of one command's results; `drawn` are laws that other sections show."""
    found = _found(folder)
    about = found.summary.get("about", found.summary)
    model = about.get("model") or {}
    facts = {
        "model": model.get("name"),
        "revision": model.get("revision"),
        "dtype": about.get("dtype"),
        "device": about.get("device_name", about.get("device")),
        "commit": about.get("commit"),
        "texts": ", ".join(each["document"] for each in found.summary.get("documents", [])),
    }
    maps = mass_by_layer(found.summary) if found.command == ATTENTION_ERROR.command else []
    if found.config is not None and found.config.per_head not in drawn:
        maps += laws_by_head(found.config)
    unfolded = {"configs", "conditions", "config", "about"}
    details = {key: value for key, value in found.summary.items() if key in unfolded}
    return Section(
        title=" / ".join(dict.fromkeys([*name.parts, found.command])),
        tables=found.tables,
        facts={key: str(value) for key, value in facts.items() if value},
        plots=[path.read_bytes() for path in sorted(folder.glob("*.png"))],
        maps=maps,
        details=details,
    )


@dataclass(frozen=True)
class _Found:
    """A summary, its tables, what prints it for people, and what writes it with its tables and plots."""

    command: str
    summary: Summary
    tables: list[Table]
    show: Callable[[], object]
    write: Callable[[], object]
    config: SparseAttentionConfig | None = None


def _found(folder: Path) -> _Found:
    try:
        return _find(folder)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder} holds results that no tables can be made of: {why}") from error


def _find(folder: Path) -> _Found:
    records = list(ResultFile(folder / ROWS).records().values())
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else None
    command = command_of(records[0] if records else summary or {})
    if command in _KINDS:
        return _evaluation(_KINDS[command], records, summary, folder)
    if command == "theory":
        return _theory(records, summary or {}, folder)
    if command == memory.COMMAND and summary:
        summary |= memory.summarise(summary["results"])
        return _drawn(Outcome(summary, memory.memory_tables(summary)), memory.COMMAND, memory.plot_memory, folder)
    if (folder / CALIBRATION).exists():
        return _calibration(folder)
    raise UserError(f"{folder} holds no results: pass a folder that a command of hf-sparse wrote")


def _drawn(outcome: Outcome, command: str, draw: Callable[[Summary, Path], None], folder: Path) -> _Found:
    write = partial(write_outcome, outcome, folder, plot_name(command), draw)
    return _Found(command, outcome.summary, outcome.tables, partial(print, outcome), write)


def _evaluation(kind: Kind, records: Sequence[Record], summary: Summary | None, folder: Path) -> _Found:
    if records:
        chosen = _chosen(kind, records, summary, folder / ROWS)
        summary = kind.summarise(chosen, (summary or records[0]).get("seed", 0))
    assert summary is not None
    return _drawn(Outcome(summary, kind.tables(summary)), kind.command, kind.draw, folder)


def _chosen(kind: Kind, records: Sequence[Record], summary: Summary | None, path: Path) -> list[Record]:
    """The records that `summary` was made of, in its order; all of them if there is none yet.

    Raises:
        UserError: unless there is one for each method, length and document, or each task and length of a benchmark.
    """
    rows = summary["results"] if summary else records
    places: list[tuple[Any, ...]]
    same: Record = {}
    if kind is BENCH:
        names: tuple[str, ...] = ("kind", "length")
        places = list(dict.fromkeys((row["kind"], row["length"]) for row in rows))
        settings = summary["conditions"] if summary else {}
    else:
        names = ("method", "length", "text_sha256", *(["task"] if kind is RETRIEVAL else []))
        methods = dict.fromkeys(row["method"] for row in rows)
        texts = dict.fromkeys(each["text_sha256"] for each in (summary["documents"] if summary else records))
        lengths = sorted({row["length"] for row in rows})
        tasks = [(task,) for task in dict.fromkeys(row["task"] for row in rows)] if kind is RETRIEVAL else [()]
        places = [(m, length, text, *task) for text, length, task, m in product(texts, lengths, tasks, methods)]
        if summary:
            same |= {name: summary["about"][name] for name in ("dtype", "device")}
            same |= {"modes": summary["modes"]} if kind is RETRIEVAL else {}
            same |= {"tokens": summary["targets"]} if kind is PERPLEXITY else {}
        settings = {name: {"config": config} | same for name, config in (summary or {}).get("configs", {}).items()}
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        place = tuple(record[name] for name in names)
        if settings.get(place[0], same).items() <= record.items():
            found.setdefault(place, []).append(record)
    for place in places:
        if (number := len(found.get(place, []))) != 1:
            what = f"{place[0]} at {place[1]} tokens" + (" of one text" if len(place) > 2 else "")
            advice = "run the command that wrote it again" + (", into another folder" if number else "")
            raise UserError(f"{path} holds {number} measurements of {what}, and one is needed: {advice}")
    return [found[place][0] for place in places]


def _theory(records: Sequence[Record], summary: Summary, folder: Path) -> _Found:
    from hf_sparse.lab import run as lab

    if not records:
        raise UserError(f"{folder} holds no {ROWS}, from which the tables of theory are made")
    names = summary["experiments"] if summary else dict.fromkeys(record["experiment"] for record in records)
    about = summary["about"] if summary else {"seed": records[0]["seed"]}
    found = lab.conclude(names, records)
    made = lab.summarise(found) | {"about": about}
    show = partial(print_theory, {folder.resolve().name: made}, folder)
    return _Found("theory", made, lab.all_tables(made), show, partial(lab.write, found, about, folder))


def _calibration(folder: Path) -> _Found:
    data = read_json(folder / CALIBRATION)
    checks = folder / "check.jsonl"
    if records := list(ResultFile(checks).records().values()):
        chosen = _chosen(PERPLEXITY, records, data["check"], checks)
        data["check"] = PERPLEXITY.summarise(chosen, data["check"]["seed"])
    # A selector of a user's own is named there, and shown in no table.
    known = {name: value for name, value in data["config"].items() if name != "selector" or isinstance(value, str)}
    result = Calibration.from_dict(data | {"config": known})
    tables = calibration_tables(result)
    show, write = partial(print, Outcome(data, tables)), partial(write_tables, folder, tables)
    return _Found(CALIBRATE, data, tables, show, write, result.config)
