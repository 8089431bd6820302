"""Synthetic attention: the setting of arXiv 2404.02690 (independent bounded entries), and violations of it.

A query x_i meets n keys x_j with logits x_i^T W x_j. Tokens have d entries of unit variance; W has independent Gaussian
entries, scaled to the Frobenius norm R. For entries +1 or -1 the bound is B = 1, so that R = B^2 ||W||_F, and the
standard deviation of the logits over queries and keys is R exactly: the variance of sum_ab x_ia W_ab x_jb is the sum
of W_ab^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import lfilter

from hf_sparse.lab.experiment import Cell, Setting
from hf_sparse.measure.statistics import FloatArray
from hf_sparse.results import Record

Array = NDArray[np.float32]

TOKEN_DIM = 64
VALUE_DIM = 16


@dataclass(frozen=True)
class Input:
    """A law of random attention logits.

    Attributes:
        kind: Independent `logits` (normal: the random energy model; or Student's t), or logits of tokens: independent
            `signs` (the paper's assumptions), `normal` or `student` entries; `shared` and `copies`, signs with a common
            direction or repeated; `chain`, normal entries that are an AR(1) process along the tokens.
        norm: R(n) = norm * (ln n) ** growth.
        growth: How the norm grows; 0 for a fixed norm.
        shape: Degrees of freedom of Student's t; correlation of `shared` tokens and of neighbours in a `chain`;
            exponent in n of the number of different `copies`.
    """

    kind: Literal["logits", "student-logits", "signs", "normal", "student", "shared", "chain", "copies"]
    norm: float
    growth: float = 0.0
    shape: float = 0.0

    @classmethod
    def of(cls, cell: Record) -> Input:
        """The input of a cell, which holds the fields."""
        return cls(cell["kind"], cell["norm"], cell["growth"], cell["shape"])

    def fields(self) -> dict[str, Any]:
        """The attributes as a dictionary."""
        return asdict(self)

    @property
    def label(self) -> str:
        """A few words for tables and legends."""
        power = {0.0: "", 0.25: " (ln n)^1/4", 0.5: " sqrt(ln n)", 1.0: " ln n"}[self.growth]
        norm = f"{self.norm:g}{power}" if self.norm != 1 or not power else power.strip()
        what = {
            "logits": "normal logits",
            "student-logits": f"Student logits (df {self.shape:g})",
            "signs": "bounded tokens",
            "normal": "normal tokens",
            "student": f"Student tokens (df {self.shape:g})",
            "shared": f"tokens with common direction (correlation {self.shape:g})",
            "chain": f"correlated neighbours (AR(1), {self.shape:g})",
            "copies": f"n^{self.shape:g} different tokens",
        }[self.kind]
        return f"{what}, {'sigma' if 'logits' in self.kind else 'R'} = {norm}"

    def norm_at(self, n: int) -> float:
        """R(n)."""
        return float(self.norm * math.log(n) ** self.growth)


def by_input(records: Sequence[Record], length: str = "n") -> dict[str, list[Record]]:
    """The records of each input by its label, `length` rising."""
    groups: dict[str, list[Record]] = {Input.of(record).label: [] for record in records}
    for record in sorted(records, key=lambda record: int(record[length])):
        groups[Input.of(record).label].append(record)
    return groups


def over_rows(cell: Cell, setting: Setting, look: Callable[[Array, Array], ArrayLike]) -> FloatArray:
    """What `look` returns for the logits and values of each query of a cell, by repeat: `(repeats, rows, ...)`."""
    source, repeats = Input.of(cell), setting.rng(cell).spawn(cell["repeats"])
    return np.array([[look(*row) for row in draw_rows(source, cell["n"], cell["rows"], rng)] for rng in repeats])


def draw_rows(source: Input, n: int, rows: int, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """Attention of single queries: logits `(n,)` and the values `(n, VALUE_DIM)` that belong to the keys.

    Queries of independent logits have independent keys too; queries of tokens are drawn from the n tokens, over the
    same keys and one W. Values have independent entries of mean 0 and variance 1, given W: a fixed random map of
    the tokens, or normal where there are no tokens. All randomness comes from `rng`.
    """
    norm = np.float32(source.norm_at(n))
    if source.kind in ("logits", "student-logits"):
        values = rng.standard_normal((n, VALUE_DIM), np.float32)
        for _ in range(rows):
            normal = source.kind == "logits"
            yield norm * (rng.standard_normal(n, np.float32) if normal else _student(rng, source.shape, (n,))), values
        return
    tokens = _tokens(source, n, rng)
    weight = rng.standard_normal((TOKEN_DIM, TOKEN_DIM), np.float32)
    weight *= norm / np.linalg.norm(weight)
    values = tokens @ (rng.standard_normal((TOKEN_DIM, VALUE_DIM), np.float32) / np.float32(math.sqrt(TOKEN_DIM)))
    for query in rng.integers(n, size=rows):
        yield tokens @ (tokens[query] @ weight), values


def _tokens(source: Input, n: int, rng: np.random.Generator) -> Array:
    shape = source.shape
    match source.kind:
        case "signs":
            return _signs(rng, n)
        case "normal":
            return rng.standard_normal((n, TOKEN_DIM), np.float32)
        case "student":
            return _student(rng, shape, (n, TOKEN_DIM))
        case "shared":
            common = math.sqrt(shape) * _signs(rng, 1)
            return np.asarray(common + math.sqrt(1 - shape) * _signs(rng, n), np.float32)
        case "chain":
            noise = math.sqrt(1 - shape**2) * rng.standard_normal((n, TOKEN_DIM), np.float32)
            noise[0] /= math.sqrt(1 - shape**2)  # stationary from the first token on
            return np.asarray(lfilter([1.0], [1.0, -shape], noise, axis=0), np.float32)
        case _:
            return np.resize(_signs(rng, math.ceil(n**shape)), (n, TOKEN_DIM))


def _signs(rng: np.random.Generator, n: int) -> Array:
    return np.asarray(2 * rng.integers(2, size=(n, TOKEN_DIM), dtype=np.int8) - 1, np.float32)


def _student(rng: np.random.Generator, freedom: float, size: tuple[int, ...]) -> Array:
    """Student's t with unit variance: more than two degrees of freedom."""
    return np.asarray(rng.standard_t(freedom, size) * math.sqrt((freedom - 2) / freedom), np.float32)
