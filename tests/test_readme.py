"""README and pages: their figures are those of the committed results, their links and commands exist."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse.bench import memory
from hf_sparse.cli.app import app
from hf_sparse.measure import perplexity_summary
from hf_sparse.measure.perplexity_summary import method_cells, overview_cells, perplexity_cells, verdict_cells
from hf_sparse.results import markdown_table

ROOT = Path(__file__).parents[1]
QUOTING = runpy.run_path(str(ROOT / "scripts/quote_tables.py"))
README = ROOT / "README.md"
PAGES = QUOTING["pages"]()
tables = QUOTING["tables"]

of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
PERPLEXITIES = sorted(
    path.with_name("summary.json")
    for path in ROOT.glob("model_cards/**/rows.jsonl")
    if not {"bench", "retrieval", "theory"} & set(path.parts)  # which reports make anew in other tests
)


@of_every_page
def test_quoted_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table:") == len(QUOTING["QUOTE"].findall(text))
    assert QUOTING["with_tables"](text) == text


@of_every_page
def test_marked_figures_are_those_of_the_results(page: Path) -> None:
    """Below `<!-- figures: PATH ... -->`, every number with a point or comma up to the next blank line."""
    number = re.compile(r"\d[\d,]*(?:\.\d+)?")
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- figures: (.+) -->\n((?:.+\n)+)", text)
    assert len(blocks) == text.count("<!-- figures:")
    for paths, block in blocks:
        known = {found for path in paths.split() for found in number.findall((ROOT / path).read_text(encoding="utf-8"))}
        figures = {found.strip(",") for found in number.findall(block)}
        assert {figure for figure in figures if "." in figure or "," in figure} <= known


def test_readme_quotes_tables_and_figures() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- table:") >= 1
    assert text.count("<!-- figures:") >= 3


def test_the_report_in_readme_is_that_of_such_a_model() -> None:
    """Budgets depend on the lengths alone, so small random layers report what those of the real model do."""
    shape = {"hidden_size": 72, "intermediate_size": 8, "vocab_size": 32, "max_position_embeddings": 2048}
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = hf_sparse.patch(LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval())
    prompt = torch.zeros(1, 1024, dtype=torch.int64)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert f"```text\n{hf_sparse.report(model)}\n```" in README.read_text(encoding="utf-8")


def test_code_in_readme_is_that_of_its_file() -> None:
    blocks = re.findall(r"<!-- code: (\S+) -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for path, code in blocks:
        assert code in (ROOT / path).read_text(encoding="utf-8")


@of_every_page
def test_printed_commands_exist(page: Path) -> None:
    """Every `hf-sparse` line of a code block names a command and options that it has."""
    group = typer.main.get_command(app)
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in "\n".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        if "hf-sparse" not in words or "hf_sparse.harness" in words:  # there it is the name of a model
            continue
        name, *arguments = words[words.index("hf-sparse") + 1 :]
        command = group.commands[name]  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known, line


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


@of_every_page
def test_linked_files_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).is_file(), link
