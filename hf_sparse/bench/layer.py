"""One attention layer alone: a decode step, or a prefill, by every method on the same inputs."""

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
from hf_sparse.bench.timing import alternate, available_bytes, synchronize, timed, with_peak
from hf_sparse.cache import SparseLayer
from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import first_line
from hf_sparse.monitor import make_report

SPARSE = "hf_sparse"
"""The method that is ours: append, select and attend."""

BASELINE = "sdpa"
"""The dense method whose outputs are taken as right, and from which a layer runs dense below the break-even."""

# A call that takes longer than this is not made again for its peak of memory alone.
_QUICK = 1.0
# Several sets of keys stand for the layers of a model: one set alone would stay in the processor's cache.
_SETS_BYTES = 1 << 28
_MOST_SETS = 16
# Share of the free memory that a method may be expected to take.
_SHARE = 0.6


@dataclass(frozen=True)
class Method:
    """One way to do the work of a cell.

    Attributes:
        prepare: What is not timed, before every call, whose number it gets: all methods do the same in calls of the
            same number.
        run: What is timed: from what `prepare` gave to `(1, heads, rows, head_dim)`.
        needs: Bytes that it must form besides its inputs and output, where that is known to be much.
        compiled: Whether its first call compiles it.
        optional: Whether it may be left out where it does not work.
    """

    prepare: Callable[[int], Any]
    run: Callable[[Any], Tensor]
    needs: float = 0.0
    compiled: bool = False
    optional: bool = False


class SparseCall:
    """A decode step as a patched model makes it: append to the cache that grows in place, select, attend.

    Args:
        inputs: One row, whose own key is the last.
        state: The layer's configuration and counters.
    """

    def __init__(self, inputs: AttentionCall, state: LayerState) -> None:
        self._inputs = inputs
        self._state = state
        self._cache = SparseLayer()
        self._cache.update(inputs.key[:, :, :-1], inputs.value[:, :, :-1])

    def forget_last(self) -> SparseCall:
        """Go back to before the step."""
        self._cache.crop(self._inputs.key.shape[2] - 1 - self._cache.get_seq_length())
        return self

    def attend(self) -> Tensor:
        """Append and attend: `(1, heads, 1, head_dim)`."""
        key, value = self._cache.update(self._inputs.key[:, :, -1:], self._inputs.value[:, :, -1:])
        return attend(self._state, replace(self._inputs, key=key, value=value))[0]


@torch.no_grad()
def decode_cell(inputs: LayerInputs, length: int, config: SparseAttentionConfig, repeats: int, seconds: float) -> Any:
    """Measure a decode step that sees `length` keys; see `_measure` for what is returned."""
    different = max(1, min(_MOST_SETS, _SETS_BYTES // (inputs.kv_bytes * length)))
    sets = [inputs.decode(length, index) for index in range(different)]
    methods: dict[str, Method] = {BASELINE: Method(_in_turn(sets), dense.sdpa)}
    methods["dynamic-cache"] = Method(_in_turn([dense.CachedCall(each) for each in sets]), dense.CachedCall.attend)
    for name in dense.backends(inputs.device):
        methods[name] = Method(_in_turn(sets), partial(dense.sdpa, backend=name), optional=True)
    state = _state(config, inputs.layer)
    calls = _in_turn([SparseCall(each, state) for each in sets])
    methods[SPARSE] = Method(lambda number: calls(number).forget_last(), SparseCall.attend)
    return _measure(methods, state, inputs.device, repeats, seconds)


def prefill_cell(
    inputs: LayerInputs,
    length: int,
    config: SparseAttentionConfig,
    repeats: int,
    seconds: float,
    leave_out: frozenset[str],
) -> Any:
    """Measure causal attention of `length` rows to as many keys; see `_measure` for what is returned."""
    call = inputs.prefill(length)

    def given(number: int) -> AttentionCall:
        return call

    methods = {BASELINE: Method(given, dense.sdpa)}
    if "masked-sdpa" not in leave_out:
        masked = dense.MaskedCall()
        needs = float(length**2 * (1 + inputs.dtype.itemsize))
        methods["masked-sdpa"] = Method(lambda number: masked.prepare(call), masked.attend, needs)
    for name in dense.backends(inputs.device):
        methods[name] = Method(given, partial(dense.sdpa, backend=name), optional=True)
    if "flex" not in leave_out:
        # Models build the block mask once for all layers.
        blocks = dense.causal_blocks(length, inputs.device)
        methods["flex"] = Method(given, partial(dense.flex, mask=blocks), compiled=True, optional=True)
    state = _state(config, inputs.layer)
    methods[SPARSE] = Method(given, lambda inputs: attend(state, inputs)[0])
    return _measure(methods, state, inputs.device, repeats, seconds)


def _in_turn(items: list[Any]) -> Callable[[int], Any]:
    """Gives one item after the other, and then again from the first."""
    return lambda number: items[number % len(items)]


def _state(config: SparseAttentionConfig, layer: int) -> LayerState:
    # The length is what is varied here: below which one to stay dense is what comes out, not what goes in.
    return LayerState(layer, replace(config, dense_below=0))


@torch.no_grad()
def _measure(
    methods: dict[str, Method], state: LayerState, device: torch.device, repeats: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Warm up, check and time every method.

    Returns:
        Method -> `samples` (`{"seconds": [...]}`), `warm_up` in seconds, compilation included, `peak_mib`,
        `output_error` (mean and worst row, over the norm of the baseline's output), and for `SPARSE` its `density`;
        or `skipped`: the reason.
    """
    found: dict[str, dict[str, Any]] = {}
    reference: Tensor | None = None
    for name, method in methods.items():
        if method.needs > _SHARE * available_bytes(device):
            found[name] = {"skipped": f"needs {method.needs / 2**30:.0f} GiB, which are not free"}
            continue
        try:
            out, found[name] = _first_calls(method, device)
        except Exception as error:
            # What a compiler or a kernel library raises where it cannot run is not known beforehand.
            if not method.optional:
                raise
            found[name] = {"skipped": f"{type(error).__name__}: {first_line(error)}"}
            continue
        if reference is None:
            reference = out
        found[name]["output_error"] = _error(out, reference)
    del reference, out
    found[SPARSE]["density"] = make_report({state.layer: state.counters}).density
    ran = {name: methods[name] for name, facts in found.items() if "skipped" not in facts}

    def sampler(method: Method) -> Callable[[], dict[str, float]]:
        number = count()
        return lambda: {"seconds": timed(lambda: method.prepare(next(number)), method.run, device)}

    for name, samples in alternate({n: sampler(m) for n, m in ran.items()}, repeats, seconds).items():
        found[name]["samples"] = samples
    return found


def _first_calls(method: Method, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    def first() -> tuple[Tensor, float]:
        begin = perf_counter()
        out = method.run(method.prepare(0))
        synchronize(device)
        return out, perf_counter() - begin

    (out, warm_up), peak = with_peak(first, device)
    if method.compiled or warm_up < _QUICK:
        # Without what the first call alone takes: compilers, libraries.
        del out
        (out, _), peak = with_peak(first, device)
    return out, {"warm_up": warm_up, "peak_mib": None if peak is None else round(peak / 2**20, 1)}


def _error(out: Tensor, reference: Tensor) -> dict[str, float]:
    difference = (out.float() - reference.float()).norm(dim=-1) / reference.float().norm(dim=-1)
    if not bool(difference.isfinite().all()):
        raise ArithmeticError("a method gave an output that is not finite")
    return {"mean": float(difference.mean()), "worst": float(difference.amax())}
