"""The compiled kernels for processors: keys in 8 bits, the selection against plain loops, and machines without them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.cache import SparseCache
from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.selectors import compiled
from hf_sparse.selectors.grouped import GROUP_QUERIES
from tests import calls, tiny

needs_kernels = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=str(cpu.unsupported_reason()))


def decoded(parts: tuple[Tensor, Tensor], length: int) -> Tensor:
    """Keys `(batch, kv_heads, length, head_dim)` from codes and scales."""
    codes, scales = parts
    batch, heads, tiles, quads, size, _ = codes.shape
    keys = (codes.float() - 128).transpose(3, 4).reshape(batch, heads, tiles * size, quads * 4)
    return (keys * scales[..., None])[:, :, :length]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_keys_are_off_by_half_a_step(dtype: torch.dtype) -> None:
    storage = torch.randn(2, 80, 3, 12).to(dtype).transpose(1, 2)
    key = storage[:, :, 5:78]
    key[0, 0, 7] = 0
    parts = QuantisedKeys().up_to(key, 70, cpu.LAYOUT)
    step = key[:, :, :70].float().abs().amax(-1, keepdim=True) / 127
    assert ((decoded(parts, 70) - key[:, :, :70].float()).abs() <= 0.5001 * step).all()


@needs_kernels
def test_quantised_keys_follow_the_cache() -> None:
    """Appended a few at a time, cropped, overwritten and rearranged: as if quantised at once."""
    key = torch.randn(3, 2, 100, 8)
    kept = QuantisedKeys()
    for stop in (1, 15, 16, 17, 64, 90):
        kept.up_to(key, stop, cpu.LAYOUT)
    kept.crop(40)
    key = torch.cat([key[:, :, :40], torch.randn(3, 2, 60, 8)], dim=2)
    kept.up_to(key, 70, cpu.LAYOUT)
    order = torch.tensor([2, 0, 0, 1])
    kept.rearrange(lambda x: x.index_select(0, order))
    key = key[order]
    followed, fresh = (decoded(x.up_to(key, 100, cpu.LAYOUT), 100) for x in (kept, QuantisedKeys()))
    assert torch.equal(followed, fresh)


KINDS = {
    "causal": lambda q_len, kv: calls.causal_intervals(q_len, kv),
    "sliding": lambda q_len, kv: calls.causal_intervals(q_len, kv, window=kv // 2),
    "left": lambda q_len, kv: calls.causal_intervals(q_len, kv, left=(0, kv // 3)),
    "right": lambda q_len, kv: calls.causal_intervals(q_len, kv, right=(0, q_len // 2)),
    "static": lambda q_len, kv: calls.causal_intervals(q_len, kv, left=(0, 2), spare=(kv - q_len) // 2),
}


@needs_kernels
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads", "kv_heads"),
    [(1, 900, 3, 1), (1, 900, 10, 2), (1, 300, 18, 1), (1, 300, 2, 2), (7, 200, 4, 2), (2 * GROUP_QUERIES, 400, 3, 1)],
)
def test_the_kernels_keep_what_they_should(
    kind: str, q_len: int, kv_len: int, heads: int, kv_heads: int, softcap: float | None
) -> None:
    """Aggregated scores have 8 significant bits: where two are nearly equal, another key may win."""
    call = calls.inputs(KINDS[kind](q_len, kv_len), kv_len, heads=heads, kv_heads=kv_heads, dim=16, softcap=softcap)
    config = SparseAttentionConfig(sink_keys=3, recent_keys=10)
    for shape in ((1, heads, 1), (1, 1, 1)):
        budgets = torch.minimum(call.visible[:, None], torch.randint(5, 70, shape)).expand(2, shape[1], -1)
        selection = compiled.select_compiled(call, budgets, config.always, min(GROUP_QUERIES, q_len))
        mask = selection.mask(heads, kv_len)
        expected = calls.select_grouped(call, budgets, 3, 10, min(GROUP_QUERIES, q_len))
        assert torch.equal(mask.sum(-1), budgets.expand(2, heads, -1))
        assert torch.equal(selection.kept(heads), mask.sum(-1))
        assert (mask & expected).sum() >= 0.98 * expected.sum()


@needs_kernels
@pytest.mark.parametrize("q_len", [1, 7, 2 * GROUP_QUERIES])
def test_the_same_keys_are_kept_without_a_compiler(q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where 8 bits are coarse: one component of each key is large, and of no use to any query.

    Ranked by exact scores, about one kept key in ten would be another one.
    """
    call = calls.inputs(calls.causal_intervals(q_len, 900, left=(0, 30)), 900, dim=16)
    key, query = call.key.clone(), call.query.clone()
    key[..., 0] = 60.0
    query[..., 0] = 0.0
    call = replace(call, key=key, query=query)
    budgets = call.visible[:, None].clamp(max=60)
    config = SparseAttentionConfig(sink_keys=2, recent_keys=8)
    compiled_mask = calls.select("grouped", call, budgets, config).mask(4, 900)
    monkeypatch.setattr(compiled, "unsupported_reason", lambda _: "a test wants none")
    plain_mask = calls.select("grouped", call, budgets, config).mask(4, 900)
    assert torch.equal(compiled_mask.sum(-1), plain_mask.sum(-1))
    assert (compiled_mask & plain_mask).sum() >= 0.99 * compiled_mask.sum()


@needs_kernels
@pytest.mark.parametrize("q_len", [1, 64])
def test_a_key_that_outweighs_everything_is_found(q_len: int) -> None:
    """Also where weights relative to the recent keys do not fit into a float."""
    call = calls.inputs(calls.causal_intervals(q_len, 500), 500, dim=16)
    call = replace(call, query=call.query.abs() * 30, key=call.key - 2)
    for wanted in (5, 123, 350):
        key = call.key.clone()
        key[:, :, wanted] = 8
        key[:, :, wanted + 1] = 7
        changed = replace(call, key=key)
        mask = calls.select(
            "grouped", changed, torch.full((2, 1, q_len), 90), SparseAttentionConfig(sink_keys=0, recent_keys=70)
        ).mask(4, 500)
        assert mask[..., wanted : wanted + 2].all()


@needs_kernels
@pytest.mark.parametrize("q_len", [1, 192])
def test_threads_change_nothing(q_len: int) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, 9000), 9000, dim=16)
    budgets = torch.full((2, 1, q_len), 300)
    masks, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            masks.append(calls.select("grouped", call, budgets, SparseAttentionConfig()).mask(4, 9000))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*masks)


@needs_kernels
@pytest.mark.parametrize("places", ["one tile in sixteen", "all others"])
def test_the_best_of_very_many_are_found_wherever_they_lie(places: str) -> None:
    """Also where a sample of the scores says nothing about the rest of them."""
    call = calls.inputs(calls.causal_intervals(1, 9000), 9000, heads=2, kv_heads=1, dim=16)
    query = call.query[:, :1].expand(-1, 2, -1, -1).contiguous()
    position = torch.arange(9000)
    strong = ((position - 16) // cpu.lanes() % 16 == 0) == (places == "one tile in sixteen")
    strong &= (position >= 16) & (position < 8900)
    key = call.key.clone()
    key[:, :, strong] += query[:, :1] * 100 / query[:, :1].square().sum(-1, keepdim=True)
    budget = min(500, int(strong.sum())) + 16 + 64
    config = SparseAttentionConfig(sink_keys=16, recent_keys=64)
    call = replace(call, query=query, key=key)
    mask = calls.select("grouped", call, torch.full((2, 1, 1), budget), config).mask(2, 9000)
    assert torch.equal(mask[..., 16:8936].sum(-1), (mask & strong).sum(-1))
    assert (mask.sum(-1) == budget).all()


@needs_kernels
def test_equal_keys_of_very_many_are_kept_from_the_most_recent_on() -> None:
    call = calls.inputs(calls.causal_intervals(1, 9000), 9000, dim=16)
    call = replace(call, key=call.key[:, :, :1].expand(-1, -1, 9000, -1).contiguous())
    mask = calls.select("grouped", call, torch.full((2, 1, 1), 1000), SparseAttentionConfig(sink_keys=4)).mask(4, 9000)
    assert mask[..., :4].all()
    assert mask[..., -996:].all()
    assert (mask.sum(-1) == 1000).all()


@needs_kernels
def test_decoding_quantises_each_key_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[int, int]] = []

    def counted(key: Tensor, start: int, stop: int, out: tuple[Tensor, Tensor]) -> None:
        spans.append((start, stop))
        quantise(key, start, stop, out)

    quantise = cpu.LAYOUT.quantise
    monkeypatch.setattr(cpu, "LAYOUT", replace(cpu.LAYOUT, quantise=counted))
    model = tiny.model("llama")
    hf_sparse.patch(model, alpha=2.0, min_keys=8, recent_keys=4, dense_below=0, dense_layers=[0])
    cache = SparseCache(model.config)
    tokens = torch.randint(0, 90, (2, 40))
    with torch.no_grad():
        for start, stop in ((0, 30), (30, 31), (31, 32), (32, 40)):
            model(tokens[:, start:stop], past_key_values=cache)
    layers = model.config.num_hidden_layers - 1
    assert spans == [span for span in ((0, 30), (30, 31), (31, 32), (32, 40)) for _ in range(layers)]


NARROW = """
import sys, torch
from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build
from tests import test_kernels
assert cpu.unsupported_reason() is None, cpu.unsupported_reason()
torch.save([cpu.lanes(), [test_kernels.attended(q_len) for q_len in (1, 128)]], sys.argv[1])
"""


def attended(q_len: int) -> tuple[Tensor, Tensor]:
    """What is kept by, and comes out of, a call of so many queries."""
    call = calls.inputs(calls.causal_intervals(q_len, 900), 900, heads=6, kv_heads=2, dim=20)
    selection = calls.select("grouped", call, torch.full((2, 1, q_len), 90), SparseAttentionConfig())
    return selection.mask(6, 900), calls.run_engine("cpu", call, selection)


@needs_kernels
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86")
@pytest.mark.parametrize(("flags", "lanes"), [("-mno-avx512f", {4, 8}), ("-mno-avx512f -mno-avx2", {4})])
def test_processors_with_smaller_registers_do_the_same(
    flags: str, lanes: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    compiler = f"{os.environ.get('CXX') or 'c++'} {flags}"
    out = tmp_path_factory.mktemp("narrow") / "found"
    # Compiled once for all tests that take these flags.
    compiled_at = str(tmp_path_factory.getbasetemp() / "kernels")
    environment = {**os.environ, "HF_ASSETS_CACHE": compiled_at, "CXX": compiler}
    subprocess.run([sys.executable, "-c", NARROW, out], env=environment, check=True, cwd=Path.cwd())
    side_by_side, found = torch.load(out)
    assert side_by_side in lanes
    for q_len, (mask, out) in zip((1, 128), found, strict=True):
        expected, expected_out = attended(q_len)
        assert torch.equal(mask.sum(-1), expected.sum(-1))
        same = (mask == expected).all(-1)
        assert same.float().mean() > 0.9
        assert_close(out[same], expected_out[same])


WITHOUT = """
import torch, hf_sparse
from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build
from tests import tiny
model = tiny.model("llama")
print(cpu.unsupported_reason())
try:
    hf_sparse.patch(model, engine="cpu")
except ValueError as error:
    print(error, hf_sparse.is_patched(model))
hf_sparse.patch(model, alpha=2.0, min_keys=8, recent_keys=4, dense_below=0)
with torch.no_grad():
    model(torch.arange(60)[None])
print(hf_sparse.report(model))
"""


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"HF_SPARSE_KERNELS": "0"}, "HF_SPARSE_KERNELS=0 is set"),
        ({"CXX": f"{sys.executable} -c 0"}, "could not be compiled"),
    ],
)
def test_without_kernels_a_model_runs_and_says_so(variables: dict[str, str], reason: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ASSETS_CACHE": str(tmp_path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    why, refused, *report = done.stdout.splitlines()
    assert reason in why
    assert refused == f"engine 'cpu' cannot run here: {why}; engine 'auto' does without False"
    assert any("attention calls looked for keys without compiled kernels" in line and reason in line for line in report)


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_a_compiler_that_does_not_run_is_named(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build.constants, "HF_ASSETS_CACHE", str(tmp_path))
    build._found.cache_clear()
    try:
        assert f"the C++ compiler {compiler} does not run" in (build.unsupported_reason() or "")
    finally:
        build._found.cache_clear()


@needs_kernels
@pytest.mark.parametrize("q_len", [1, 64])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_keys_that_are_no_numbers_do_not_hold_a_call_up(q_len: int, number: float) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, 500), 500, dim=16)
    key = call.key.clone()
    key[:, :, 100:103] = number
    selection = calls.select("grouped", replace(call, key=key), torch.full((2, 1, q_len), 90), SparseAttentionConfig())
    assert (selection.kept(4) == 90).all()


@needs_kernels
@pytest.mark.parametrize("q_len", [1, 64])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_defaults_of_pytorch_do_not_matter(default: torch.dtype | torch.device, q_len: int) -> None:
    """What the kernels write to has the type and the place that they know."""
    call = calls.inputs(calls.causal_intervals(q_len, 600), 600, dim=16)
    budgets, config = torch.full((2, 1, q_len), 90), SparseAttentionConfig()

    def attended() -> Tensor:
        fresh = replace(call, intervals=call.intervals.clone())
        return calls.run_engine("cpu", fresh, calls.select("grouped", fresh, budgets, config))

    expected, before = attended(), torch.get_default_dtype()
    if isinstance(default, torch.device):
        with default:
            assert torch.equal(attended(), expected)
        return
    torch.set_default_dtype(default)
    try:
        assert torch.equal(attended(), expected)
    finally:
        torch.set_default_dtype(before)


@needs_kernels
@pytest.mark.parametrize("q_len", [1, 64])
@pytest.mark.parametrize("name", ["sink_keys", "recent_keys"])
def test_lists_are_no_longer_than_the_text(name: str, q_len: int) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, 600), 600, dim=16)
    config = SparseAttentionConfig(**{name: 1_000_000})
    selection = calls.select("grouped", call, torch.full((2, 1, q_len), 90), config)
    assert selection.positions.shape[-1] <= 608 + 192
    assert (selection.kept(4) == 90).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="leaves out an instruction of x86-64")
@needs_kernels
def test_processors_with_other_instructions_have_other_kernels() -> None:
    compiler = build._compiler()
    assert build._native(compiler) == build._native(compiler)
    assert build._native(compiler) != build._native((*compiler, "-mno-sse4.2"))
