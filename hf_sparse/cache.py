"""A key-value cache that grows in place, and keeps its keys in few bits for the selectors.

transformers' dynamic cache makes new tensors of all keys and values for every token. Here they lie in storage with
room to spare, which grows geometrically, and what a layer gets is a view of the part in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from itertools import count
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from hf_sparse.call import take_keys
from hf_sparse.errors import UserError
from hf_sparse.kernels.int8 import Int8States
from hf_sparse.kernels.pages import ask_for_large_pages
from hf_sparse.kernels.quantised import QuantisedKeys

# Storage grows to the length it needs and this share on top, at least `_LEAST_SPARE` tokens.
_SPARE = 1 / 8
_LEAST_SPARE = 256

# What models and `generate` call the cache that they are given: transformers 5.24 gave it the shorter name.
CACHE_NAMES = ("cache", "past_key_values")

States = tuple[Tensor, Tensor]

# Keys by which a copy is told from other keys.
_COMPARED = 16


class SparseCache(DynamicCache):
    """The cache that a patched model's `generate` uses; pass it as `past_key_values` to use it by hand.

    Layers with full attention grow in place (`SparseLayer`); all others, sliding windows among them, are those that
    `DynamicCache` has for them.

    Args:
        config: The model's configuration.
        nbits: Bits of a component of a key or value in layers with full attention: 8, with a scale for every 32 of them
            (`Int8States`), or `None` for the dtype of the model. A prefill attends to what is stored, as decoding does.
        offloading: Keep layers on the CPU and bring each to its device in time, as `DynamicCache` does.
        offload_only_non_sliding: Leave layers with a sliding window where they are.

    Raises:
        TypeError: if `config` is something else.
        ValueError: for another number of bits.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        nbits: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be the model's configuration, model.config; got {type(config).__name__}")
        if nbits not in (None, 8):
            raise ValueError(f"nbits must be 8, or None for the dtype of the model; got {nbits!r}")
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        grow_in_place(self, nbits)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of the keys in few bits beside them, with the room for further tokens."""
        return sum(_bytes_of(layer) for layer in self.layers)


class SparseLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of the cache whose keys and values grow in place.

    `keys` and `values` are views `(batch, kv_heads, length, head_dim)` into storage that may be longer. What was
    handed out before a `crop` shows what is written after it. Outside `torch.no_grad`, they are concatenated as in
    `DynamicLayer`: a backward pass may want what was handed out, for queries that learn if for nothing else.

    With `nbits=8`, both are `Int8States` from the first token on, and nothing may want a gradient.

    Attributes:
        nbits: 8, or `None` for keys and values in the dtype that they come in.
        handle: Its number, by which `layer_of` finds it: int64, a tensor so that another cache is no reason to compile
            anew.
        quantised: The keys in few bits.
    """

    def __init__(self, nbits: int | None = None, **kwargs: Any) -> None:
        self.nbits = nbits
        self.quantised = QuantisedKeys()
        self._storage: tuple[Tensor, Tensor] | None = None
        self._length = 0
        # What is held where there is no storage.
        self._plain: tuple[Tensor | None, Tensor | None] = (None, None)
        # How often keys and values had been written to when this class last did so, to notice others who write to them.
        # Not known after a compiled forward pass, which counts its own writes when it is over.
        self._versions: tuple[int | None, int | None] | None = (None, None)
        # A copy without the keys that padding hides inside of texts, and the positions of those in it.
        self._without_hidden: tuple[Tensor, SparseLayer] | None = None
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._register()

    def __getstate__(self) -> dict[str, Any]:
        self._notice_changes()
        return {name: value for name, value in vars(self).items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()  # PyTorch counts anew how often copies are written to.
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        _layers[number] = self
        self.handle = torch.tensor(number, device="cpu")

    @property
    def keys(self) -> Tensor | None:
        """The keys of all tokens, or `None` before the first."""
        return self._plain[0] if self._storage is None else _first(self._storage[0], self._length)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._hold(states, self.values)

    @property
    def values(self) -> Tensor | None:
        """Their values."""
        return self._plain[1] if self._storage is None else _first(self._storage[1], self._length)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._hold(self.keys, states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; there is no storage before there is something to store."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        if self._storage is not None:
            return self._length
        keys = self._plain[0]
        return 0 if keys is None or keys.numel() == 0 else keys.shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(batch, kv_heads, new, head_dim)`, and return all keys and values."""
        if self.nbits:
            _refuse_for_8_bits(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._notice_changes()
        new, length = (key_states, value_states), self.get_seq_length()
        if torch.is_grad_enabled() and not self.nbits:
            held = zip(self._states(), new, strict=True) if length else [(x,) for x in new]
            key, value = (torch.cat(parts, dim=-2) for parts in held)
            self._storage, self._plain = None, (key, value)
        else:
            total = length + key_states.shape[-2]
            storage = self._with_room(key_states, value_states, length, total)
            for part, states in zip(storage, new, strict=True):
                _write(part, length, states)
            self._storage, self._length, self._plain = storage, total, (None, None)
            key, value = (_first(part, total) for part in storage)
        if compiling:
            self._versions = None
            _written.clear()
            _written.append(self)
        else:
            self._remember()
        return key, value

    def holds(self, key: Tensor) -> bool:
        """Whether `key` `(batch, kv_heads, length, head_dim)` is what this layer holds, itself or a copy.

        A copy is recognised by some of its vectors, the last one among them.
        """
        keys = self.keys
        if not self.is_initialized or keys is None or keys.shape != key.shape or keys.device != key.device:
            return False
        own, other = _stored(keys), _stored(key)
        if own.data_ptr() == other.data_ptr() and own.stride() == other.stride():
            return True
        some = torch.arange(_COMPARED, device=key.device) * (key.shape[2] - 1) // (_COMPARED - 1)
        return keys.dtype == key.dtype and bool(torch.equal(keys[:, :, some], key[:, :, some]))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of those in few bits, with the room for further tokens."""
        held = self._plain if self._storage is None else self._storage
        copied = 0 if self._without_hidden is None else self._without_hidden[1].nbytes
        return sum(_nbytes(x) for x in held if x is not None) + self.quantised.nbytes + copied

    @torch.no_grad()
    def without_hidden(self, shown: Tensor, states: States | None = None) -> tuple[Tensor, Tensor, QuantisedKeys]:
        """Keys and values at the positions `shown`, int64 `(batch, number)`, alone, and these keys in few bits.

        The copy is kept, and grows with this layer: for a new token, one key and value are copied.

        Args:
            shown: The positions.
            states: All keys and values, where they are not (yet) those of this layer.
        """
        kept = self._without_hidden
        length = 0 if kept is None else kept[0].shape[1]
        if kept is None or length > shown.shape[1] or not torch.equal(kept[0], shown[:, :length]):
            length, kept = 0, (shown, SparseLayer(self.nbits))
        layer = kept[1]
        if length < shown.shape[1]:
            states = self._states() if states is None else states
            added = shown[:, None, length:].expand(-1, states[0].shape[1], -1)
            layer.update(*(take_keys(part, added) for part in states))
        self._without_hidden = (shown, layer)
        return *layer._states(), layer.quantised

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._start_anew()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: `-tokens_to_remove` of them. The storage stays."""
        self._notice_changes()
        # Away until all is done: where it is cut short, there are none, and not those of other keys.
        quantised, self.quantised = self.quantised, QuantisedKeys()
        if self._storage is None or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            # `generate` of transformers 5.17 counts rejected tokens in a tensor, for which a graph cannot be compiled.
            self._length = max(0, self._length + int(tokens_to_remove))
        self._without_hidden = None
        quantised.crop(self.get_seq_length())
        self.quantised = quantised  # What was set by the crop are the same keys.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences `beam_idx` in the places of the present ones."""
        self._rearrange(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        self._rearrange(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` alone (places, or a bool for each)."""
        self._rearrange(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move keys and values to the CPU; those in few bits stay."""
        self._change_storage(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move keys and values back."""
        self._change_storage(lambda x: x.to(self.device, non_blocking=True))

    def _start_anew(self) -> None:
        """Keep what is held, and nothing that follows from it."""
        self._plain, self._storage = (self.keys, self.values), None
        self._without_hidden = None
        self.quantised = QuantisedKeys()
        self._remember()

    def _hold(self, keys: Tensor | None, values: Tensor | None) -> None:
        """What somebody else has put here."""
        self._plain, self._storage = (keys, values), None
        self._start_anew()

    def _notice_changes(self) -> None:
        if self._versions is None:
            self._remember()
        elif self._versions != self._present_versions():
            self._start_anew()

    def _remember(self) -> None:
        self._versions = self._present_versions()

    def _present_versions(self) -> tuple[int | None, int | None]:
        keys, values = self._plain if self._storage is None else self._storage
        return _version_of(keys), _version_of(values)

    def _states(self) -> States:
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys, values

    def _with_room(self, key: Tensor, value: Tensor, length: int, total: int) -> States:
        """Storage for more than `total` tokens that holds the first `length`."""
        storage = self._storage
        if length:
            shape = self._states()[0].shape if storage is None else storage[0].shape
            if key.shape[:2] != shape[:2]:
                raise ValueError(
                    f"the cache holds keys of (batch, kv_heads) = {tuple(shape[:2])}; "
                    f"got keys of {tuple(key.shape[:2])}"
                )
        # Never filled to the last place: a graph that was compiled for a part of the storage does not hold for all.
        if (
            storage is not None
            and total < storage[0].shape[2]
            and storage[0].shape[:2] == key.shape[:2]
            and storage[0].device == key.device
            and _can_be_written(_stored(storage[0]))
        ):
            return storage
        room = total + max(_LEAST_SPARE, int(total * _SPARE))
        grown = self._allocate(key, room), self._allocate(value, room)
        if length:
            for part, old in zip(grown, self._states(), strict=True):
                _write(part, 0, old)
        return grown

    def _allocate(self, states: Tensor, room: int) -> Tensor:
        shape = (*states.shape[:2], room, states.shape[3])
        new = Int8States.empty(shape, states) if self.nbits else states.new_empty(shape)
        if not torch.compiler.is_compiling():
            ask_for_large_pages(_stored(new))
        return new

    def _rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        self._notice_changes()
        quantised, self.quantised = self.quantised, QuantisedKeys()  # as in `crop`
        self._change_storage(change)
        quantised.rearrange(change)
        self.quantised = quantised

    def _change_storage(self, change: Callable[[Tensor], Tensor]) -> None:
        length = self.get_seq_length()
        if not length:
            return
        self._notice_changes()
        self._without_hidden = None
        keys, values = self._states() if self._storage is None else self._storage
        changed = _changed(keys, change), _changed(values, change)
        self._storage, self._length, self._plain = changed, length, (None, None)
        self._remember()


# By number, as long as they live.
_layers: WeakValueDictionary[int, SparseLayer] = WeakValueDictionary()
_numbers = count(1)


def layer_of(handle: int) -> SparseLayer | None:
    """The layer whose `handle` is this number, as long as it lives."""
    return _layers.get(handle)


def _first(states: Tensor, length: int) -> Tensor:
    """The keys or values of the first tokens, where they lie."""
    return states.part(0, length) if isinstance(states, Int8States) else states.narrow(2, 0, length)


def _write(storage: Tensor, start: int, states: Tensor) -> None:
    """Copy `states` `(batch, kv_heads, new, dim)` into the places from `start` on."""
    if isinstance(storage, Int8States):
        storage.write(start, states)
    else:
        storage.narrow(2, start, states.shape[2]).copy_(states)


def _changed(states: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return states.map(change) if isinstance(states, Int8States) else change(states)


def _stored(states: Tensor) -> Tensor:
    """What lies in memory of keys or values."""
    return states.codes if isinstance(states, Int8States) else states


def _nbytes(states: Tensor) -> int:
    """Bytes of them."""
    return states.codes.nbytes + states.scales.nbytes if isinstance(states, Int8States) else states.nbytes


def _bytes_of(layer: Any) -> int:
    """Bytes of the keys and values of any layer of a cache."""
    if isinstance(layer, SparseLayer):
        return layer.nbytes
    return sum(x.nbytes for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None)


def _refuse_for_8_bits(*states: Tensor) -> None:
    """Refuse what 8 bits cannot do.

    Raises:
        UserError: where a gradient is wanted, and while `torch.compile` looks into a model.
    """
    if torch.compiler.is_compiling():
        _refuse_to_compile()
    if torch.is_grad_enabled() and any(x.requires_grad for x in states):
        raise UserError("a cache with nbits=8 has no gradients: run the model under torch.no_grad()")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_to_compile() -> None:
    """Runs as it is: what is raised inside of a graph in the making only makes PyTorch give up the graph."""
    raise UserError("a cache with nbits=8 does not work under torch.compile: use SparseCache without nbits")


def _can_be_written(states: Tensor) -> bool:
    """Whether to write into a tensor here: what was made in inference mode cannot be written to outside of it."""
    return torch.compiler.is_compiling() or not states.is_inference() or torch.is_inference_mode_enabled()


def _version_of(states: Tensor | None) -> int | None:
    """How often a tensor, or what it is a view of, was written to; `None` where PyTorch does not count that."""
    if states is None:
        return None
    states = _stored(states)
    return None if states.is_inference() else states._version


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model or of `generate`, or `None`."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def grow_in_place(cache: Cache, nbits: int | None = None) -> None:
    """Replace the layers of a cache that hold full attention by such as grow in place, and hold the same."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = growing = SparseLayer(nbits)
            if layer.keys is not None and layer.values is not None:
                growing.update(layer.keys, layer.values)


# Of each thread, for several may run one model.
_of_pass: ContextVar[ref[Cache] | None] = ContextVar("hf_sparse_cache_of_pass", default=None)


def set_cache_of_pass(cache: Cache | None) -> None:
    """Say which cache the forward pass has that begins in this thread. It is not kept alive."""
    _of_pass.set(None if cache is None else ref(cache))


def cache_of_pass() -> Cache | None:
    """The cache of the forward pass under way in this thread, or of the last one, if it had one that is still there."""
    held = _of_pass.get()
    return None if held is None else held()


# While `torch.compile` looks into a model, the layer that was written to last: its attention comes next.
_written: list[SparseLayer] = []


def written_layer() -> SparseLayer | None:
    """The layer that a graph in the making has written to since this was asked last, if it grows in place."""
    return _written.pop() if len(_written) else None


def layer_that_holds(cache: Cache, layer: int, key: Tensor) -> SparseLayer | None:
    """The layer of a cache that grows in place and holds `key`: that of index `layer`, or one it shares keys with."""
    for found in (*cache.layers[layer : layer + 1], *cache.layers):
        if isinstance(found, SparseLayer) and found.holds(key):
            return found
    return None
