"""Whole models through `generate`: results of a tiny one, times of a few layers of Llama-8B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_sparse
from gpu import settings
from gpu.cases import Case, SkippedError, compared
from gpu.machine import Ceilings, Machine
from hf_sparse.bench.generation import Generation
from hf_sparse.bench.shapes import SHAPES, random_model
from hf_sparse.bench.tasks import DYNAMIC
from hf_sparse.bench.timing import Rounds
from tests import tiny

LIMITS = {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Largest error of logits. Rounding can let another key win, of two that are almost equally important."""


def generated(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, new: int, engine: str, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """New tokens `(batch, new)` and their logits `(batch, new, vocabulary)`."""
    with hf_sparse.patched(model, settings.config(engine=engine, alpha=4.0, min_keys=32)):
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **arguments,
        )
        density = hf_sparse.report(model).density
    assert density < 1, "every query kept all its keys: nothing was tested"
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def logits_compared(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], limit: float) -> dict[str, Any]:
    """The logits of each sequence up to the first token in which they differ: after it, they are of two texts."""
    same = (one[0] == other[0]).long().cumprod(1).sum(1)
    parts = [(slice(i, i + 1), slice(0, int(count) + 1)) for i, count in enumerate(same)]
    got, want = (torch.cat([logits[part].flatten(0, 1) for part in parts]) for _, logits in (one, other))
    return compared(got, want, limit) | {"same_tokens": same.tolist(), "tokens": one[0].shape[1]}


def generate(machine: Machine) -> Iterator[Case]:
    """Two layers with peaked attention, both sparse."""
    length, new = machine.pick((1500, 32), (150, 3))

    def case(name: str, dtype: torch.dtype, run: Callable[[PreTrainedModel], dict[str, Any]]) -> Case:
        def with_model() -> dict[str, Any]:
            sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256}
            model = tiny.model("llama", dtype, max_position_embeddings=4096, **sizes)
            return run(model.to(machine.device))

        return Case(name, with_model, {"dtype": str(dtype), "prompt": length})

    ids, mask, _ = tiny.padded([length, length // 2, length - 40], "left")
    ids, mask = ids.to(machine.device), mask.to(machine.device)

    def engines(model: PreTrainedModel) -> dict[str, Any]:
        ours, plain = (generated(model, ids[:1], mask[:1], new, engine) for engine in ("triton", "gather"))
        return logits_compared(ours, plain, LIMITS[model.dtype])

    def padded(model: PreTrainedModel) -> dict[str, Any]:
        together = generated(model, ids, mask, new, "triton")
        alone = [
            generated(model, ids[i : i + 1, -int(n) :], mask[i : i + 1, -int(n) :], new, "triton")
            for i, n in enumerate(mask.sum(1))
        ]
        parts = (torch.cat(part) for part in zip(*alone, strict=True))
        return logits_compared(together, (next(parts), next(parts)), LIMITS[model.dtype])

    def static(model: PreTrainedModel, *, compiled: bool = False) -> dict[str, Any]:
        options = {"cache_implementation": "static", "disable_compile": not compiled}
        fixed = generated(model, ids, mask, new, "triton", **options)
        return logits_compared(fixed, generated(model, ids, mask, new, "triton"), LIMITS[model.dtype])

    def automatic(model: PreTrainedModel) -> dict[str, Any]:
        chosen = generated(model, ids, mask, new, "auto")
        return logits_compared(chosen, generated(model, ids, mask, new, "gather"), LIMITS[model.dtype])

    for dtype in (torch.float32, *machine.dtypes[:-1]):
        yield case(f"triton against gather, {dtype}", dtype, engines)
    yield case("padded against alone", torch.float32, padded)
    yield case("static cache against growing cache", torch.float32, static)
    yield case("engine auto against gather, padded", torch.float32, automatic)
    # What `generate` does with such a cache on a GPU, if nobody forbids it.
    yield case("static cache, CUDA graphs", torch.float32, partial(static, compiled=True))


def _generation(machine: Machine) -> Generation:
    shape = SHAPES[machine.pick("llama-8b", "smollm2-135m")].part(machine.pick(4, 2))
    model = random_model(shape, machine.half, machine.device, seed=0)
    return Generation(model, settings.config(dense_layers=None), machine.pick(16, 2), real=False)


def _one(generation: Generation, name: str) -> Generation:
    left_out = frozenset(generation.methods) - {name}
    return Generation(generation.model, generation.config, generation.new_tokens, real=False, left_out=left_out)


def _timed(machine: Machine, length: int, quantity: str) -> Iterator[Case]:
    """One case a method, stock transformers first; `ratio` is its time over that of the method."""
    generation, ceilings = _generation(machine), Ceilings.of(machine)
    text, rounds = torch.arange(length) % 7, Rounds(repeats=2, seconds=4)

    @cache
    def found(name: str) -> dict[str, Any]:
        own = _one(generation, name)
        results = own.from_cache(text, rounds) if quantity == "token" else own.from_prompt(text, rounds)
        if "skipped" in results[name]:
            raise SkippedError(results[name]["skipped"][:500])
        return dict(results[name])

    def seconds(name: str) -> float:
        return median(found(name)["samples"][quantity])

    def run(name: str) -> dict[str, Any]:
        facts = {key: found(name).get(key) for key in ("warm_up", "peak_mib", "density")}
        ratio = seconds(DYNAMIC) / seconds(name)
        return facts | predicted() | {"measured_us": round(seconds(name) * 1e6, 1), "ratio": ratio}

    def predicted() -> dict[str, float]:
        """Of dense attention."""
        config, model = generation.model.config, generation.model
        weights = sum(weight.numel() for weight in model.parameters())
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length
        width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
        if quantity == "token":
            return ceilings.predicted(bytes=(weights + cached) * model.dtype.itemsize, flop=2.0 * weights)
        return ceilings.predicted(
            bytes=weights * model.dtype.itemsize, flop=2.0 * weights * length + 2.0 * width * length**2
        )

    for name in generation.methods:
        yield Case(
            name,
            lambda name=name: run(name),
            {"length": length, "layers": generation.model.config.num_hidden_layers},
        )


def time_decode(machine: Machine, length: int) -> Iterator[Case]:
    """Seconds a token, after a cache of that length."""
    return _timed(machine, machine.pick(length, 600), "token")


def time_prefill(machine: Machine, length: int) -> Iterator[Case]:
    """Seconds to the first token."""
    return _timed(machine, machine.pick(length, 400), "first_token")
