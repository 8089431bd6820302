"""Does the package hold with other versions of torch and transformers? Tests in an environment for each pair.

python scripts/canary.py                                       # oldest, pinned and newest, then the table
python scripts/canary.py newest                                # one of them
python scripts/canary.py --torch 2.12.1 --transformers 5.20.0  # a pair of your own
python scripts/canary.py --draw                                # the table alone

"oldest" has the lower bound of every dependency in pyproject.toml, "pinned" what scripts/constraints.txt says, and
"newest" what pip takes if it may choose. Tests run on one thread, and not the slow ones. Records are appended to
model_cards/versions/records.jsonl, of which the newest of each environment counts; the table is
model_cards/versions/tables.md. Environments stay in --folder for the next run, each some gigabytes if torch has CUDA
libraries in it. pip obeys its own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...).
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_sparse.results import commit, markdown_table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "model_cards/versions"
RECORDS, TABLES = FOLDER / "records.jsonl", FOLDER / "tables.md"
CONSTRAINTS = ROOT / "scripts/constraints.txt"

# File under tests/ -> what it shows.
TESTS = {
    "test_invariants": "the design, on ten architectures",
    "test_patching": "patch and unpatch, copies, refusals",
    "test_visibility": "which keys a mask shows",
    "test_masks": "padding, packing, masks of one's own",
    "test_cache": "caches, beams, assisted decoding",
    "test_lossless": "`generate_lossless`",
    "test_running": "offloading, pipelines, half precision",
    "test_training": "gradients, checkpoints",
    "test_compile": "`torch.compile`, `torch.export`",
    "test_share": "saving and loading",
    "test_artefacts": "what earlier releases saved",
    "test_borrowed_names": "private names are there",
}

# What tests need beside the package's dependencies.
TOOLS = ("hypothesis", "pytest", "pytest-timeout", "scipy", "setuptools")

LIMIT = 1800
"""Seconds that a test may take: compilers of slow machines need theirs."""


def dependencies() -> dict[str, str]:
    """Dependency -> its lower bound, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(line.split(">=") for line in project["dependencies"])


def requirements(name: str, torch: str | None = None, transformers: str | None = None) -> list[str]:
    """What pip is asked for: any release that begins with the lower bound, the pinned one, the newest, or a pair."""
    if name == "oldest":
        return [*(f"{package}=={bound}.*" for package, bound in dependencies().items()), *TOOLS]
    pair = {"torch": torch, "transformers": transformers} if name not in ENVIRONMENTS else {}
    asked = [package if pair.get(package) is None else f"{package}=={pair[package]}" for package in dependencies()]
    return [*asked, *TOOLS, *(["--constraint", str(CONSTRAINTS)] if name == "pinned" else [])]


ENVIRONMENTS = ("oldest", "pinned", "newest")


def install(python: Path, asked: list[str]) -> str:
    """Make an environment, or bring it up to date; gives the reason why it cannot be, or nothing."""
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--upgrade", *asked]
    done = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (errors or ["pip failed"])[0].removeprefix("ERROR: ")


def installed(python: Path) -> dict[str, str]:
    """Package -> version of every dependency in an environment, and of Python."""
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *dependencies()], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def tested(python: Path, files: list[str], report: Path) -> dict[str, Any]:
    """Run test files, and count. `report` is where pytest writes its own."""
    report.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--timeout={LIMIT}",
        f"--junit-xml={report}",
        *files,
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not report.exists():
        return {"failure": f"pytest ended with exit code {done.returncode}"}
    return counted(report) | {"cpu_seconds": round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)}


def counted(report: Path) -> dict[str, Any]:
    """What pytest's XML report says: outcomes of each file, the first line of every failure, why tests were skipped."""
    counts: dict[str, Counter[str]] = {}
    failures: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):
        # A file that cannot be imported has no class, and is its name.
        file = (case.get("classname") or str(case.get("name"))).rpartition(".")[2]
        ends = {child.tag: child.get("message", "").split("\n")[0] for child in case}
        wrong = ends.get("failure", ends.get("error"))
        if wrong is not None:
            failures[f"{file}::{case.get('name')}"] = wrong
        elif "skipped" in ends:
            skipped[ends["skipped"]] += 1
        outcome = "failed" if wrong is not None else "skipped" if "skipped" in ends else "passed"
        counts.setdefault(file, Counter())[outcome] += 1
    return {"tests": counts, "failures": failures, "skipped": skipped}


def records() -> dict[str, dict[str, Any]]:
    """The newest record of each environment, those with names first."""
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    found = {record["environment"]: record for record in map(json.loads, lines)}
    return {name: found[name] for name in (*ENVIRONMENTS, *sorted(found.keys() - {*ENVIRONMENTS})) if name in found}


def cell(record: dict[str, Any], file: str) -> str:
    """How the tests of a file went."""
    count = record.get("tests", {}).get(file, {})
    if not count:
        return record.get("failure", "not run")
    text = f"{count.get('failed')} failed, " if count.get("failed") else ""
    text += f"{count.get('passed', 0)} passed"
    return text + (f", {count['skipped']} skipped" if count.get("skipped") else "")


def draw() -> None:
    """Write the tables: versions and outcomes, failures."""
    found = records()
    packages = ["python", *dependencies()]
    lines = [[name, *(record.get("versions", {}).get(name, "") for record in found.values())] for name in packages]
    lines += [[f"`{file}`: {what}", *(cell(record, file) for record in found.values())] for file, what in TESTS.items()]
    tables = [markdown_table(["", *found], lines, left=range(len(found) + 1))]
    wrong = [
        [name, f"`{test}`", why.replace("|", "\\|")]
        for name, r in found.items()
        for test, why in r.get("failures", {}).items()
    ]
    if wrong:
        tables.append(markdown_table(["environment", "failed", "why"], wrong, left=range(3)))
    TABLES.write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def main() -> None:
    """Make environments, run the tests in them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--torch", metavar="VERSION", help="of a pair of your own; the newest if left out")
    parser.add_argument("--transformers", metavar="VERSION", help="of a pair of your own; the newest if left out")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-canary", help="where environments are made")
    parser.add_argument("--draw", action="store_true", help="write the table alone")
    args = parser.parse_args()
    if unknown := sorted(set(args.environments) - set(ENVIRONMENTS)):
        parser.error(f"there is no environment {unknown[0]!r}: choose among {', '.join(ENVIRONMENTS)}")
    pair = args.torch or args.transformers
    names = args.environments or ([] if pair else [*ENVIRONMENTS])
    if pair:
        names.append(f"torch {args.torch or 'newest'}, transformers {args.transformers or 'newest'}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in [] if args.draw else names:
        python = args.folder.absolute() / re.sub(r"[ ,]+", "-", name) / "bin/python"
        asked = requirements(name, args.torch, args.transformers)
        print(f"{name}: {' '.join(asked)}", file=sys.stderr, flush=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record: dict[str, Any] = {"environment": name, "time": now, "commit": commit()}
        if why := install(python, asked):
            record["failure"] = f"does not install: {why}"
        else:
            record["versions"] = installed(python)
            record |= tested(python, [f"tests/{file}.py" for file in TESTS], python.parents[1] / "report.xml")
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    draw()


if __name__ == "__main__":
    main()
