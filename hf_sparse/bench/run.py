"""The measurements of a benchmark: one record per task and length, none of them made twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from tqdm import tqdm

from hf_sparse.bench.layer import Found, time_decode, time_prefill
from hf_sparse.bench.model import BenchModel
from hf_sparse.bench.tasks import COMMAND, BenchSettings
from hf_sparse.results import ResultFile, Row, row_key


@dataclass(frozen=True)
class Measurement:
    """One task at one length, by all methods.

    Attributes:
        task: One of `TASKS`.
        length: See `BenchSettings.lengths`.
        facts: What else decides the times: inputs, configuration, methods.
        run: Gives what was measured, by method.
    """

    task: str
    length: int
    facts: Mapping[str, Any]
    run: Callable[[], Found]


def measurements(model: BenchModel, settings: BenchSettings) -> Iterator[Measurement]:
    """All measurements of `settings`, the quick ones first."""
    rounds, left_out = settings.rounds, settings.left_out
    effort = {**asdict(rounds), "left_out": sorted(left_out)}
    if (inputs := model.inputs) is not None:
        config = settings.config
        facts = {"config": replace(config, dense_below=0).to_dict(), **inputs.describe(), **effort}
        for n in settings.lengths["decode"]:
            yield Measurement("decode", n, facts, partial(time_decode, inputs, n, config, rounds))
        for n in settings.lengths["prefill"]:
            yield Measurement("prefill", n, facts, partial(time_prefill, inputs, n, config, rounds, left_out))
    if (generation := model.generation) is not None:
        prompts = model.prompts
        facts = {"config": generation.config.to_dict(), "new_tokens": settings.new_tokens, **effort}
        for n in settings.lengths["cached"]:
            yield Measurement("cached", n, facts, partial(generation.from_cache, prompts[n + 1], rounds))
        for n in settings.lengths["generate"]:
            yield Measurement("generate", n, facts, partial(generation.from_prompt, prompts[n], rounds))
        for n in settings.lengths["padded"]:
            yield Measurement("padded", n, facts, partial(generation.from_prompt, prompts[n], rounds, pads=1))


def evaluate(wanted: Iterable[Measurement], results: ResultFile, about: Row) -> list[Row]:
    """Make every measurement that `results` does not hold yet, and return the records of all.

    All methods of a measurement are timed together, since only then can their times be compared.

    Args:
        wanted: The measurements.
        results: Where records are appended: `key`, `command`, `kind` (the task), `length`, `methods`, the measurement's
            facts and `about`.
        about: Machine, versions, threads and seed, which are part of the key but for the commit.
    """
    results.repair()
    done = results.rows()
    machine = {name: value for name, value in about.items() if name != "commit"}
    out = []
    with tqdm(list(wanted), desc=COMMAND, unit="measurement") as bar:
        for each in bar:
            bar.set_postfix_str(f"{each.task} {each.length:,}")
            place = {"command": COMMAND, "kind": each.task, "length": each.length}
            key = row_key(**place, **each.facts, **machine)
            if key not in done:
                results.append({"key": key, **place, **each.facts, "methods": each.run(), **about})
                done = results.rows()
            out.append(done[key])
    return out
