"""Benchmarks of a model with random weights or of a real one: one record for every task and length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_sparse.bench.card import card
from hf_sparse.bench.generation import Generation
from hf_sparse.bench.inputs import LayerInputs, capture, gaussian
from hf_sparse.bench.layer import Found, time_decode, time_prefill
from hf_sparse.bench.shapes import Shape, check_shape, random_model
from hf_sparse.bench.tasks import COMMAND, LAYER_TASKS, TASKS, BenchSettings
from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build
from hf_sparse.measure.data import load_documents
from hf_sparse.measure.windows import cut_windows
from hf_sparse.results import Record, ResultFile, provenance, record_key, resume
from hf_sparse.share.source import ModelSource, check_config

# Tokens of text on which a real layer's inputs are captured, at most; longer inputs repeat them.
_CAPTURED = 8192


@dataclass(frozen=True)
class BenchModel:
    """What is timed.

    Attributes:
        settings: What of it is measured, and how often.
        about: Provenance of every record.
        inputs: Of one layer; `None` if no layer is timed alone.
        generation: The whole model; `None` if it is not timed.
        prompts: Length -> int64 `(length,)`.
    """

    settings: BenchSettings
    about: Record
    inputs: LayerInputs | None
    generation: Generation | None
    prompts: dict[int, Tensor]

    def conditions(self, task: str) -> Record:
        """What decides the times of a task, besides `about` and length: inputs, configuration, methods."""
        settings = self.settings
        effort = {**asdict(settings.rounds), "left_out": sorted(settings.left_out)}
        if task in LAYER_TASKS:
            assert self.inputs is not None
            return {"config": replace(settings.config, dense_below=0).to_dict(), **self.inputs.describe(), **effort}
        assert self.generation is not None
        effort |= {"lossless": True} if settings.lossless else {}
        effort |= {"compiled": True} if settings.compiled and task == "cached" else {}
        return {"config": self.generation.config.to_dict(), "new_tokens": settings.new_tokens, **effort}

    def time(self, task: str, length: int) -> Found:
        """Times of all methods, which only compare because they are taken together."""
        config, rounds = self.settings.config, self.settings.rounds
        if task in LAYER_TASKS:
            assert self.inputs is not None
            if task == "decode":
                return time_decode(self.inputs, length, config, rounds)
            return time_prefill(self.inputs, length, config, rounds, self.settings.left_out)
        assert self.generation is not None
        if task == "cached":
            return self.generation.from_cache(self.prompts[length + 1], rounds)
        return self.generation.from_prompt(self.prompts[length], rounds, pads=int(task == "padded"))


def with_random_weights(
    settings: BenchSettings, name: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> BenchModel:
    """A model with random weights of a shape, called `name`.

    It stands for the sparse layers of a deeper one: all layers are sparse unless the configuration names dense ones.

    Raises:
        UserError: if it cannot be patched with the configuration, or does not fit into memory.
    """
    lengths, config = settings.prompt_lengths, settings.config
    check_shape(shape, config, dtype, device, weights=bool(lengths))
    ids = torch.randint(
        shape.vocab_size, (max(lengths, default=0),), generator=torch.Generator().manual_seed(settings.seed)
    )
    generation = None
    if lengths:
        sparse = config if config.dense_layers is not None else replace(config, dense_layers=())
        made = random_model(shape, dtype, device, settings.seed)
        generation = _generation(made, replace(settings, config=sparse), real=False)
    return BenchModel(
        settings,
        _about({"name": name, **asdict(shape)}, torch.empty(0, dtype=dtype, device=device), settings.seed),
        gaussian(shape, dtype, device, settings.seed) if settings.times_layer else None,
        generation,
        {length: ids[:length] for length in lengths},
    )


def loaded(settings: BenchSettings, source: ModelSource, text: str | None, dtype: str, device: str) -> BenchModel:
    """A real model, with the inputs of one of its layers and with prompts, both from a text.

    Raises:
        UserError: for a text, a model or a configuration that cannot be used.
    """
    info = source.info()
    captured = min(_CAPTURED, info["max_positions"] or _CAPTURED)
    lengths = sorted({*settings.prompt_lengths, *([captured] if settings.times_layer else [])})
    document = load_documents([] if text is None else [text], count=1, tokens=lengths[-1] + 1)[0]
    windows = cut_windows([document], source.tokenizer(), lengths, targets=1)
    prompts = {window.length: window.input_ids for window in windows}
    made = source.model(dtype=dtype, device_map=device)
    check_config(made, settings.config)
    return BenchModel(
        settings,
        _about({**info, "text_sha256": document.sha256}, made, settings.seed),
        capture(made, prompts[captured], settings.seed) if settings.times_layer else None,
        _generation(made, settings, real=True) if settings.prompt_lengths else None,
        prompts,
    )


def evaluate(model: BenchModel, results: ResultFile) -> list[Record]:
    """Make all measurements that `results` does not hold yet, and return the records of all.

    A record holds `key`, `command`, `kind` (the task), `length`, `methods`, the conditions of the task and the model's
    provenance; all but the times and the commit are part of the key.
    """
    machine = {name: value for name, value in model.about.items() if name != "commit"}
    wanted = {}
    for task in TASKS:
        for length in model.settings.lengths[task]:
            place = {"command": COMMAND, "kind": task, "length": length, **model.conditions(task)}
            wanted[record_key(**place, **machine)] = place

    def measure(missing: Mapping[str, Record]) -> Iterator[tuple[str, Record]]:
        with tqdm(missing.items(), desc=COMMAND, unit="measurement") as bar:
            for key, place in bar:
                bar.set_postfix_str(f"{place['kind']} {place['length']:,}")
                yield key, {**place, "methods": model.time(place["kind"], place["length"]), **model.about}

    return resume(results, wanted, measure)


def cpu_capability(device: torch.device) -> dict[str, str | int | None] | None:
    """The vector instructions in use on a CPU; `None` on other devices.

    Returns:
        `torch`: what PyTorch uses, such as `AVX2` or `AVX512`. `kernels`: the same of this package's compiled kernels,
        and when they were compiled, such as `avx2, compiled on first use`. `kernel_vector_bits`: the width of their
        vectors. Both are `None` where there are none.
    """
    if device.type != "cpu":
        return None
    about = build.description()
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "kernels": about,
        "kernel_vector_bits": None if about is None else 32 * cpu.lanes(),
    }


def _generation(model: PreTrainedModel, settings: BenchSettings, *, real: bool) -> Generation:
    return Generation(
        model,
        settings.config,
        settings.new_tokens,
        real,
        left_out=settings.left_out,
        lossless=settings.lossless,
        compiled=settings.compiled,
    )


def _about(model: Record, weights: PreTrainedModel | Tensor, seed: int) -> Record:
    about = {**provenance(model, weights, seed), "cpu_capability": cpu_capability(weights.device)}
    gpu = card(weights.device)
    return about if gpu is None else about | {"gpu": gpu}
