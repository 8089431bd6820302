"""Whole models through `generate`: from a prompt, or from a cache that is full already."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

import hf_sparse
from hf_sparse.bench import dense
from hf_sparse.bench.layer import SPARSE
from hf_sparse.bench.timing import alternate, synchronize, with_peak
from hf_sparse.cache import SparseCache
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.observe import observed
from hf_sparse.patching import base_model

BASELINE = "dynamic-cache"
"""What a user has without doing anything: SDPA and the default cache."""

STATIC = "static-cache"

# Where nothing is compiled, so short a text loads all that a first call loads.
_WARM_UP_TOKENS = 256
# Tokens of text whose keys and values fill a real model's cache, repeated.
_CAPTURED_TOKENS = 2048


@dataclass(frozen=True)
class Written:
    """What one `generate` did.

    Attributes:
        first_token: Seconds from the call to its first token.
        token: Seconds for each token after the first, on average; NaN if there was one only.
        tokens: The tokens.
        density: Kept over visible keys of a patched model; 1 for a dense one.
    """

    first_token: float
    token: float
    tokens: list[int]
    density: float


class _Clock(BaseStreamer):
    """Notes when each token is there."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device

    def put(self, value: Tensor) -> None:
        synchronize(self._device)
        self.times.append(perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class Generation:
    """A model, and how it is made to write.

    Attributes:
        model: Not patched.
        config: Of the patch.
        new_tokens: Tokens to write.
        real: Whether the model was trained: then its tokens mean something, and its own keys fill caches.
        leave_out: Methods not to measure.
    """

    model: PreTrainedModel
    config: SparseAttentionConfig
    new_tokens: int
    real: bool
    leave_out: frozenset[str] = frozenset()

    @property
    def methods(self) -> list[str]:
        """What is measured: dense methods, then ours."""
        kernels = dense.backends(self.model.device)
        return [name for name in (BASELINE, STATIC, *kernels) if name not in self.leave_out] + [SPARSE]

    def from_prompt(self, prompt: Tensor, repeats: int, seconds: float) -> dict[str, dict[str, Any]]:
        """Measure everything from a prompt, int64 `(tokens,)`, to the last new token; see `_measure`."""
        short = prompt[:_WARM_UP_TOKENS] if self.model.device.type == "cpu" else prompt
        return self._measure(
            {name: lambda: None for name in self.methods},
            prompt,
            short,
            ("first_token", "token"),
            repeats,
            seconds,
        )

    def from_cache(self, prompt: Tensor, repeats: int, seconds: float) -> dict[str, dict[str, Any]]:
        """Measure tokens after caches that hold all of a prompt, int64 `(tokens,)`, but its last token.

        The caches are filled directly, not by a prefill: with Gaussian keys and values, or with those that the
        dense model has on the first tokens of the prompt, repeated (`real` models).
        """
        make = _cache_maker(self.model, prompt, self.real, self.new_tokens)
        return self._measure({name: make(name) for name in self.methods}, prompt, prompt, ("token",), repeats, seconds)

    def _measure(
        self,
        caches: dict[str, Callable[[], Cache | None]],
        prompt: Tensor,
        short: Tensor,
        quantities: tuple[str, ...],
        repeats: int,
        seconds: float,
    ) -> dict[str, dict[str, Any]]:
        """Warm up and time every method.

        Returns:
            Method -> `samples` (quantity -> one value a repeat, in seconds), `warm_up` in seconds, `peak_mib` above
            what was in use before the call (the model, and the full cache if there was one), `density`, and
            `tokens`; for a real model `same_tokens`, how many are those of the baseline before the first that is not.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, cache in caches.items():
            begin = perf_counter()
            self._write(name, short, None if short is not prompt else cache())
            found[name] = {"warm_up": perf_counter() - begin, "peak_mib": None}

        def sampler(name: str) -> Callable[[], dict[str, float]]:
            def sample() -> dict[str, float]:
                given = caches[name]()
                written, peak = with_peak(lambda: self._write(name, prompt, given), self.model.device)
                facts = found[name]
                if peak is not None:
                    facts["peak_mib"] = max(facts["peak_mib"] or 0.0, round(peak / 2**20, 1))
                facts |= {"density": written.density, "tokens": written.tokens}
                return {quantity: getattr(written, quantity) for quantity in quantities}

            return sample

        for name, samples in alternate({name: sampler(name) for name in caches}, repeats, seconds).items():
            found[name]["samples"] = samples
        for facts in found.values() if self.real else ():
            facts["same_tokens"] = _agreement(facts["tokens"], found[self.methods[0]]["tokens"])
        return found

    @torch.no_grad()
    def _write(self, name: str, prompt: Tensor, cache: Cache | None) -> Written:
        device = self.model.device
        clock = _Clock(device)
        arguments: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if name == STATIC and cache is None:
            arguments["cache_implementation"] = "static"
        ids = prompt[None].to(device)
        with self._as(name):
            synchronize(device)
            begin = perf_counter()
            out = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=False,
                streamer=clock,
                **arguments,
            )
            density = hf_sparse.report(self.model).density if name == SPARSE else 1.0
        _, first, *later = clock.times  # the prompt comes first
        token = (later[-1] - first) / len(later) if later else float("nan")
        return Written(first - begin, token, out[0, len(prompt) :].tolist(), density)

    @contextmanager
    def _as(self, name: str) -> Iterator[None]:
        """The model as a method has it."""
        if name == SPARSE:
            with hf_sparse.patched(self.model, self.config):
                yield
        else:
            with dense.pinned(name if name in dense.backends(self.model.device) else None):
                yield


def _agreement(tokens: list[int], right: list[int]) -> int:
    pairs = zip(tokens, right, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(right))


def _cache_maker(
    model: PreTrainedModel, prompt: Tensor, real: bool, new_tokens: int
) -> Callable[[str], Callable[[], Cache]]:
    """Method -> what makes its cache, each time the same."""
    length = len(prompt) - 1
    states = list(_captured(model, prompt, length) if real else _random(model, length))

    def make(name: str) -> Callable[[], Cache]:
        config = model.config.get_text_config()
        filled: Cache = SparseCache(config) if name == SPARSE else DynamicCache(config=config)
        if name == STATIC:
            filled = StaticCache(config=config, max_cache_len=length + 1 + new_tokens)
        for layer, (key, value) in enumerate(states):
            filled.update(key, value, layer)
        return lambda: copy.deepcopy(filled)

    return make


def _random(model: PreTrainedModel, length: int) -> Iterator[tuple[Tensor, Tensor]]:
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
