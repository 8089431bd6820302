from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document, embedded_documents, load_documents
from hf_sparse.measure.windows import check_lengths, cut_windows
from tests import small


def test_a_file_is_one_document_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("größe", encoding="utf-8")
    [document] = load_documents([str(tmp_path / "a.txt")])
    assert (document.name, document.text) == ("a.txt", "größe")
    assert document.sha256 == hashlib.sha256("größe".encode()).hexdigest()


def test_a_folder_is_its_texts_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.png", "d.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "e.txt").mkdir()
    assert [d.name for d in load_documents([str(tmp_path)], count=1)] == ["a.md", "b.txt", "d.txt"]


def _parquet(path: Path, column: str, values: list[Any]) -> str:
    Dataset.from_dict({column: values}).to_parquet(path)
    return str(path)


def test_rows_of_a_parquet_file_are_joined_until_long_enough(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", "text", ["one\n", "", None, "two", "three\n", "four\n", "five\n"])
    documents = load_documents([path], count=2, tokens=1)
    assert [(d.name, d.text) for d in documents] == [
        ("a.parquet[0]", "one\ntwo\n"),
        ("a.parquet[1]", "three\nfour\n"),
    ]
    assert len(load_documents([path], count=100)) == 5


def test_rows_that_never_suffice_are_still_a_document(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", "body", ["one", "two"])
    [document] = load_documents([path], column="body", tokens=1000)
    assert document.text == "one\ntwo\n"


def test_the_embedded_text_is_cut_into_even_parts() -> None:
    parts = embedded_documents(4)
    sizes = [len(part.text) for part in parts]
    assert len({part.sha256 for part in parts}) == 4
    assert max(sizes) < 1.5 * min(sizes)
    assert sum(sizes) == pytest.approx(len(embedded_documents(1)[0].text), rel=1e-4)
    assert load_documents([], count=3) == embedded_documents(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: str(p / "missing.txt"), "no such file"),
        (lambda p: str(p / "missing"), "no such file"),
        (lambda p: "not a data set!", "not a Hub data set"),
        (lambda p: str(p / "empty"), "holds no .txt or .md file"),
        (lambda p: str(p / "latin.txt"), "latin.txt cannot be read as UTF-8"),
        (lambda p: str(p / "broken.parquet"), "broken.parquet"),
        (lambda p: str(p / "numbers.parquet"), "column 'text' of numbers.parquet holds int, not text"),
        (lambda p: str(p / "other.parquet"), "other.parquet has no column 'text'; it has 'body'"),
        (lambda p: str(p / "blank.parquet"), "blank.parquet holds no text"),
    ],
)
def test_unusable_sources_are_named_in_one_line(tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"gr\xf6\xdfe")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    _parquet(tmp_path / "numbers.parquet", "text", [1, 2])
    _parquet(tmp_path / "other.parquet", "body", ["x"])
    _parquet(tmp_path / "blank.parquet", "text", ["", "\n"])
    with pytest.raises(UserError) as caught:
        load_documents([make(tmp_path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_text_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("same", encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.txt and a\.txt are the same text"):
        load_documents([str(tmp_path)])


def test_a_hub_data_set_is_streamed_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((arguments, options))
        return [{"text": f"row {i} of {arguments[0]}"} for i in range(2)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    documents = load_documents(["user/set:config-v1@train", "user/set2"], count=1)
    assert asked == [
        (("user/set", "config-v1"), {"streaming": True, "split": "train"}),
        (("user/set2", None), {"streaming": True, "split": "test"}),
    ]
    assert [d.name for d in documents] == ["user/set:config-v1@train[0]", "user/set2[0]"]


def test_a_hub_out_of_reach_is_one_line_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'user/set' on the Hub\nlong explanation")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"cannot read the data set user/set: Couldn't reach .*; pass a text file"):
        load_documents(["user/set"])


def test_every_length_predicts_the_same_tokens_from_more_context() -> None:
    ids = small.word_ids(100)
    document = Document("a", small.words(100))
    windows = cut_windows([document], small.tokenizer(bos=False), [8, 20], targets=5, offset=10)
    assert [window.length for window in windows] == [8, 20]
    for window in windows:
        assert window.targets.tolist() == ids[26:31]
        assert window.input_ids.tolist() == ids[30 - window.length : 30]


def test_the_first_token_is_the_tokenizers_bos_once() -> None:
    ids = small.word_ids(100)
    [window] = cut_windows([Document("a", small.words(100))], small.tokenizer(), [20], targets=20)
    assert window.input_ids.tolist() == [small.BOS_ID, *ids[1:20]]
    assert window.targets.tolist() == ids[1:21]


def test_the_hash_of_a_window_tells_what_is_predicted_from_what() -> None:
    documents = [Document("a", small.words(100)), Document("b", small.words(100)), Document("c", small.words(100, 1))]
    tokenizer = small.tokenizer()
    same = [cut_windows([document], tokenizer, [20], 5)[0].sha256 for document in documents]
    other = [cut_windows(documents[:1], tokenizer, [20], 6)[0], cut_windows(documents[:1], tokenizer, [20], 5, 1)[0]]
    assert same[0] == same[1]
    assert len({same[0], same[2], *(window.sha256 for window in other)}) == 4


def test_a_text_too_short_says_how_long_it_is_and_should_be() -> None:
    with pytest.raises(UserError, match="a is too short: it has 30 tokens, and 31 are needed"):
        cut_windows([Document("a", small.words(30))], small.tokenizer(), [10, 20], 5, offset=10)
    assert cut_windows([Document("a", small.words(31))], small.tokenizer(), [10, 20], 5, offset=10)


@pytest.mark.parametrize(
    ("lengths", "targets", "maximum", "message"),
    [
        ([], 1, None, "got none"),
        ([8, -1], 1, None, "got 8,-1"),
        ([8, 4], 1, None, "must rise.*got 8,4"),
        ([8, 8], 1, None, "must rise"),
        ([8, 16], 9, None, "between 1 and the shortest length.*got 9"),
        ([8, 16], 0, None, "between 1 and"),
        ([8, 16], 8, 15, "length 16 is above the model's maximum of 15"),
    ],
)
def test_lengths_that_cannot_be_evaluated_are_refused(
    lengths: list[int], targets: int, maximum: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_lengths(lengths, targets, maximum)


def test_lengths_up_to_the_maximum_are_taken() -> None:
    check_lengths([8, 16], 8, 16)
    check_lengths([8, 16], 1, None)
