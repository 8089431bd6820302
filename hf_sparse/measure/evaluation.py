"""Every input measured under every method, resumable, shared between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from tqdm import tqdm

from hf_sparse.machine import is_main_process, my_share
from hf_sparse.measure.methods import Methods
from hf_sparse.results import Record, ResultFile, identity, record_key, resume


class Input(Protocol):
    """What a model reads: a window or a prompt."""

    @property
    def length(self) -> int:
        """Tokens, by which the work is shared."""

    @property
    def sha256(self) -> str:
        """Hash of all tokens that decide a measurement."""

    def about(self) -> Record:
        """What records say of it."""


InputT = TypeVar("InputT", bound=Input)


def measure_each(
    command: str,
    inputs: Sequence[InputT],
    methods: Methods,
    results: ResultFile,
    about: Record,
    measure: Callable[[InputT, str], Record],
) -> list[Record]:
    """Measure every input under every method that `results` does not hold yet, and return the records of all.

    Under `accelerate launch` each process takes its share; all get all records.

    Args:
        command: Name of the command.
        inputs: What is read.
        methods: Configurations by name.
        results: Where records are appended: what `measure` returns, with `key`, `command`, `method`, `config`, what is
            known about the input, and `about`.
        about: From `provenance`.
        measure: Takes an input and the name of a method.
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
