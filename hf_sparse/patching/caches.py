"""How a patched model comes to use the cache that grows in place, and to count what other caches cost it.

All hooks hang on the model itself, go when it is unpatched, and are copied and pickled with it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch.utils.hooks import RemovableHandle
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_sparse.cache import CACHE_NAMES, SparseCache, SparseLayer, given_cache, grow_in_place, set_cache_of_pass

# The method by which transformers' `generate` makes the cache that nobody passed to it.
_METHOD = "_prepare_cache_for_generation"


class _Place(NamedTuple):
    """Where a `forward` takes a cache: how many arguments come before it, and what it is called."""

    before: int
    name: str


@dataclass
class CacheHooks:
    """What `install` puts on a model, and what the model's caches cost.

    Attributes:
        forward: Counts, and gives a plain forward call its cache.
        handles: What removes it, and what tells the layers which cache a pass has; empty before `install`.
        generation: What was in the place of `generate`'s method on this very model, if anything.
    """

    forward: _BeforeForward
    generation: Any = None
    handles: list[RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel) -> CacheHooks:
        """Those of a model that is not patched; it is not changed yet."""
        return cls(_BeforeForward(_place_of_cache(type(model).forward)), vars(model).get(_METHOD))


@dataclass
class CacheCosts:
    """What the caches of a model cost it since it was patched.

    Attributes:
        concatenated_calls: Forward passes in which a cache made new tensors of all its keys and values.
        concatenated_bytes: What it copied for that.
        rounded_calls: Forward passes with a cache that holds keys and values in 8 bits.
    """

    concatenated_calls: int = 0
    concatenated_bytes: int = 0
    rounded_calls: int = 0

    def notes(self) -> tuple[str, ...]:
        """What a report should say about it."""
        copied = (
            f"{self.concatenated_calls} forward passes with a cache that makes new tensors of all its keys and "
            f"values: {self.concatenated_bytes:,} bytes copied, which hf_sparse.SparseCache saves"
        )
        rounded = f"{self.rounded_calls} forward passes with a cache that holds keys and values in 8 bits"
        counts = {copied: self.concatenated_calls, rounded: self.rounded_calls}
        return tuple(note for note, count in counts.items() if count)


@dataclass(eq=False)
class _BeforeForward:
    """Runs before the forward pass of a patched model.

    Attributes:
        place: How many arguments come before the cache in the model's `forward`, and its name; `None` if it takes none.
        costs: What it counted.
    """

    place: _Place | None
    costs: CacheCosts = field(default_factory=CacheCosts)

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            return None  # A graph that counts is compiled for one count.
        cache = _given_cache(self.place, args, kwargs)
        if cache is None and self.place is not None and _makes_a_cache(self.place, model, args, kwargs):
            return args, with_cache(model, kwargs, SparseCache(model.config))
        self._count(cache)
        return None

    def _count(self, cache: Any) -> None:
        layers = cache.layers if isinstance(cache, Cache) else []
        copied = sum(x.nbytes for layer in layers if type(layer) is DynamicLayer for x in _states(layer))
        if copied:
            self.costs.concatenated_calls += 1
            self.costs.concatenated_bytes += copied
        self.costs.rounded_calls += any(isinstance(layer, SparseLayer) and bool(layer.nbits) for layer in layers)


@dataclass(frozen=True)
class _HandOver:
    """Runs before the forward pass of a decoder, so that attention finds the keys in few bits that its cache keeps.

    Attributes:
        place: How many arguments come before the cache in the decoder's `forward`, and its name.
    """

    place: _Place | None

    def __call__(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # A graph knows by itself which layer of a cache it writes to.
        cache = _given_cache(self.place, args, kwargs)
        set_cache_of_pass(cache if isinstance(cache, Cache) else None)


class _BeforeGeneration:
    """Stands in for the method of `model` by which `generate` makes a cache.

    It hangs on the model and does not hold it, so that a model nobody needs any more is freed at once.
    """

    def __init__(self, model: PreTrainedModel, inner: Any) -> None:
        self._model = ref(model)
        self._inner = inner

    def __getstate__(self) -> tuple[PreTrainedModel, Any]:
        return self._held(), self._inner

    def __setstate__(self, state: tuple[PreTrainedModel, Any]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _held(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "the model that this hangs on is gone"
        return model

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        chosen = given_cache(model_kwargs) is not None or generation_config.cache_implementation is not None
        model = self._held()
        method = self._inner or MethodType(getattr(type(model), _METHOD), model)
        out = method(generation_config, model_kwargs, *args, **kwargs)
        cache = given_cache(model_kwargs)
        if not chosen and isinstance(cache, Cache):
            grow_in_place(cache)
        return out


def install(model: PreTrainedModel, hooks: CacheHooks) -> None:
    """Make `model` use caches that grow in place wherever nobody asks for another one."""
    hooks.handles.append(model.register_forward_pre_hook(hooks.forward, with_kwargs=True))
    # The decoder, for it may be called without the model around it.
    for decoder in _decoders(model):
        hand_over = _HandOver(_place_of_cache(type(decoder).forward))
        hooks.handles.append(decoder.register_forward_pre_hook(hand_over, with_kwargs=True))
    if hasattr(type(model), _METHOD):
        setattr(model, _METHOD, _BeforeGeneration(model, hooks.generation))


def remove(model: PreTrainedModel, hooks: CacheHooks) -> None:
    """Undo `install`, or what it came to."""
    for handle in hooks.handles:
        handle.remove()
    if isinstance(vars(model).get(_METHOD), _BeforeGeneration):
        if hooks.generation is None:
            delattr(model, _METHOD)
        else:
            setattr(model, _METHOD, hooks.generation)


def _decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models inside `model`, or itself, that take a cache and hold no other such model."""
    takers = [m for m in model.modules() if isinstance(m, PreTrainedModel) and _takes_a_cache(m)]
    return [taker for taker in takers if not any(m is not taker and m in takers for m in taker.modules())]


def _given_cache(place: _Place | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache that a forward call was given for the model's self-attention, by name or by place."""
    cache = given_cache(kwargs)
    if cache is None and place is not None and place.before < len(args):
        cache = args[place.before]
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _makes_a_cache(place: _Place, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model would make a dynamic cache in this forward pass, and nothing needs it to be one."""
    if len(args) > place.before or torch.is_grad_enabled():
        return False
    supports: Any = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return False
    use_cache = kwargs.get("use_cache")
    return bool(
        getattr(model.config.get_text_config(decoder=True), "use_cache", False) if use_cache is None else use_cache
    )


def with_cache(model: PreTrainedModel, kwargs: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """Arguments with `cache` among them, under the name that `model` has for it, in place of any other."""
    return {name: value for name, value in kwargs.items() if name not in CACHE_NAMES} | cache_argument(model, cache)


def cache_argument(taker: PreTrainedModel | type, cache: Cache | None) -> dict[str, Cache | None]:
    """`cache` as the keyword argument that a model, or a class, has for it; nothing if it takes none.

    A model that hands all further arguments on has the name that the model inside has.
    """
    forward = taker if isinstance(taker, type) else type(taker).forward
    place = _place_of_cache(forward)
    if place is None and not isinstance(taker, type):
        hands_on = any(x.kind is x.VAR_KEYWORD for x in inspect.signature(forward).parameters.values())
        inside = _decoders(taker) if hands_on else []
        place = next((_place_of_cache(type(decoder).forward) for decoder in inside), None)
    return {} if place is None else {place.name: cache}


def _takes_a_cache(model: PreTrainedModel) -> bool:
    return _place_of_cache(type(model).forward) is not None


@functools.cache
def _place_of_cache(forward: Callable[..., Any]) -> _Place | None:
    """Where a model's `forward` takes its cache, or `None` if it takes none."""
    names = list(inspect.signature(forward).parameters)
    return next((_Place(names.index(name) - 1, name) for name in CACHE_NAMES if name in names), None)


def _states(layer: DynamicLayer) -> list[torch.Tensor]:
    return [] if not layer.get_seq_length() else [x for x in (layer.keys, layer.values) if x is not None]
