"""The compiled kernels in a model, and machines without them; what they compute is tested with those who use them."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.cache import SparseCache, SparseLayer
from hf_sparse.errors import UserError
from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build
from hf_sparse.kernels.cpu.compiler import find_compiler, library_name
from hf_sparse.kernels.quantised import QuantisedKeys
from tests import tiny
from tests.builds import built_anew

needs_kernels = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=str(cpu.unsupported_reason()))


@needs_kernels
def test_decoding_quantises_each_key_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[int, int]] = []

    def counted(key: Tensor, start: int, stop: int, *rest: Any) -> None:
        spans.append((start, stop))
        quantise(key, start, stop, *rest)

    quantise = cpu.LAYOUT.quantise
    monkeypatch.setattr(cpu, "LAYOUT", replace(cpu.LAYOUT, quantise=counted))
    model = tiny.model("llama")
    hf_sparse.patch(model, alpha=2.0, min_keys=8, recent_keys=4, dense_below=0, dense_layers=[0])
    cache = SparseCache(model.config)
    tokens = torch.randint(0, 90, (2, 300))
    with torch.no_grad():
        for start, stop in ((0, 280), (280, 281), (281, 282), (282, 300)):
            model(tokens[:, start:stop], past_key_values=cache)
    # A single query's own key is quantised by the kernel that decodes.
    layers = model.config.num_hidden_layers - 1
    assert spans == [span for span in ((0, 280), (282, 300)) for _ in range(layers)]
    for layer in cache.layers[1:]:
        key = layer.keys
        assert isinstance(layer, SparseLayer)
        assert key is not None
        anew = QuantisedKeys().up_to(key, 300, cpu.LAYOUT, texts=lambda: [(0, 300)] * 2)
        for own, other in zip(layer.quantised.up_to(key, 300, cpu.LAYOUT), anew, strict=True):
            assert torch.equal(own[:, :, :18], other[:, :, :18])


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


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels are looked for again, where none were compiled before."""
    monkeypatch.setattr(build.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.delenv("HF_SPARSE_CPU", raising=False)
    build._found.cache_clear()
    yield
    build._found.cache_clear()


@pytest.mark.parametrize(("compiler", "reason"), [("/nowhere/c++", "does not run"), ("false", "failed: no message")])
@pytest.mark.usefixtures("anew")
def test_a_compiler_that_does_not_run_is_named(compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert f"the C++ compiler {compiler} {reason}" in (build.unsupported_reason() or "")
    assert build.description() is None


@needs_kernels
@pytest.mark.usefixtures("anew")
def test_a_target_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_CPU", "mmx")
    with pytest.raises(UserError, match=r"^HF_SPARSE_CPU=mmx is no target of this CPU: it supports generic"):
        cpu.unsupported_reason()


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.usefixtures("anew")
def test_targets_that_the_compiler_does_not_know_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that makes empty objects of the kernels."""
    script = tmp_path / "c++"
    script.write_text(
        """#!/bin/sh
case " $* " in
*" -mavx2 "*) exit 1 ;;
*" -DHFS=hfs_generic "*) shift $(($# - 1)); exec REAL -x c++ -c /dev/null -o "$1" ;;
esac
exec REAL "$@"
""".replace("REAL", shlex.join(find_compiler()))
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    folder = Path(build.__file__).parent
    assert build._compiled(folder) == build._place((str(script),), folder, "generic")
    if "avx2" in build._usable(build._load(build._place((str(script),), folder))):
        monkeypatch.setenv("HF_SPARSE_CPU", "avx2")
        with pytest.raises(UserError, match=r"^HF_SPARSE_CPU=avx2: the C\+\+ compiler .* cannot compile for it$"):
            build._compiled(folder)


def test_other_sources_and_settings_have_other_libraries(tmp_path: Path) -> None:
    sources = Path(shutil.copytree(Path(build.__file__).parent, tmp_path / "cpu"))
    before = library_name(sources)
    assert library_name(sources) == before == library_name(Path(build.__file__).parent)
    assert library_name(sources, ("c++",), ("generic",)) != library_name(sources, ("c++",), ("avx2",)) != before
    header = sources / "vectors.hpp"
    header.write_text(header.read_text() + "\n")
    assert library_name(sources) != before
