"""`Grid`: the records of an evaluation by method, length and document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_sparse.measure.statistics import CONFIDENCE, FloatArray
from hf_sparse.results import Record, Summary

_ABOUT = ("model", "dtype", "device", "device_name", "versions", "commit")


@dataclass(frozen=True)
class Grid:
    """Records of every method on the same documents at the same lengths.

    Attributes:
        records: In the order in which methods and documents are summarised.
        methods: Names.
        lengths: Tokens, rising.
        documents: Hashes of the texts.
    """

    records: Sequence[Record]
    methods: list[str]
    lengths: list[int]
    documents: list[str]
    _found: Mapping[tuple[str, int, str], Record]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Grid:
        """The grid of some records, documents and methods in the order in which they come."""
        methods = list(dict.fromkeys(record["method"] for record in records))
        documents = list(dict.fromkeys(record["text_sha256"] for record in records))
        found = {(record["method"], record["length"], record["text_sha256"]): record for record in records}
        return cls(records, methods, sorted({record["length"] for record in records}), documents, found)

    def at(self, method: str, length: int) -> list[Record]:
        """The record of each document."""
        return [self._found[method, length, document] for document in self.documents]

    def places(self) -> Iterator[tuple[str, int]]:
        """Every method at every length."""
        return ((method, length) for method in self.methods for length in self.lengths)

    def values(self, of: Callable[[Record], Any]) -> FloatArray:
        """What `of` gives of each record: `(methods, lengths, documents, ...)`."""
        return np.array([[list(map(of, self.at(m, n))) for n in self.lengths] for m in self.methods], dtype=np.float64)

    def describe(self, command: str, seed: int, samples: int) -> Summary:
        """What every summary says of its records and of how it was made from them."""
        names = {record["text_sha256"]: record["document"] for record in self.records}
        return {
            "command": command,
            "documents": [{"document": names[sha256], "text_sha256": sha256} for sha256 in self.documents],
            "about": {name: self.records[0][name] for name in _ABOUT},
            "lengths": self.lengths,
            "seed": seed,
            "samples": samples,
            "confidence": CONFIDENCE,
            "configs": {record["method"]: record["config"] for record in self.records},
        }
