"""Whole models through `generate`: from a prompt, or from a cache that is full already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hf_sparse
from hf_sparse.bench import dense
from hf_sparse.bench.full_caches import STATIC, cache_maker
from hf_sparse.bench.layer import SPARSE
from hf_sparse.bench.timing import alternate, synchronize, with_peak
from hf_sparse.config import SparseAttentionConfig

BASELINE = "dynamic-cache"
"""What a user has without doing anything: SDPA and the default cache."""

# Where nothing is compiled, so short a text loads all that a first call loads.
_WARM_UP_TOKENS = 256


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


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on with.

    Attributes:
        tokens: int64 `(tokens,)`.
        pads: Pad tokens before them, which are masked.
    """

    tokens: Tensor
    pads: int = 0

    def __len__(self) -> int:
        return self.pads + len(self.tokens)

    def start(self, length: int) -> Prompt:
        """Its first `length` tokens, behind the same pad tokens."""
        return Prompt(self.tokens[:length], self.pads)

    def arguments(self, device: torch.device) -> dict[str, Tensor]:
        """Ids, 0 for a pad token, and mask `(1, pads + tokens)`, as `generate` takes them."""
        sides = (self.pads, 0)
        ids, mask = functional.pad(self.tokens, sides), functional.pad(torch.ones_like(self.tokens), sides)
        return {"input_ids": ids[None].to(device), "attention_mask": mask[None].to(device)}


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
        return self._from_prompt(self.methods, Prompt(prompt), repeats, seconds)

    def from_padded(self, prompt: Tensor, repeats: int, seconds: float) -> dict[str, dict[str, Any]]:
        """The same with a pad token before the prompt, for which stock transformers form a mask of n x n.

        Kernels that take no mask are left out.
        """
        methods = [name for name in self.methods if name not in dense.backends(self.model.device)]
        return self._from_prompt(methods, Prompt(prompt, pads=1), repeats, seconds)

    def from_cache(self, prompt: Tensor, repeats: int, seconds: float) -> dict[str, dict[str, Any]]:
        """Measure tokens after caches that hold all of a prompt, int64 `(tokens,)`, but its last token.

        The caches are filled directly, not by a prefill: with Gaussian keys and values, or with those that the
        dense model has on the first tokens of the prompt, repeated (`real` models).
        """
        make, whole = cache_maker(self.model, prompt, self.real, self.new_tokens), Prompt(prompt)
        return self._measure({name: make(name) for name in self.methods}, whole, whole, ("token",), repeats, seconds)

    def _from_prompt(
        self, methods: Sequence[str], prompt: Prompt, repeats: int, seconds: float
    ) -> dict[str, dict[str, Any]]:
        short = prompt.start(_WARM_UP_TOKENS) if self.model.device.type == "cpu" else prompt
        caches = {name: lambda: None for name in methods}
        return self._measure(caches, prompt, short, ("first_token", "token"), repeats, seconds)

    def _measure(
        self,
        caches: Mapping[str, Callable[[], Cache | None]],
        prompt: Prompt,
        short: Prompt,
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
            facts["same_tokens"] = _agreement(facts["tokens"], found[next(iter(caches))]["tokens"])
        return found

    @torch.no_grad()
    def _write(self, name: str, prompt: Prompt, cache: Cache | None) -> Written:
        device = self.model.device
        clock = _Clock(device)
        arguments: dict[str, Any] = prompt.arguments(device)
        if cache is not None:
            arguments["past_key_values"] = cache
        if name == STATIC and cache is None:
            arguments["cache_implementation"] = "static"
        with self._as(name):
            synchronize(device)
            begin = perf_counter()
            out = self.model.generate(  # type: ignore[operator]
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
