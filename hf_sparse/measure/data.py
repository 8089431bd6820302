"""Where the evaluated texts come from: files, folders, parquet files, Hub data sets, or the standard library."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse.errors import UserError, first_line

TEXT_SUFFIXES = (".txt", ".md")
DEFAULT_SPLIT = "test"

# A document of so many characters a token is long enough in most languages; a shorter one is refused later.
_CHARS_PER_TOKEN = 8

_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")
_HUB_ADVICE = "pass a text file or folder, or set HF_HUB_OFFLINE=1 to use what was downloaded before"


@dataclass(frozen=True)
class Document:
    """A text with a name that holds no folder of the machine, and the SHA-256 (hex) of its UTF-8 bytes."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the text, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_documents(sources: Sequence[str], *, count: int = 4, column: str = "text", tokens: int = 0) -> list[Document]:
    """Read the documents that `sources` name, in their order.

    Args:
        sources: Each a text file, a folder (its `.txt` and `.md` files by name), a `.parquet` file or a Hub data set
            `id[:config][@split]`, which is streamed. None at all: `embedded_documents`.
        count: Documents made of each data set, parquet file or of the embedded text; files and folders are read whole.
        column: Column that holds the text of a data set or parquet file.
        tokens: Consecutive rows of a data set, which may hold a paragraph each (wikitext), are joined until a document
            is long enough for that many tokens.

    Raises:
        UserError: if a source cannot be found, reached or read, holds no text, or names a text twice.
    """
    if not sources:
        return embedded_documents(count)
    documents = [document for source in sources for document in _load(source, count, column, _CHARS_PER_TOKEN * tokens)]
    seen: dict[str, str] = {}
    for document in documents:
        if document.sha256 in seen:
            raise UserError(f"{document.name} and {seen[document.sha256]} are the same text: pass it once")
        seen[document.sha256] = document.name
    return documents


def embedded_documents(count: int) -> list[Document]:
    """`count` documents of about equal size, from the language reference in the standard library.

    The text (`pydoc_data.topics`, about 460,000 characters) needs no network and no file, but differs between Python
    versions: compare results by their text hash.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    whole = sum(map(len, texts))
    parts: list[list[str]] = [[] for _ in range(count)]
    done = 0
    for text in texts:
        parts[min(count - 1, done * count // whole)].append(text)
        done += len(text)
    return [Document(f"pydoc_data.topics {i + 1}/{count}", "\n\n".join(part)) for i, part in enumerate(parts)]


def _load(source: str, count: int, column: str, min_chars: int) -> Iterable[Document]:
    if not source.strip():
        raise UserError(f"{source!r} is not a text: pass a file, a folder or a Hub data set (id[:config][@split])")
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{source} holds no {' or '.join(TEXT_SUFFIXES)} file")
        return [_read(file) for file in files]
    if path.is_file() and path.suffix == ".parquet":
        rows = _rows(path.name, column, "cannot be read", "parquet", data_files=str(path), split="train")
        return _joined(path.name, rows, count, min_chars)
    if path.is_file():
        return [_read(path)]
    hub = _HUB.fullmatch(source)
    if path.suffix in (*TEXT_SUFFIXES, ".parquet") or hub is None:
        raise UserError(f"{source}: no such file or folder, and not a Hub data set (id[:config][@split])")
    split = hub["split"] or DEFAULT_SPLIT
    rows = _rows(source, column, _HUB_ADVICE, hub["id"], hub["config"], split=split)
    return _joined(source, rows, count, min_chars)


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} cannot be read as UTF-8 text: {first_line(error)}") from error
    return Document(path.name, text)


def _rows(name: str, column: str, advice: str, *arguments: Any, **options: Any) -> Iterator[str]:
    """The texts of a data set, streamed; what `datasets` raises as one line."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        for row in load_dataset(*arguments, streaming=True, **options):
            if column not in row:
                raise UserError(f"{name} has no column {column!r}; it has {', '.join(map(repr, row))}")
            if not isinstance(row[column], str | None):
                raise UserError(f"column {column!r} of {name} holds {type(row[column]).__name__}, not text")
            yield row[column] or ""
    except UserError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot read the data set {name}: {first_line(error)}; {advice}") from error


def _joined(name: str, rows: Iterator[str], count: int, min_chars: int) -> list[Document]:
    """The first `count` documents of at least `min_chars` characters; a shorter one only if there is no other."""
    documents: list[Document] = []
    text = ""
    for row in rows:
        text += row if row.endswith("\n") or not row else row + "\n"
        if text.strip() and len(text) >= min_chars:
            documents.append(Document(f"{name}[{len(documents)}]", text))
            text = ""
        if len(documents) == count:
            break
    if not documents and text.strip():
        documents.append(Document(f"{name}[0]", text))
    if not documents:
        raise UserError(f"{name} holds no text")
    return documents
