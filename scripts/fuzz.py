"""Random inputs, right and wrong: each is held, or refused with a documented error, or the package is wrong.

python scripts/fuzz.py --cases 10000 --seed 0 --output runs/fuzz          # all that have no record there yet
python scripts/fuzz.py --cases 10000 --seed 0 --output runs/fuzz --publish  # and the summary into model_cards/faults

Kinds of input take turns: fields of a configuration, published files, attention of one layer under any mask, masks and
lengths through models, and caches (`tests/fuzz_kinds.py` says what must come of them). A process of its own runs them,
one after another, and a record of each is appended to a file: where that process dies, or takes too long, the case is
wrong, and another goes on with the next. Exit code 1 if any case is wrong. Case 7 of seed 0 alone: `--only 7`.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where `tests` is

import torch  # noqa: E402
import transformers  # noqa: E402

from hf_sparse.kernels.cpu import build  # noqa: E402
from hf_sparse.results.tables import markdown_table  # noqa: E402
from tests.fuzz_kinds import KINDS, outcome  # noqa: E402

LIMIT = 60
"""Seconds that a case may take."""

PUBLISHED = ROOT / "model_cards/faults"


def examined(case: int, seed: int) -> dict[str, Any]:
    """The record of one case."""
    kind = list(KINDS)[case % len(KINDS)]
    found, why = outcome(kind, Random(f"{seed}-{case}-{kind}"))
    return {"case": case, "kind": kind, "outcome": found, "why": why}


def work(cases: list[int], seed: int, sender: Connection) -> None:
    """Send the records of cases, as they come."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for case in cases:
        sender.send(examined(case, seed))


def run(cases: list[int], seed: int, records: Path) -> None:
    """Examine cases in processes that may crash or hang, and append their records."""
    context = multiprocessing.get_context("fork")  # What is imported already need not be again.
    start, number = time.monotonic(), len(cases)
    with records.open("a", encoding="utf-8") as file:
        while cases:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(cases, seed, sender), daemon=True)
            process.start()
            sender.close()
            failure = ""
            while cases and not failure:
                failure = "" if receiver.poll(LIMIT) else f"no answer within {LIMIT} s"
                try:
                    record = None if failure else receiver.recv()
                except EOFError:
                    process.join()
                    failure, record = f"the process ended with exit code {process.exitcode}", None
                if record is None:
                    kind = list(KINDS)[cases[0] % len(KINDS)]
                    record = {"case": cases[0], "kind": kind, "outcome": "wrong", "why": failure}
                file.write(json.dumps(record) + "\n")
                file.flush()
                cases = cases[1:]
                if len(cases) % 500 == 0:
                    print(f"{number - len(cases)} cases, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            process.kill()


def summary(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Counts by kind and outcome, and the most frequent errors."""
    counts = {kind: Counter(x["outcome"] for x in records if x["kind"] == kind) for kind in KINDS}
    errors = {}
    for kind in KINDS:
        # Without what differs from case to case: numbers, quoted text, paths.
        said = (x["why"] for x in records if x["kind"] == kind and x["outcome"] == "refused")
        alike = Counter(re.sub(r"'[^']*'|/\S+|[-\d.,e+]*\d|; got .*", "_", why)[:100] for why in said)
        errors[kind] = dict(alike.most_common(5))
    return {
        "cases": len(records),
        "seed": seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "kernels": build.description(),
        "kinds": {
            kind: {"tried": count.total(), **{name: count[name] for name in ("held", "refused", "wrong")}}
            for kind, count in counts.items()
        },
        "wrong": [x for x in records if x["outcome"] == "wrong"][:20],
        "most frequent refusals": errors,
    }


def table(found: dict[str, Any]) -> str:
    """The counts as a table."""
    columns = ("tried", "held", "refused", "wrong")
    lines = [[kind, *(f"{counts[name]:,}" for name in columns)] for kind, counts in found["kinds"].items()]
    total = [f"{sum(counts[name] for counts in found['kinds'].values()):,}" for name in columns]
    return markdown_table(["kind of input", *columns], [*lines, ["all", *total]])


def main() -> int:
    """Run the cases that are missing, and count what came of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--only", type=int, help="one case alone, here and now; nothing is written")
    parser.add_argument("--publish", action="store_true", help="write the results of model_cards/faults")
    args = parser.parse_args()
    if args.only is not None:
        found = examined(args.only, args.seed)
        print(json.dumps(found))
        return int(found["outcome"] == "wrong")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"cases-{args.seed}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {record["case"]: record for record in map(json.loads, lines)}
    build.unsupported_reason()  # compiles the kernels
    run([case for case in range(args.cases) if case not in known], args.seed, path)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = summary([record for record in records if record["case"] < args.cases], args.seed)
    text = json.dumps(found, indent=2) + "\n"
    (args.output / "summary.json").write_text(text, encoding="utf-8")
    if args.publish:
        (PUBLISHED / "fuzz.json").write_text(text, encoding="utf-8")
        (PUBLISHED / "tables.md").write_text(table(found) + "\n", encoding="utf-8")
    print(text, end="")
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
