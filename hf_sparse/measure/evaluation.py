"""Measurements of every input under every method: patched, counted, resumable, and shared between processes."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.methods import Methods
from hf_sparse.measure.retrieval_prompts import Prompt
from hf_sparse.measure.windows import Window
from hf_sparse.monitor import SparsityReport
from hf_sparse.patching import patched
from hf_sparse.results import Record, ResultFile, identity, is_main_process, my_share, record_key, resume

InputT = TypeVar("InputT", Window, Prompt)
"""What a model reads."""


def measure_each(
    command: str,
    inputs: Sequence[InputT],
    methods: Methods,
    results: ResultFile,
    about: Record,
    measure: Callable[[InputT, str], Record],
) -> list[Record]:
    """Measure every input under every method that `results` does not hold yet, and return the records of all.

    Under `accelerate launch` each process takes its share; all get all records. A record is what `measure` returns for
    an input and the name of a method, with `key`, `command`, `method`, `config`, what is known about the input, and
    `about`, the `provenance`.
    """
    configs = {name: None if config is None else config.to_dict() for name, config in methods.items()}
    model = identity(about)
    cells = {
        record_key(command=command, model=model, window=each.sha256, method=name, config=configs[name]): (each, name)
        for each in inputs
        for name in methods
    }

    def measured(missing: dict[str, tuple[InputT, str]]) -> Iterator[tuple[str, Record]]:
        mine = my_share(list(missing.items()), lambda item: item[1][0].length)
        for key, (each, name) in tqdm(mine, desc=command, unit="run", disable=not is_main_process()):
            place = {"command": command, "method": name, **each.about()}
            yield key, {**place, **measure(each, name), "config": configs[name], **about}

    return resume(results, cells, measured)


@contextmanager
def applied(model: PreTrainedModel, config: SparseAttentionConfig | None) -> Iterator[None]:
    """The model patched with `config`, which must suit it, in a `with` block, or as it is if `None`."""
    if config is None:
        yield
        return
    with warnings.catch_warnings(), ExitStack() as stack:
        # A fixed budget is measured for comparison: no warning is needed.
        warnings.filterwarnings("ignore", message=".*grow no faster than log")
        try:
            stack.enter_context(patched(model, config))
        except ValueError as error:
            raise UserError(str(error)) from error
        yield


def check_finite(nll: Tensor, document: str, model: PreTrainedModel) -> None:
    """Refuse likelihoods that are not finite, with the names of document and dtype."""
    if not nll.isfinite().all():
        raise UserError(f"the likelihoods of {document} are not finite in {model.dtype}: try another --dtype")


def sum_counts(
    report: SparsityReport, sliding_layers: Collection[int] = (), before: SparsityReport | None = None
) -> Record:
    """What a patched model kept, over all layers and heads.

    Args:
        report: Of the model.
        sliding_layers: Layers that do not count for `sparse_density`.
        before: An earlier report of the same patch, whose counts are subtracted.

    Returns:
        `density` (kept / visible keys), `sparse_density` (the same without `sliding_layers`), `mean_keys` kept by a
        query and head, `rows` (queries, summed over the layers), and `dense_rows`, those of them that ran dense, by
        reason.
    """
    earlier = {(row["layer"], row["head"]): row for row in before.rows} if before else {}
    heads: list[dict[str, Any]] = []
    for row in report.rows:
        old = earlier.get((row["layer"], row["head"]), {})
        counts = {name: row[name] - old.get(name, 0) for name in ("rows", "visible", "kept")}
        dense = Counter(row["dense_rows"]) - Counter(old.get("dense_rows", {}))
        heads.append({"layer": row["layer"], "dense": dense, **counts})
    layers = {head["layer"]: head for head in heads}.values()  # all heads of a layer have the same queries
    return {
        "density": _density(heads),
        "sparse_density": _density([head for head in heads if head["layer"] not in sliding_layers]),
        "mean_keys": math.fsum(head["kept"] / max(1, head["rows"]) for head in heads) / len(heads),
        "rows": sum(layer["rows"] for layer in layers),
        "dense_rows": dict(sum((layer["dense"] for layer in layers), Counter[str]())),
    }


def _density(heads: Sequence[Mapping[str, int]]) -> float:
    return sum(head["kept"] for head in heads) / sum(head["visible"] for head in heads)
