"""Files are written whole or not at all; whether a folder can be written to is found out without leaving a trace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_sparse.errors import UserError
from hf_sparse.results import check_writable, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*README\.md: Is a directory"):
        write_whole(tmp_path / "README.md", b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("folder", ["", "there", "new", "new/in/new"])
def test_a_folder_that_can_be_written_to_is_left_as_it_was(folder: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    check_writable(tmp_path / folder, ["file"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("folder", ["file", "file/under", "file/far/under"])
def test_a_file_in_the_way_is_named(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"cannot write to the folder .*{folder}: .*file is a file; name another one"):
        check_writable(tmp_path / folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*rows\.jsonl: it is a folder"):
        check_writable(tmp_path, ["summary.json", "rows.jsonl"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write to the folder .*: File name too long"):
        check_writable(tmp_path / "new" / ("x" * 300))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_is_closed_to_us_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    for folder in ("closed", "closed/new"):
        with pytest.raises(UserError, match=r"cannot write to the folder .*: Permission denied"):
            check_writable(tmp_path / folder)
