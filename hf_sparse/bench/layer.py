"""One attention layer: a decode step or a prefill, by every method on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hf_sparse.attention import LayerState, attend
from hf_sparse.bench import dense
from hf_sparse.bench.inputs import LayerInputs
from hf_sparse.bench.tasks import DENSE_LAYER, DYNAMIC, FLEX, MASKED, PACKED, SDPA, SPARSE
from hf_sparse.bench.timing import Rounds, available_bytes, mebibytes, synchronize, timed, with_peak
from hf_sparse.cache import SparseLayer
from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.engines.dense import attend as attend_densely
from hf_sparse.errors import first_line
from hf_sparse.monitor import make_report

Found = dict[str, dict[str, Any]]
"""What was measured, by method."""

# A call that takes longer than this is not repeated to measure its peak of memory alone.
_QUICK = 1.0
# Several sets of inputs stand for the layers of a model, whose keys are no longer in the CPU's cache when their turn
# comes again. A GPU's is larger than what sparse attention reads of one set of any length.
_SETS_BYTES = 1 << 28
_LEAST_SETS, _MOST_SETS = 2, 16
# Share of the free memory that a method may take.
_SHARE = 0.6


@dataclass(frozen=True)
class Method:
    """One way to do a task.

    Attributes:
        prepare: Gives the input of the call of that number; not timed.
        run: The timed call, from that input to `(1, heads, queries, head_dim)`.
        needs: Bytes formed besides inputs and output, where that is known to be much.
        compiled: Whether the first call compiles it. Such a method is timed apart, after all others.
        optional: Whether it is skipped where it does not work.
    """

    prepare: Callable[[int], Any]
    run: Callable[[Any], Tensor]
    needs: float = 0.0
    compiled: bool = False
    optional: bool = False


class SparseStep:
    """A decode step of a patched model: append to the cache that grows in place, select, attend.

    What a query sees, and how many keys it keeps, is known before: a model works it out once a token, for all layers.

    Args:
        inputs: One query, whose own key is the last.
        state: The layer's configuration and counters.
    """

    def __init__(self, inputs: AttentionCall, state: LayerState) -> None:
        self._inputs = replace(inputs, known_ranges=inputs.ranges)
        self._state = state
        self._cache = SparseLayer()
        self._cache.update(inputs.key[:, :, :-1], inputs.value[:, :, :-1])
        self._cache.update(inputs.key[:, :, -1:], inputs.value[:, :, -1:])

    @property
    def inputs(self) -> AttentionCall:
        """The call with keys and values where they lie in the cache, for dense attention to read the same memory."""
        key, value = self._cache.keys, self._cache.values
        assert key is not None
        assert value is not None
        return replace(self._inputs, key=key, value=value)

    def undo(self) -> SparseStep:
        """Take the last key out of the cache again."""
        self._cache.crop(self._inputs.key.shape[2] - 1 - self._cache.get_seq_length())
        return self

    def attend(self) -> Tensor:
        """Append and attend: `(1, heads, 1, head_dim)`."""
        key, value = self._cache.update(self._inputs.key[:, :, -1:], self._inputs.value[:, :, -1:])
        return attend(self._state, replace(self._inputs, key=key, value=value, quantised=self._cache.quantised))[0]


@torch.no_grad()
def time_decode(inputs: LayerInputs, length: int, config: SparseAttentionConfig, rounds: Rounds) -> Found:
    """Measure a decode step that sees `length` keys; see `_measure` for the result."""
    number = max(_LEAST_SETS, min(_MOST_SETS, _SETS_BYTES // (inputs.kv_bytes * length)))
    state = _state(config, inputs.layer)
    steps = [SparseStep(inputs.decode(length, index), state) for index in range(number)]
    sets = [step.inputs for step in steps]
    methods = {
        SDPA: Method(_in_turn(sets), dense.sdpa),
        PACKED: Method(_in_turn(sets), dense.packed_sdpa),
        DENSE_LAYER: Method(_in_turn(sets), attend_densely),
        DYNAMIC: Method(_in_turn(sets), dense.cached_step),
    }
    for name in dense.backends(inputs.device):
        methods[name] = Method(_in_turn(sets), partial(dense.sdpa, backend=name), optional=True)
    sparse = _in_turn(steps)
    methods[SPARSE] = Method(lambda number: sparse(number).undo(), SparseStep.attend)
    return _measure(methods, state, inputs.device, rounds)


def time_prefill(
    inputs: LayerInputs, length: int, config: SparseAttentionConfig, rounds: Rounds, left_out: frozenset[str]
) -> Found:
    """Measure causal attention of `length` queries to as many keys; see `_measure` for the result."""
    different = 1 if inputs.device.type == "cpu" else _LEAST_SETS
    given = _in_turn([inputs.prefill(length, index) for index in range(different)])
    methods = {SDPA: Method(given, dense.sdpa)}
    if MASKED not in left_out:
        # The mask takes a byte per entry, and in SDPA another number of the inputs' dtype.
        methods[MASKED] = Method(given, dense.MaskedSdpa(), needs=float(length**2 * (1 + inputs.dtype.itemsize)))
    for name in dense.backends(inputs.device):
        methods[name] = Method(given, partial(dense.sdpa, backend=name), optional=True)
    if FLEX not in left_out:
        # Models build the block mask once for all layers.
        blocks = dense.causal_blocks(length, inputs.device)
        methods[FLEX] = Method(given, partial(dense.flex, mask=blocks), compiled=True, optional=True)
    state = _state(config, inputs.layer)
    methods[SPARSE] = Method(given, lambda call: attend(state, call)[0])
    return _measure(methods, state, inputs.device, rounds)


def _in_turn(items: list[Any]) -> Callable[[int], Any]:
    """A function from a number to one of `items`, over and over."""
    return lambda number: items[number % len(items)]


def _state(config: SparseAttentionConfig, layer: int) -> LayerState:
    # Which lengths should stay dense is the result: here all of them are sparse.
    return LayerState(layer, replace(config, dense_below=0))


@torch.no_grad()
def _measure(methods: dict[str, Method], state: LayerState, device: torch.device, rounds: Rounds) -> Found:
    """Warm up, check and time every method, the first of which is the baseline.

    Returns:
        Method -> `samples` (`{"seconds": [...]}`, and more on CUDA: see `timed`), `warm_up` in seconds with
        compilation, `peak_mib`, `output_error` (mean and worst query, over the norm of the baseline's output), and
        `density` of `SPARSE`; or `skipped`: the reason.
    """
    found: Found = {}
    reference: Tensor | None = None
    for name, method in methods.items():
        if method.needs > _SHARE * available_bytes(device):
            found[name] = {"skipped": f"needs {method.needs / 2**30:.0f} GiB, which are not free"}
            continue
        try:
            out, found[name] = _first_calls(method, device)
        except Exception as error:
            # Which exception a compiler or a kernel library raises is not known beforehand.
            if not method.optional:
                raise
            found[name] = {"skipped": f"{type(error).__name__}: {first_line(error)}"}
            continue
        if reference is None:
            reference = out
        found[name]["output_error"] = _error(out, reference)
    del reference, out
    found[SPARSE]["density"] = make_report({state.layer: state.counters}).density

    # Whichever method it is of, a call takes the next inputs: none finds in a cache what another has just read.
    number = count()

    def sampler(method: Method) -> Callable[[], dict[str, float]]:
        return lambda: timed(lambda: method.prepare(next(number)), method.run, device)

    working = {name: sampler(methods[name]) for name, facts in found.items() if "skipped" not in facts}
    together = {name: sample for name, sample in working.items() if not methods[name].compiled}
    samples = rounds.alternate(together)
    done = len(samples[SPARSE]["seconds"])
    for name in working.keys() - together.keys():
        samples |= replace(rounds, repeats=done, seconds=0).alternate({name: working[name]})
    for name, own in samples.items():
        found[name]["samples"] = own
    return found


def _first_calls(method: Method, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    def first() -> tuple[Tensor, float]:
        begin = perf_counter()
        out = method.run(method.prepare(0))
        synchronize(device)
        return out, perf_counter() - begin

    (out, warm_up), peak = with_peak(first, device)
    if method.compiled or warm_up < _QUICK:
        # The peak without what only a first call loads: compilers, libraries.
        del out
        (out, _), peak = with_peak(first, device)
    return out, {"warm_up": warm_up, "peak_mib": None if peak is None else mebibytes(peak)}


def _error(out: Tensor, reference: Tensor) -> dict[str, float]:
    difference = (out.float() - reference.float()).norm(dim=-1) / reference.float().norm(dim=-1)
    if not bool(difference.isfinite().all()):
        raise ArithmeticError("a method gave an output that is not finite")
    return {"mean": float(difference.mean()), "worst": float(difference.amax())}
