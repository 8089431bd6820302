"""A key-value cache that grows in place, and keeps its keys in few bits for the selectors.

transformers' dynamic cache makes new tensors of all keys and values for every token. Here they lie in storage with
room to spare, which grows geometrically, and what a layer gets is a view of the part in use.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from hf_sparse.call import take_keys
from hf_sparse.kernels.quantised import QuantisedKeys

# Storage grows to the length it needs and this share on top, at least `_LEAST_SPARE` tokens.
_SPARE = 1 / 8
_LEAST_SPARE = 256

# Keys by which a copy is told from other keys.
_COMPARED = 16


class SparseCache(DynamicCache):
    """The cache that a patched model's `generate` uses; pass it as `past_key_values` to use it by hand.

    Layers with full attention grow in place (`SparseLayer`); all others, sliding windows among them, are those that
    `DynamicCache` has for them.

    Args:
        config: The model's configuration.
        offloading: Keep layers on the CPU and bring each to its device in time, as `DynamicCache` does.
        offload_only_non_sliding: Leave layers with a sliding window where they are.

    Raises:
        TypeError: if `config` is something else.
    """

    def __init__(
        self, config: PreTrainedConfig, *, offloading: bool = False, offload_only_non_sliding: bool = False
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be the model's configuration, model.config; got {type(config).__name__}")
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        grow_in_place(self)


class SparseLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of the cache whose keys and values grow in place.

    `keys` and `values` are views `(batch, kv_heads, length, head_dim)` into storage that may be longer. What was
    handed out before a `crop` shows what is written after it. Outside `torch.no_grad`, they are concatenated as in
    `DynamicLayer`: a backward pass may want what was handed out, for queries that learn if for nothing else.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.quantised = QuantisedKeys()
        self._storage: tuple[Tensor, Tensor] | None = None
        # Keys and values as last put there by this class, and how often they had been written to, to notice others who
        # do so.
        self._shown: tuple[Tensor | None, Tensor | None] = (None, None)
        self._versions: tuple[int | None, int | None] = (None, None)
        # A copy without the keys that padding hides inside of texts, and the positions of those in it.
        self._without_hidden: tuple[Tensor, SparseLayer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._notice_changes()
        return vars(self).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()  # PyTorch counts anew how often copies are written to.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(batch, kv_heads, new, head_dim)`, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._notice_changes()
        length = self.get_seq_length()
        if torch.is_grad_enabled():
            super().update(key_states, value_states, *args, **kwargs)
            self._storage = None
            self._remember()
        else:
            total = length + key_states.shape[-2]
            storage = self._with_room(key_states, value_states, length, total)
            for part, new in zip(storage, (key_states, value_states), strict=True):
                part.narrow(2, length, new.shape[2]).copy_(new)
            self._show(storage, total)
        return self._states()

    def holds(self, key: Tensor) -> bool:
        """Whether `key` `(batch, kv_heads, length, head_dim)` is what this layer holds, itself or a copy.

        A copy is recognised by some of its vectors, the last one among them.
        """
        keys = self.keys
        if not self.is_initialized or keys is None or keys.shape != key.shape or keys.device != key.device:
            return False
        if keys.data_ptr() == key.data_ptr() and keys.stride() == key.stride():
            return True
        some = torch.linspace(0, key.shape[2] - 1, _COMPARED, device=key.device).long()
        return keys.dtype == key.dtype and bool(torch.equal(keys[:, :, some], key[:, :, some]))

    @torch.no_grad()
    def without_hidden(self, shown: Tensor) -> tuple[Tensor, Tensor, QuantisedKeys]:
        """Keys and values at the positions `shown`, int64 `(batch, number)`, alone, and these keys in few bits.

        The copy is kept, and grows with this layer: for a new token, one key and value are copied.
        """
        kept = self._without_hidden
        length = 0 if kept is None else kept[0].shape[1]
        if kept is None or length > shown.shape[1] or not torch.equal(kept[0], shown[:, :length]):
            length, kept = 0, (shown, SparseLayer())
        layer = kept[1]
        if length < shown.shape[1]:
            added = shown[:, None, length:].expand(-1, self._states()[0].shape[1], -1)
            layer.update(*(take_keys(part, added) for part in self._states()))
        self._without_hidden = (shown, layer)
        return *layer._states(), layer.quantised

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._start_anew()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: `-tokens_to_remove` of them. The storage stays."""
        self._notice_changes()
        super().crop(tokens_to_remove)
        self._without_hidden = None
        self._remember()
        self.quantised.crop(self.get_seq_length())

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
        self._storage = None
        self._without_hidden = None
        self.quantised = QuantisedKeys()
        self._remember()

    def _notice_changes(self) -> None:
        keys, values = self._shown
        changed = self.keys is not keys or self.values is not values
        if changed or self._versions != (_version_of(keys), _version_of(values)):
            self._start_anew()

    def _remember(self) -> None:
        self._shown = self.keys, self.values
        self._versions = _version_of(self.keys), _version_of(self.values)

    def _states(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _show(self, storage: tuple[Tensor, Tensor], length: int) -> None:
        self._storage = storage
        self.keys, self.values = storage[0].narrow(2, 0, length), storage[1].narrow(2, 0, length)
        self._remember()

    def _with_room(self, key: Tensor, value: Tensor, length: int, total: int) -> tuple[Tensor, Tensor]:
        """Storage for `total` tokens that holds the first `length`."""
        held = self._states()
        if length and key.shape[:2] != held[0].shape[:2]:
            raise ValueError(
                f"the cache holds keys of (batch, kv_heads) = {tuple(held[0].shape[:2])}; "
                f"got keys of {tuple(key.shape[:2])}"
            )
        storage = self._storage
        # What was made in inference mode cannot be written to outside of it.
        if (
            storage is not None
            and total <= storage[0].shape[2]
            and storage[0].shape[:2] == key.shape[:2]
            and storage[0].device == key.device
            and (not storage[0].is_inference() or torch.is_inference_mode_enabled())
        ):
            return storage
        room = total + max(_LEAST_SPARE, int(total * _SPARE))
        grown = tuple(new.new_empty((*new.shape[:2], room, new.shape[3])) for new in (key, value))
        if length:
            for part, old in zip(grown, held, strict=True):
                part[:, :, :length] = old
        return grown[0], grown[1]

    def _rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change_storage(change)
        self.quantised.rearrange(change)

    def _change_storage(self, change: Callable[[Tensor], Tensor]) -> None:
        length = self.get_seq_length()
        if not length:
            return
        self._notice_changes()
        self._without_hidden = None
        storage = self._states() if self._storage is None else self._storage
        self._show((change(storage[0]), change(storage[1])), length)


def _version_of(states: Tensor | None) -> int | None:
    """How often a tensor, or what it is a view of, was written to; `None` where PyTorch does not count that."""
    return None if states is None or states.is_inference() else states._version


def grow_in_place(cache: Cache) -> None:
    """Replace the layers of an empty cache that hold full attention by such as grow in place."""
    cache.layers = [SparseLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]


# Of each thread, for several may run one model.
_of_pass: ContextVar[ref[Cache] | None] = ContextVar("hf_sparse_cache_of_pass", default=None)


def set_cache_of_pass(cache: Cache | None) -> None:
    """Say which cache the forward pass has that begins in this thread. It is not kept alive."""
    _of_pass.set(None if cache is None else ref(cache))


def cache_of_pass() -> Cache | None:
    """The cache of the forward pass under way in this thread, or of the last one, if it had one that is still there."""
    held = _of_pass.get()
    return None if held is None else held()


def layer_that_holds(cache: Cache, layer: int, key: Tensor) -> SparseLayer | None:
    """The layer of a cache that grows in place and holds `key`: that of index `layer`, or one it shares keys with."""
    for found in (*cache.layers[layer : layer + 1], *cache.layers):
        if isinstance(found, SparseLayer) and found.holds(key):
            return found
    return None
