"""Whole models through `generate`: after a prompt, or after a cache that is full without a prefill."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from hf_sparse.bench import dense
from hf_sparse.bench.layer import Found
from hf_sparse.bench.tasks import COMPILED, DYNAMIC, IN_PLACE, LOSSLESS, SPARSE, STATIC
from hf_sparse.bench.timing import Rounds, mebibytes, synchronize, with_peak
from hf_sparse.cache import SparseCache
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.diagnostics import observed
from hf_sparse.errors import first_line
from hf_sparse.lossless import generate_lossless
from hf_sparse.measure.windows import common_start
from hf_sparse.patching import base_model, is_patched, patch, patched, report
from hf_sparse.patching.caches import cache_argument

WARM_UP_TOKENS = 256
"""Length of a prompt that loads all that a first call loads, on the CPU, where nothing is compiled."""

# Tokens of text whose keys and values fill a real model's cache, repeated.
_CAPTURED_TOKENS = 2048

# Calls after which a compiled model compiles nothing anew: what differs between calls is no constant of a graph then.
_COMPILING_CALLS = 3


class Clock(BaseStreamer):
    """The `times` at which the prompt and each new token are handed over."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device

    def put(self, value: Tensor) -> None:
        """Note the time, once the device is done."""
        synchronize(self._device)
        self.times.append(perf_counter())

    def end(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Generation:
    """A model and how it generates.

    Attributes:
        model: Not patched.
        config: Of the patch.
        new_tokens: Tokens to generate, at least 2.
        real: Whether the model is trained: its tokens are compared then, and caches hold its own keys.
        left_out: Methods that are not measured.
        lossless: Whether `IN_PLACE` and `LOSSLESS` are measured.
        compiled: Whether all of `COMPILED` are measured after full caches.
    """

    model: PreTrainedModel
    config: SparseAttentionConfig
    new_tokens: int
    real: bool
    left_out: frozenset[str] = frozenset()
    lossless: bool = False
    compiled: bool = False
    _copies: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def methods(self) -> list[str]:
        """All methods, the baseline first."""
        names = [DYNAMIC, STATIC, *dense.backends(self.model.device)]
        names += [IN_PLACE, LOSSLESS] if self.lossless else []
        return [name for name in (*names, SPARSE) if name not in self.left_out]

    def from_prompt(self, prompt: Tensor, rounds: Rounds, pads: int = 0) -> Found:
        """Measure all methods after a prompt, int64 `(tokens,)`, behind `pads` pad tokens; see `_measure`.

        With any, stock transformers form a mask of n x n, and SDPA kernels that take no mask are left out.
        """
        kernels = dense.backends(self.model.device) if pads else []
        short = prompt[:WARM_UP_TOKENS] if self.model.device.type == "cpu" else prompt
        caches: dict[str, Callable[[], Cache | None]] = {
            name: partial(SparseCache, self.model.config.get_text_config()) if name == IN_PLACE else lambda: None
            for name in self.methods
            if name not in kernels
        }
        return self._measure(caches, prompt, short, pads, ("first_token", "token"), rounds)

    def from_cache(self, prompt: Tensor, rounds: Rounds) -> Found:
        """Measure all methods after a cache that holds a prompt, int64 `(tokens,)`, but its last token.

        Keys and values are Gaussian, or, for a real model, those of the dense model on the first tokens, repeated.
        """
        length = len(prompt) - 1
        states = list(_captured(self.model, prompt, length) if self.real else _gaussian(self.model, length))
        full = {name: self._full_cache(name, states) for name in self.methods}
        if self.compiled:
            self._copies.update(self._compiled_copies())
            full |= {name: full[plain] for name, plain in COMPILED.items() if plain in full}
        caches = {name: partial(copy.deepcopy, cache) for name, cache in full.items()}
        return self._measure(caches, prompt, prompt, 0, ("token",), rounds)

    @torch.no_grad()
    def _full_cache(self, name: str, states: Sequence[tuple[Tensor, Tensor]]) -> Cache:
        config = self.model.config.get_text_config()
        ours = name in (SPARSE, IN_PLACE, LOSSLESS)
        cache: Cache = SparseCache(config) if ours else DynamicCache(config=config)
        if name == STATIC:
            cache = StaticCache(config=config, max_cache_len=states[0][0].shape[2] + 1 + self.new_tokens)
        for layer, (key, value) in enumerate(states):
            cache.update(key, value, layer)
        return cache

    def _measure(
        self,
        caches: Mapping[str, Callable[[], Cache | None]],
        prompt: Tensor,
        short: Tensor,
        pads: int,
        quantities: tuple[str, ...],
        rounds: Rounds,
    ) -> Found:
        """Warm up on `short`, the prompt or its start, and time every method, each with its cache, on `prompt`.

        Returns:
            Method -> `samples` (quantity -> seconds in each round), `warm_up` in seconds, `peak_mib` above what was in
            use before the call (the model, and the full cache if there was one), `density`, and `tokens`; for
            `LOSSLESS` `drafts`, its counters; for a real model `same_tokens`, the number of leading tokens equal to the
            baseline's; or `skipped`: the reason why an SDPA kernel does not run, or a model is not compiled whole.
        """
        found: Found = {}
        for name, cache in caches.items():
            begin = perf_counter()
            try:
                for _ in range(_COMPILING_CALLS if name in COMPILED else 1):
                    self._generate(name, short, pads, cache())
            except RuntimeError as error:
                if name not in (*dense.backends(self.model.device), *COMPILED):
                    raise
                found[name] = {"skipped": f"{type(error).__name__}: {first_line(error)}"}
                continue
            found[name] = {"warm_up": perf_counter() - begin, "peak_mib": None}

        def sampler(name: str) -> Callable[[], dict[str, float]]:
            def sample() -> dict[str, float]:
                cache, facts = caches[name](), found[name]
                call = partial(self._generate, name, prompt, pads, cache)
                (times, own), peak = with_peak(call, self.model.device)
                facts |= own
                if peak is not None:
                    facts["peak_mib"] = max(facts["peak_mib"] or 0.0, mebibytes(peak))
                return {quantity: times[quantity] for quantity in quantities}

            return sample

        working = {name: facts for name, facts in found.items() if "skipped" not in facts}
        # What is compiled only now would be measured with the tokens.
        with torch.compiler.set_stance("fail_on_recompile" if COMPILED.keys() & working.keys() else "default"):
            for name, samples in rounds.alternate({name: sampler(name) for name in working}).items():
                found[name]["samples"] = samples
        for facts in working.values() if self.real else ():
            facts["same_tokens"] = common_start(facts["tokens"], found[next(iter(caches))]["tokens"])
        return found

    @torch.no_grad()
    def _generate(
        self, name: str, prompt: Tensor, pads: int, cache: Cache | None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Seconds to the `first_token` and per later `token`; the other facts about one call."""
        model: Any = self._copies.get(name, self.model)
        device = model.device
        clock = Clock(device)
        ids, mask = (functional.pad(x, (pads, 0))[None].to(device) for x in (prompt, torch.ones_like(prompt)))
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if cache is not None:
            arguments |= cache_argument(self.model, cache)
        elif name == STATIC:
            arguments["cache_implementation"] = "static"
        generate = partial(generate_lossless, model) if name == LOSSLESS else model.generate
        with self._set_up(name):
            synchronize(device)
            begin = perf_counter()
            out = generate(
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=False,
                streamer=clock,
                **arguments,
            )
            facts: dict[str, Any] = {"density": 1.0}
            if is_patched(model):
                facts["density"] = report(model).density
            if name == LOSSLESS:
                facts["drafts"] = asdict(report(model).drafts)
        _, first, *later = clock.times  # the prompt comes first
        times = {"first_token": first - begin, "token": (later[-1] - first) / len(later)}
        return times, {**facts, "tokens": out[0, ids.shape[1] :].tolist()}

    def _set_up(self, name: str) -> AbstractContextManager[object]:
        """A context in which the model attends by a method."""
        if name in COMPILED:
            return nullcontext()
        if name in (SPARSE, LOSSLESS):
            return patched(self.model, self.config)
        return dense.pinned(name if name in dense.backends(self.model.device) else None)

    def _compiled_copies(self) -> dict[str, Any]:
        """A copy of the model for each of `COMPILED`, with the same weights, not compiled yet for any cache.

        One of them is patched once and for all: for another patch, it would be compiled anew.
        """
        torch.compiler.reset()
        weights = {id(x): x for x in (*self.model.parameters(), *self.model.buffers())}
        models = {name: copy.deepcopy(self.model, dict(weights)) for name in COMPILED}
        for name, model in models.items():
            if COMPILED[name] == SPARSE:
                patch(model, self.config)
            model.forward = torch.compile(model.forward, fullgraph=True)
        return models


def _gaussian(model: PreTrainedModel, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    config = model.config
    for _ in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        key, value = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        yield key, value


@torch.no_grad()
def _captured(model: PreTrainedModel, prompt: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of every layer on the first tokens of the prompt, repeated up to `length`."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with observed(model, lambda layer, inputs: found.update({layer: (inputs.key, inputs.value)})):
        ids = prompt[None, : min(_CAPTURED_TOKENS, length)].to(model.device)
        base_model(model).base_model(input_ids=ids, use_cache=False)
    for layer in sorted(found):
        key, value = found[layer]
        place = torch.arange(length, device=key.device) % key.shape[2]
        yield key[:, :, place], value[:, :, place]
