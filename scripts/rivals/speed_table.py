"""llama.cpp beside dense and sparse attention in transformers: time to the first token and to a later one.

python scripts/rivals/speed_table.py FOLDER  # writes tables.md

FOLDER has a folder for each model, with the records of `with_llama_cpp.py` and folders of `hf-sparse bench --generate`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from hf_sparse.results import markdown_table

HEADER = ("model", "tokens", "program", "weights", "keys and values", "first token, s", "later tokens, ms")

Line = tuple[str, int, str, str, str, float, float]
"""A line of the table, with times in seconds."""


def by_llama_cpp(path: Path) -> Iterator[Line]:
    """What `with_llama_cpp.py` recorded."""
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        times = row["first_token_seconds"], row["token_seconds"]
        yield path.parent.name, row["tokens"], "llama.cpp", "as in the file", row["cache"], *times


def by_transformers(path: Path) -> Iterator[Line]:
    """What a bench found, with the stock cache and sparse."""
    summary = json.loads(path.read_text(encoding="utf-8"))
    dtype = summary["about"]["dtype"]
    times = {
        (row["length"], row["method"], row["quantity"]): row["median"]
        for row in summary["results"]
        if row["kind"] == "generate"
    }
    programs = {"dynamic-cache": "transformers, dense", "hf_sparse": "transformers, hf_sparse"}
    for length, method in dict.fromkeys(place[:2] for place in times):
        first, later = times[length, method, "first_token"], times[length, method, "token"]
        yield path.parents[1].name, length, programs[method], dtype, dtype, first, later


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    lines = [line for path in folder.glob("*/llama_cpp.jsonl") for line in by_llama_cpp(path)]
    lines += [line for path in folder.glob("*/*/summary.json") for line in by_transformers(path)]
    cells = [
        (model, f"{tokens:,}", program, weights, cache, f"{first:.1f}", f"{1000 * later:.1f}")
        for model, tokens, program, weights, cache, first, later in sorted(lines)
    ]
    table = markdown_table(HEADER, cells)
    (folder / "tables.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
