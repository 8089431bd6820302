"""The figures in the README are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_sparse.bench import memory
from hf_sparse.measure import perplexity_summary
from hf_sparse.measure.perplexity_tables import method_cells, overview_cells, perplexity_cells, verdict_cells
from hf_sparse.tables import markdown_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"<!-- table: (\S+) (\d+) -->\n\n((?:\|.*\n)+)", README)
PERPLEXITIES = sorted(
    path.with_name("summary.json")
    for path in ROOT.glob("model_cards/**/rows.jsonl")
    if not {"bench", "theory"} & set(path.parts)
)


def tables(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").strip().split("\n\n")


def test_every_marked_table_is_there() -> None:
    assert len(QUOTES) == README.count("<!-- table:") >= 7


@pytest.mark.parametrize(("path", "index", "table"), QUOTES)
def test_a_quoted_table_is_that_of_the_results(path: str, index: str, table: str) -> None:
    assert table.strip() == tables(path)[int(index)]


@pytest.mark.parametrize("path", PERPLEXITIES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_a_summary_follows_from_its_rows(path: Path) -> None:
    summary = json.loads(path.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (path.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    # Rows stand in the order in which they were measured; the bootstrap draws in that of the command line.
    methods = list(dict.fromkeys(row["method"] for row in summary["results"]))
    documents = [document["document"] for document in summary["documents"]]
    rows.sort(key=lambda row: (documents.index(row["document"]), row["length"], methods.index(row["method"])))
    again = perplexity_summary.summarise(rows, summary["seed"])
    made = [cells(again) for cells in (perplexity_cells, method_cells, verdict_cells, overview_cells)]
    shown = [markdown_table(*table) for table in made if table[1]]
    assert shown == tables(str(path.parent / "tables.md"))


def test_the_memory_exponents_follow_from_their_rows() -> None:
    summary = json.loads((ROOT / "model_cards/memory/summary.json").read_text(encoding="utf-8"))
    assert memory.summarise(summary["results"])["exponents"] == summary["exponents"]


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link
