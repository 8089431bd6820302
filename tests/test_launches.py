"""What a call gives a GPU to do, counted where there is none: on tensors that have a shape and a device, but no memory.

An operation of PyTorch on such tensors counts as one, whatever number of kernels it launches, unless it only makes a
view or leaves new memory as it is. A launch of a kernel of ours counts as one. Reading a number from the GPU, or
copying to it what does not lie in pinned memory, waits for all that it was given before.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sparse import SparseAttentionConfig, engines
from hf_sparse.attention import LayerState, attend
from hf_sparse.call import AlwaysKept, AttentionCall, Selection
from hf_sparse.engines import dense
from hf_sparse.kernels import gpu as kernels
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.selectors import on_gpus
from hf_sparse.selectors.on_gpus import by_triton
from hf_sparse.visibility import VisibleRanges

pytest.importorskip("triton", reason="triton is not installed")
aten = torch.ops.aten

ENGINE = engines.ENGINES["triton"]

ALLOCATES = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# The mean of the first keys of a text, once.
CENTRED = ["aten.mean.dim", "aten.nan_to_num.default"]
READS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select, aten.unique_dim}


class Gpu(TorchDispatchMode):
    """A GPU that does nothing.

    Attributes:
        given: Names of operations and kernels.
        waits: Those among them for which the host waits.
        grids: Programs of each kernel along each axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: list[str] = []
        self.waits: list[str] = []
        self.grids: list[tuple[int, ...]] = []
        self._without_memory = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = func.overloadpacket
        if kind is aten._pin_memory:
            return args[0].clone()
        sources = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in sources}
        wanted = torch.device(kwargs.get("device") or "cpu").type
        if "cuda" not in devices and wanted != "cuda":
            return func(*args, **kwargs)
        if kind in READS:
            self.waits.append(str(func))
        with self._without_memory:
            out = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view and kind not in ALLOCATES:
            self.given.append(str(func))
            moved = any(isinstance(x, Tensor) and x.device.type == "cpu" for x in tree_leaves(out))
            if moved or (sources and "cuda" not in devices and not kwargs.get("non_blocking")):
                self.waits.append(str(func))
        return out


get_item = Tensor.__getitem__


def part_of(x: Tensor, index: Any) -> Tensor:
    """`x[index]` by the operators that it calls, for PyTorch without CUDA does not index such tensors itself."""
    if x.device.type != "cuda":
        return get_item(x, index)
    if Ellipsis in index:
        at, taken = index.index(Ellipsis), sum(each is not None for each in index) - 1
        index = (*index[:at], *[slice(None)] * (x.dim() - taken), *index[at + 1 :])
    dim = 0
    for each in index:
        if isinstance(each, int):
            x = x.select(dim, each)
            continue
        x = x.unsqueeze(dim) if each is None else aten.slice.Tensor(x, dim, each.start, each.stop)
        dim += 1
    return x


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """An H100 that does nothing, as far as this package asks what it has."""
    gpu = Gpu()
    common = importlib.import_module("hf_sparse.kernels.triton.common")
    interpreted = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    compiled = importlib.import_module("triton.runtime.jit").JITFunction
    hopper = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 << 10, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: hopper)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())

    def launch(self: Any, *_: Any, grid: tuple[int, ...], **__: Any) -> None:
        gpu.given.append(self.fn.__name__)
        gpu.grids.append(grid)

    for kernel in (interpreted, compiled):
        monkeypatch.setattr(kernel, "run", launch)
    monkeypatch.setattr(Tensor, "__getitem__", part_of)
    known = (common._multiprocessors, common.shared_memory, kernels.reason_of_gpu)
    for each in known:
        each.cache_clear()
    with torch.no_grad(), gpu:
        assert kernels.unsupported_reason(torch.device("cuda:0")) is None
        assert gpu.given == ["_one"]
        gpu.given.clear()
        yield gpu
    for each in known:
        each.cache_clear()


LENGTH = 131_072


def llama(q_len: int, kv_len: int, ranges: VisibleRanges | None = None, quantised: QuantisedKeys | None = None) -> Any:
    """A call of a layer of Llama-3.1-8B for the last `q_len` of `kv_len` tokens; what they see was read before."""
    intervals = torch.empty(1, 1, q_len, 2, dtype=torch.int32, device="cuda")
    if ranges is None:
        stop = torch.arange(kv_len - q_len + 1, kv_len + 1)[None]
        ranges = VisibleRanges(intervals, torch.zeros_like(stop), stop)
    states = [
        torch.empty(1, heads, length, 128, dtype=torch.bfloat16, device="cuda")
        for heads, length in ((32, q_len), (8, kv_len), (8, kv_len))
    ]
    return AttentionCall(*states, ranges.intervals, 128**-0.5, known_ranges=ranges, quantised=quantised)


def layer(**fields: Any) -> LayerState:
    return LayerState(1, SparseAttentionConfig(selector="grouped", **fields))


SELECTED = ["_totals", "_sum_weights", "_best"]
ATTENDED = ["_attend_tile", "_join_parts"]
COPIED = ["aten._to_copy.default"]


def test_a_decoded_token(gpu: Gpu) -> None:
    """Budgets are copied once for all layers; else there are only kernels, and nothing waits."""
    state, kept = layer(), [QuantisedKeys(), QuantisedKeys()]
    for quantised in kept:
        attend(state, llama(1, LENGTH - 1, quantised=quantised))
    ranges = llama(1, LENGTH).ranges
    found = []
    for quantised in kept:
        gpu.given.clear()
        attend(state, llama(1, LENGTH, ranges, quantised))
        found.append(list(gpu.given))
    assert found == [[*SELECTED[:2], *COPIED, SELECTED[2], *ATTENDED], SELECTED + ATTENDED]
    assert gpu.waits == []
    assert state.counters.slow == {}


def test_a_decoded_token_of_heads_that_keep_different_numbers(gpu: Gpu) -> None:
    state = layer(per_head={1: [(alpha, 0.5) for alpha in (12.0, 16.0, 20.0, 16.0) * 8]})
    attend(state, llama(1, LENGTH))
    assert gpu.given == [*CENTRED, "_write", *SELECTED[:2], *COPIED, SELECTED[2], "_order", *ATTENDED]
    assert gpu.waits == []


def test_a_token_in_a_cache_of_fixed_room(gpu: Gpu) -> None:
    """Where the host knows no more than a cache's room: kernels alone, none of which it waits for."""
    intervals = torch.empty(1, 1, 1, 2, dtype=torch.int32, device="cuda")
    ranges = VisibleRanges(intervals, torch.zeros(1, 1).long(), torch.full((1, 1), LENGTH))
    call, budgets = llama(1, LENGTH, ranges, QuantisedKeys()), torch.empty(1, 1, 1, dtype=torch.int32, device="cuda")
    for _ in range(2):
        gpu.given.clear()
        selection = by_triton(call, budgets, AlwaysKept(4, 64), 1, (80, 5808))
        ENGINE.attend(call, selection)
    assert gpu.given == SELECTED + ATTENDED
    assert gpu.waits == []


def test_a_block_of_a_prefill(gpu: Gpu) -> None:
    """Keys are put into order, too, as pairs want different numbers of them."""
    state = layer()
    attend(state, llama(128, LENGTH))
    assert gpu.given == [*CENTRED, "_write", *SELECTED[:2], *COPIED, SELECTED[2], "_order", *ATTENDED]
    assert gpu.waits == []
    assert state.counters.slow == {}


@pytest.mark.parametrize("length", [4096, 4100])
def test_a_whole_prompt(gpu: Gpu, length: int) -> None:
    """Its first queries are dense. Nothing waits, whether or not the last group of queries is whole."""
    state = layer()
    attend(state, llama(length, length))
    assert {*SELECTED, "_order", "_attend_tile"} <= set(gpu.given)
    assert state.counters.dense_queries
    assert state.counters.kept()[0] < state.counters.visible
    assert gpu.waits == []


def test_few_queries_that_begin_within_a_group(gpu: Gpu) -> None:
    """As the check of a draft has them."""
    attend(layer(), llama(8, LENGTH))
    assert gpu.given.count("aten.gather.default") == 2
    assert gpu.waits == []


def test_sdpa_shares_keys_where_flash_attention_does(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would form the scores of all queries and keys: under a mask, in float32 and for wide heads."""
    asked = []

    def sdpa(
        query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, enable_gqa: bool, **_: Any
    ) -> Tensor:
        asked.append((key.shape[1], value.shape[1], attn_mask is not None, enable_gqa))
        return query.new_empty(query.shape)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    whole = llama(4096, 4096)
    dense.attend(whole)
    windowed = VisibleRanges(whole.intervals, (whole.ranges.stop - 1024).clamp(min=0), whole.ranges.stop)
    gpu.given.clear()
    dense.attend(replace(whole, known_ranges=windowed))
    assert len(asked) > 2
    assert gpu.given.count("aten.clone.default") == 2  # keys and values, repeated for all blocks at once
    dense.attend(replace(whole, query=whole.query.float(), key=whole.key.float(), value=whole.value.float()))
    assert asked[0] == (8, 8, False, True)
    assert set(asked[1:-1]) == {(32, 32, True, False)}
    assert asked[-1] == (32, 32, False, False)
    wide = torch.empty(1, 2, 16, 320, dtype=torch.bfloat16, device="cuda")
    assert dense.for_sdpa(wide, wide, 4, flash=True)[0].shape == (1, 8, 16, 320)
    assert gpu.waits == []


def test_grids_are_no_larger_than_a_gpu_takes(gpu: Gpu) -> None:
    """8 heads that share one, of which each chooses keys for 8,192 queries, are 65,536 groups."""
    states = [torch.empty(1, heads, 8192, 256, dtype=torch.bfloat16, device="cuda") for heads in (8, 1, 1)]
    call = AttentionCall(*states, torch.empty(1, 1, 8192, 2, dtype=torch.int32, device="cuda"), 256**-0.5)
    positions = torch.empty(1, 1, 8 * 8192, 16, dtype=torch.int64, device="cuda")
    allowed = torch.empty(1, 1, 8 * 8192, 1, 16, dtype=torch.bool, device="cuda")
    ENGINE.attend(call, Selection(positions, allowed, queries_per_group=1, per_head=True))
    attend(layer(), llama(16_384, LENGTH))
    assert gpu.given[0] == gpu.given[-1] == "_attend_tile"
    assert all(programs < 1 << 16 for grid in gpu.grids for programs in grid[1:]), gpu.grids


def test_what_a_gpu_cannot_do_is_reported(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out once, and said of each call; plain PyTorch does it then."""
    state = layer()
    call = llama(1, 4096)
    with suppress(RuntimeError):  # from PyTorch without CUDA, when the engine that copies keys indexes a tensor
        attend(state, replace(call, query=call.query.double(), key=call.key.double(), value=call.value.double()))
    assert any("take float32, float16 or bfloat16" in what for what in state.counters.slow), state.counters
    wide = replace(call, key=torch.empty(1, 8, 16, 320, device="cuda"))
    assert on_gpus.unsupported_reason(wide) == "a head_dim of 320 is more than 256"
    tried: list[int] = []
    common = importlib.import_module("hf_sparse.kernels.triton.common")
    with monkeypatch.context() as broken:
        broken.setattr(common, "launches", lambda _: tried.append(1) or 1 / 0)
        kernels.reason_of_gpu.cache_clear()
        reasons = [kernels.unsupported_reason(call.key.device) for _ in range(3)]
    assert reasons == ["Triton does not work here: ZeroDivisionError: division by zero"] * 3
    assert tried == [1]
    assert ENGINE.unsupported_reason(call) == on_gpus.unsupported_reason(call) == reasons[0]
    kernels.reason_of_gpu.cache_clear()
    monkeypatch.setattr(common, "shared_memory", lambda _: 48 << 10)
    assert "has 48 KiB of shared memory" in (ENGINE.unsupported_reason(call) or "")


def test_what_waits_is_noticed(gpu: Gpu) -> None:
    """Numbers that are read, and copies from and to memory that is not pinned."""
    numbers = torch.empty(1, device="cuda")
    for wait in (numbers.cpu, numbers.item, lambda: torch.ones(3).to(numbers.device)):
        before = len(gpu.waits)
        with suppress(DataDependentOutputException):
            wait()
        assert len(gpu.waits) == before + 1
    torch.ones(3).pin_memory().to(numbers.device, non_blocking=True)
    assert len(gpu.waits) == before + 1
