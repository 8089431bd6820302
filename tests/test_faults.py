"""What goes wrong in the middle of things: errors, interrupts, a lack of memory, no numbers; what follows is right."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import hf_sparse
from hf_sparse.cache import SparseCache
from hf_sparse.kernels.cpu.compiler import find_compiler
from hf_sparse.patching import policy_of
from tests import calls, tiny
from tests.installed import ROOT, MadeOnce
from tests.sparse import SPARSE, assert_same, generated, sparse_model
from tests.test_grouped import compiled, needs_kernels
from tests.test_patching import attributes

IDS = tiny.tokens(2, 90)


# In the middle of a forward pass.


@dataclass(frozen=True)
class FailingSelector(type(hf_sparse.selectors.find_selector("grouped"))):  # type: ignore[misc]
    """`grouped`, until `error` is there to be raised."""

    name: str = "failing"
    errors: tuple[list[BaseException], ...] = ([],)

    def select(self, *args: Any) -> Any:
        if self.errors[0]:
            raise self.errors[0].pop()
        return super().select(*args)


class FailingEngine(hf_sparse.Engine):
    """The reference, until an error is there to be raised."""

    name = "failing"

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def attend(self, *args: Any) -> Tensor:
        if self.errors:
            raise self.errors.pop()
        return hf_sparse.engines.ENGINES["reference"].attend(*args)


def fail_in_a_hook(model: PreTrainedModel, error: BaseException) -> None:
    """The next pass fails in layer 2, before its attention."""

    def hook(*_: Any) -> None:
        handle.remove()
        raise error

    handle = model.model.layers[2].self_attn.register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["hook", "selector", "engine"])
def test_a_pass_that_fails_in_the_middle_changes_none_that_follow(where: str, error: BaseException) -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    hung, dense = attributes(model), tiny.logits(model, IDS)
    selector, engine = FailingSelector(errors=([],)), FailingEngine()
    parts: dict[str, Any] = {"hook": {}, "selector": {"selector": selector}, "engine": {"engine": engine}}[where]
    hf_sparse.patch(model, SPARSE, **parts)
    sparse, calls_before = tiny.logits(model, IDS), hf_sparse.report(model).rows[-1]["calls"]
    cache, fresh = SparseCache(model.config), SparseCache(model.config)
    with torch.no_grad():
        model(IDS[:, :80], past_key_values=cache)
        model(IDS[:, :80], past_key_values=fresh)
        {"hook": lambda: fail_in_a_hook(model, error)}.get(where, lambda: None)()
        selector.errors[0].extend([error] * (where == "selector"))
        engine.errors.extend([error] * (where == "engine"))
        with pytest.raises(type(error)):
            model(IDS[:, 80:85], past_key_values=cache)
        # The layers before the failure have read the tokens, and those after it have not: such a cache is refused.
        if where == "hook":
            with pytest.raises(ValueError, match="a cache whose layers differ in length"):
                model(IDS[:, 80:85], past_key_values=cache)
        assert torch.equal(tiny.logits(model, IDS), sparse)
        out = model(IDS[:, 80:], past_key_values=fresh).logits
        assert_same(out, model(IDS[:, 80:], past_key_values=stepped(model, DynamicCache(config=model.config))).logits)
    assert hf_sparse.report(model).rows[-1]["calls"] > calls_before
    hf_sparse.unpatch(model)
    assert attributes(model) == hung
    assert torch.equal(tiny.logits(model, IDS), dense)


def stepped(model: PreTrainedModel, cache: Cache) -> Cache:
    """A cache that holds the first 80 tokens."""
    model(IDS[:, :80], past_key_values=cache)
    return cache


# Interrupts.


@pytest.mark.parametrize("inside", [True, False], ids=["in a patched block", "patched for good"])
def test_an_interrupt_in_generate(inside: bool) -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    hung, dense = attributes(model), generated(model)
    tokens = generated(hf_sparse.patch(tiny.model("llama", num_hidden_layers=4), SPARSE))

    def interrupted() -> None:
        block = hf_sparse.patched(model, SPARSE) if inside else nullcontext()
        with block, hooked(model.model.layers[2].self_attn, interrupt_after(5)):
            generated(model)

    if not inside:
        hf_sparse.patch(model, SPARSE)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hf_sparse.is_patched(model) is not inside
    assert generated(hf_sparse.patch(model, SPARSE)) == tokens
    hf_sparse.unpatch(model)
    assert attributes(model) == hung
    assert generated(model) == dense


def interrupt_after(calls: int) -> Callable[..., None]:
    """A hook that does what Ctrl-C does, after so many calls."""
    count = itertools.count()

    def hook(*_: Any) -> None:
        if next(count) == calls:
            raise KeyboardInterrupt

    return hook


@contextmanager
def hooked(module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda *args: (hook(*args), None)[1])
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer of the system")
def test_interrupts_at_any_time_leave_no_half_patched_model() -> None:
    """A timer of this process, for the time that it computes: half of them hit `patch`, half `generate`."""
    model = tiny.model("llama")
    hung, dense = attributes(model), tiny.logits(model, IDS)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with hf_sparse.patched(model, SPARSE):
            generated(model, new=4)

    run()
    start = time.process_time()
    run()
    longest = time.process_time() - start
    before, hit = signal.signal(signal.SIGVTALRM, interrupt), 0
    try:
        for i in range(1, 41):
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, longest * i / 50)
                run()
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            except (KeyboardInterrupt, SystemError):  # the latter from CPython 3.11, interrupted while it parses
                hit += 1
            if hf_sparse.is_patched(model):  # interrupted while it was unpatched
                hf_sparse.unpatch(model)
            assert attributes(model) == hung
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert hit > 10
    assert torch.equal(tiny.logits(model, IDS), dense)


PATCHING = ("patcher.py", "caches.py", "configs.py")
Line = tuple[str, int]


def lines_of(action: Callable[[], object], interrupted: Line | None = None) -> list[Line]:
    """The lines of the package's `patching` that `action` runs, each once; it is interrupted at one of them."""
    ran: dict[Line, None] = {}

    def trace(frame: Any, event: str, _: Any) -> Any:
        name = Path(frame.f_code.co_filename).name
        if name not in PATCHING:
            return None
        if event == "line":
            ran[name, frame.f_lineno] = None
            if (name, frame.f_lineno) == interrupted:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return list(ran)


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_patch_is_done_or_not_wherever_it_is_interrupted(again: bool) -> None:
    model, ids = tiny.model("gpt2", num_hidden_layers=1), IDS[:, :40]
    first, second = replace(SPARSE, alpha=3.0), SPARSE
    hung = attributes(model)
    hf_sparse.unpatch(hf_sparse.patch(model, second))  # Some lines run once in a process.

    def back() -> None:
        if again:
            hf_sparse.patch(model, first)
        else:
            hf_sparse.unpatch(model)

    back()
    before = tiny.logits(model, ids)
    lines = lines_of(lambda: hf_sparse.patch(model, second))
    after = tiny.logits(model, ids)
    assert len(lines) > 30
    for line in lines:
        back()
        with pytest.raises(KeyboardInterrupt):
            lines_of(lambda: hf_sparse.patch(model, second), line)
        done = hf_sparse.is_patched(model) and policy_of(model).config == second
        assert torch.equal(tiny.logits(model, ids), after if done else before), line
        if not (again or done):
            assert attributes(model) == hung, line


def test_unpatch_can_be_asked_for_again_wherever_it_is_interrupted() -> None:
    model = tiny.model("gpt2", num_hidden_layers=1)
    hung, dense = attributes(model), tiny.logits(model, IDS)
    hf_sparse.patch(model, SPARSE)
    for line in lines_of(lambda: hf_sparse.unpatch(model)):
        hf_sparse.patch(model, SPARSE)
        with pytest.raises(KeyboardInterrupt):
            lines_of(lambda: hf_sparse.unpatch(model), line)
        assert attributes(hf_sparse.unpatch(model)) == hung, line
    assert torch.equal(tiny.logits(model, IDS), dense)


# A lack of memory inside the compiled kernels.

NO_MEMORY = """
import ctypes, itertools
import torch
from tests import calls
from tests.test_grouped import compiled, in_one_call

library = ctypes.CDLL(None)
failures = dict.fromkeys((1, 3), 0)
for threads, (q_len, dim) in itertools.product(failures, ((1, 16), (192, 64))):
    torch.set_num_threads(threads)
    call = calls.inputs(calls.causal_intervals(q_len, 3000), 3000, heads=12, kv_heads=2, dim=dim, dtype=torch.bfloat16)
    budgets = torch.full((2, 1, q_len), 300)
    apart = lambda: calls.run_engine("cpu", call, compiled(call, budgets))
    attended = apart if q_len > 1 else lambda: in_one_call(call, budgets)
    requests = 0
    while True:
        library.arm(ctypes.c_int64(requests))
        try:
            out = attended()
        except MemoryError as error:
            assert "the compiled kernel hfs_" in str(error), error
            failures[threads] += 1
            requests += 1 + requests // 4
        else:
            break
    library.arm(ctypes.c_int64(2**63 - 1))
    assert requests > 0, "no request for memory was seen"
    assert torch.equal(out, attended())
    reference = calls.run_engine("reference", call, compiled(call, budgets))
    torch.testing.assert_close(out, reference, atol=2e-2, rtol=2e-2)
print(min(failures.values()))
"""


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loads a library before all others")
def test_kernels_without_memory_say_so_and_the_process_goes_on(made_once: MadeOnce) -> None:
    """All their requests for memory fail; then all but the first; and so on in growing steps, until none is left.

    With one thread, and with several.
    """

    def compile_into(folder: Path) -> None:
        source, library = ROOT / "tests/failing_new.cpp", folder / "failing.so"
        command = [*find_compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
        subprocess.run(command, check=True)

    library = made_once("failing", compile_into) / "failing.so"
    command = ["env", f"LD_PRELOAD={library}", sys.executable, "-c", NO_MEMORY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert int(done.stdout) > 20


# What is no number.


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("q_len", "share"), [(1, 1), (1, 6), (1, 33), (128, 2)])
@pytest.mark.parametrize("extras", [{}, {"softcap": 1.5, "sinks": True}], ids=["plain", "softcap and sinks"])
def test_what_is_no_number_shows_in_the_result(
    q_len: int, share: int, dtype: torch.dtype, extras: dict[str, Any]
) -> None:
    """In those queries that keep a key which is none, or are none themselves; in others where its value is none alone.

    As in PyTorch, a value that is no number may show in queries that give it no weight.
    """
    intervals = calls.causal_intervals(q_len, 900)
    call = calls.inputs(intervals, 900, heads=2 * share, kv_heads=2, dim=16, dtype=dtype, **extras)
    selection = compiled(call, torch.full((2, 1, q_len), 90))
    mask = selection.mask(2 * share, 900)
    for name, place in (("query", (0, 0, -1)), ("key", (1, 1, 895)), ("key", (0, 0, 0)), ("value", (1, 1, 895))):
        concerned = torch.zeros(mask.shape[:3], dtype=torch.bool)
        if name == "query":
            concerned[place] = True
        else:
            heads = slice(place[1] * share, (place[1] + 1) * share)
            concerned[place[0], heads] = mask[place[0], heads, :, place[2]]
        assert concerned.any()
        states = getattr(call, name).clone()
        states[place] = torch.nan
        ours = calls.run_engine("cpu", replace(call, **{name: states}), selection).isnan()
        assert ours[concerned].all()
        assert name == "value" or not ours[~concerned].any()
        # A score of inf is none either, but that of -inf is a key without weight.
        states[place] = torch.inf
        ours, theirs = (calls.run_engine(x, replace(call, **{name: states}), selection) for x in ("cpu", "reference"))
        assert not (ours.isfinite() & ~theirs.isfinite())[concerned].any()


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_weights_that_are_no_numbers_show_in_the_logits(name: str, part: str) -> None:
    model = sparse_model(name, "grouped")
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, part).weight[0, 0] = torch.nan
    assert not tiny.logits(model, tiny.tokens(1, 200)).isfinite().any()


@pytest.mark.parametrize("selector", ["grouped", "topk"])
def test_a_sequence_that_is_no_number_leaves_the_others_alone(selector: str) -> None:
    model = sparse_model("llama", selector)
    alone = tiny.logits(model, IDS[1:])
    with torch.no_grad():
        states = model.get_input_embeddings()(IDS)
        states[0, 40] = torch.nan
        logits = model(inputs_embeds=states, use_cache=False).logits
    assert_same(logits[1:], alone)
    assert not logits[0, 40].isfinite().any()


# Caches that change hands.


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("order", ["dspds", "sdspd"])
def test_a_cache_goes_from_a_dense_model_to_a_patched_one_and_back(name: str, order: str) -> None:
    """d: dense; s and p: patched, with few keys and with all of them. One of ours gives what a stock cache gives."""
    patches = {"s": {}, "p": {"law": "fraction", "fraction": 1.0}}

    @torch.no_grad()
    def run(cache: Any) -> list[Tensor]:
        model, out = tiny.model(name), []
        for i, kind in enumerate(order):
            if kind == "d":
                hf_sparse.unpatch(model)
            else:
                hf_sparse.patch(model, SPARSE, selector="topk", **patches[kind])
            out.append(model(IDS[:, 18 * i : 18 * (i + 1)], past_key_values=cache).logits)
        return out

    config = tiny.config(name)
    ours, theirs = run(SparseCache(config)), run(DynamicCache(config=config))
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)
    dense = tiny.logits(tiny.model(name), IDS)
    if "s" not in order[:1]:
        assert_same(ours[0], dense[:, :18])
    assert not torch.allclose(torch.cat(ours, 1), dense[:, : 18 * len(order)], atol=1e-2)
