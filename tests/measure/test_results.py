from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_sparse.errors import UserError
from hf_sparse.results import (
    Record,
    ResultFile,
    commit,
    markdown_table,
    provenance,
    record_key,
    resume,
    text_table,
    write_json,
)
from hf_sparse.share.source import describe
from tests import tiny


def test_rows_come_back_by_key_with_their_time(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "new" / "rows.jsonl")
    assert results.records() == {}
    results.append({"key": "a", "nll": 1.5})
    results.append({"key": "b", "nll": 2.5})
    results.append({"key": "a", "nll": 9.0})
    rows = results.records()
    assert {key: row["nll"] for key, row in rows.items()} == {"a": 1.5, "b": 2.5}
    assert rows["a"]["time"].endswith("+00:00")


@pytest.mark.parametrize("torn", ['{"key": "b", "nl', '{"key": "b"}', "\x00\x00"])
def test_a_line_that_a_killed_run_left_is_cut_off(tmp_path: Path, torn: str) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    results.repair()
    results.append({"key": "a"})
    whole = results.path.read_text()
    with results.path.open("a") as file:
        file.write(torn)
    results.repair()
    assert results.path.read_text() == whole
    results.append({"key": "c"})
    assert list(results.records()) == ["a", "c"]


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    results.path.write_text('{"key')
    results.repair()
    assert results.records() == {}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "Expecting value"),
        (b"garbage", "Expecting value"),
        (b'{"key": "b", "nl', "Unterminated string"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b"7", "it must be a JSON object with a key"),
        (b'{"nll": 1.0}', "it must be a JSON object with a key"),
        (b'{"key": ["b"]}', "it must be a JSON object with a key"),
        (b'{"key": "\xe9"}', "'utf-8' codec can't decode"),
    ],
)
def test_a_line_in_the_middle_that_is_no_row_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    results.path.write_bytes(b'{"key": "a"}\n' + line + b'\n{"key": "c"}\n')
    results.repair()
    with pytest.raises(UserError, match=rf"rows\.jsonl: line 2 is not a record: {why}.*; delete the file, or take"):
        results.records()


def test_an_unfinished_last_line_is_no_row(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    results.path.write_text('{"key": "a"}\n{"key": "b"')
    assert list(results.records()) == ["a"]


def test_rows_that_are_a_folder_are_refused(tmp_path: Path) -> None:
    for use in (ResultFile.records, ResultFile.repair):
        with pytest.raises(UserError, match="it cannot be read: Is a directory; delete the file"):
            use(ResultFile(tmp_path))


def test_rows_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*rows\.jsonl: Is a directory"):
        ResultFile(tmp_path / "rows.jsonl").append({"key": "a"})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*new\.jsonl: only a part of a record was written; is the"):
            ResultFile(tmp_path / "new.jsonl").append({"key": "a"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_what_stored_rows_lack_is_said_and_errors_with_new_ones_are_ours(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    results.append({"key": "a"})
    with pytest.raises(KeyError, match="nll"), results.summed_up():
        results.records()["a"]["nll"]
    stored = ResultFile(results.path)
    with (
        pytest.raises(UserError, match=r"rows\.jsonl: its records cannot be summed up: KeyError: 'nll'; delete"),
        stored.summed_up(),
    ):
        stored.records()["a"]["nll"]


def _write_many(path: Path, name: str) -> None:
    for i in range(200):
        ResultFile(path).append({"key": f"{name}{i}", "padding": "x" * 3000})


def test_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(ResultFile(path).records()) == 400


def test_resume_measures_what_is_missing_and_keeps_the_order(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    cells = {"a": 1, "b": 2, "c": 3}
    asked: list[list[str]] = []

    def measure(missing: dict[str, int]) -> Iterator[tuple[str, Record]]:
        asked.append(list(missing))
        for key, cell in reversed(missing.items()):
            if cell == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield key, {"value": 10 * cell}

    with pytest.raises(KeyboardInterrupt):
        resume(results, cells, measure)
    assert list(results.records()) == ["c"]
    with results.path.open("a") as file:
        file.write('{"key": "b", "val')  # the interrupted record
    assert [record["value"] for record in resume(results, cells, measure)] == [10, 20, 30]
    assert [record["value"] for record in resume(results, cells, measure)] == [10, 20, 30]
    assert asked == [["a", "b", "c"], ["a", "b"], []]


def test_a_number_that_json_lacks_is_refused(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.append({"key": "a", "nll": float("nan")})
    assert results.records() == {}


def test_the_key_depends_on_values_and_not_on_their_order() -> None:
    assert record_key(a=1, b={"x": 1, "y": 2}) == record_key(b={"y": 2, "x": 1}, a=1)
    assert len({record_key(a=1), record_key(a=2), record_key(a="1"), record_key(b=1)}) == 4


def test_provenance_says_what_is_needed_to_repeat_a_run_and_no_path() -> None:
    model = tiny.model("llama")
    about = provenance(describe("tiny", "abc", model.config), model, seed=3)
    assert about["model"] == {"name": "tiny", "revision": "abc", "max_positions": 256, "architecture": "llama"}
    assert (about["dtype"], about["device"], about["seed"]) == ("float32", "cpu", 3)
    assert set(about["versions"]) == {"hf_sparse", "torch", "transformers", "python"}
    assert {"commit", "threads", "device_name"} <= set(about)
    assert str(Path.home()) not in json.dumps(about)
    assert str(Path(__file__).parents[2]) not in json.dumps(about)


def test_the_commit_is_one_or_absent() -> None:
    found = commit()
    assert found is None or len(found.removesuffix("-dirty")) == 40


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 2})
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_tables_are_aligned() -> None:
    header, rows = ["method", "n"], [["topk", "512"], ["a longer one", "8"]]
    assert text_table(header, rows).splitlines() == [
        "method          n",
        "topk          512",
        "a longer one    8",
    ]
    assert markdown_table(header, rows).splitlines() == [
        "| method | n |",
        "| --- | ---: |",
        "| topk | 512 |",
        "| a longer one | 8 |",
    ]
