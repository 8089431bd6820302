"""The compiled kernels in a model, and machines without them; what they compute is tested with those who use them."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.cache import SparseCache
from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build
from tests import tiny
from tests.builds import built_anew

needs_kernels = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=str(cpu.unsupported_reason()))


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


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"HF_SPARSE_KERNELS": "0"}, "HF_SPARSE_KERNELS=0 is set"),
        ({"CXX": f"{sys.executable} -c 0"}, "could not be compiled"),
    ],
)
def test_without_kernels_a_model_runs_and_says_so(variables: dict[str, str], reason: str, tmp_path: Path) -> None:
    model = tiny.model("llama")
    with built_anew(tmp_path, **variables):
        why = cpu.unsupported_reason() or ""
        assert reason in why
        with pytest.raises(ValueError, match="engine 'cpu' cannot run here") as caught:
            hf_sparse.patch(model, engine="cpu")
        assert str(caught.value) == f"engine 'cpu' cannot run here: {why}; engine 'auto' does without"
        assert not hf_sparse.is_patched(model)
        hf_sparse.patch(model, alpha=2.0, min_keys=8, recent_keys=4, dense_below=0)
        tiny.logits(model, tiny.tokens(1, 60))
        [note] = [note for note in hf_sparse.report(model).notes if "without compiled kernels" in note]
    assert "attention calls looked for keys" in note
    assert reason in note


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_a_compiler_that_does_not_run_is_named(compiler: str, tmp_path: Path) -> None:
    with built_anew(tmp_path, CXX=compiler):
        assert f"the C++ compiler {compiler} does not run" in (cpu.unsupported_reason() or "")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="leaves out an instruction of x86-64")
@needs_kernels
def test_processors_with_other_instructions_have_other_kernels() -> None:
    compiler = build._compiler()
    assert build._native(compiler) == build._native(compiler)
    assert build._native(compiler) != build._native((*compiler, "-mno-sse4.2"))


@pytest.mark.parametrize(
    ("unknown", "native"), [("-none", ("-march=native",)), ("-march=native", ("-mcpu=native",)), ("-m*=native", ())]
)
def test_kernels_are_compiled_with_flags_that_the_compiler_knows(
    unknown: str, native: tuple[str, ...], tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase " $* " in *" "{unknown}" "*) exit 1;; esac\necho "#define WITH $*"\n')
    compiler.chmod(0o755)
    flags, defined = build._native((str(compiler),))
    assert flags == (*build._FLAGS, *native)
    assert " ".join(flags) in defined
