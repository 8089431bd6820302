"""`patch` and its inverse: what is restored, what is refused, and what no one else may notice."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.errors import UserError
from tests import tiny

SPARSE = SparseAttentionConfig(
    alpha=2.0, min_keys=2, sink_keys=1, recent_keys=2, dense_layers=(), dense_below=0, selector="topk"
)
IDS = tiny.tokens(2, 40)


def attributes(model: nn.Module) -> dict[str, tuple[int, Any]]:
    """Everything that hangs on the modules of a model, compared by identity (and kept alive, so that ids stay)."""
    return {
        f"{name}.{key}": (id(value), value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def settings(model: PreTrainedModel) -> str:
    """The configuration, in words."""
    config = model.config
    return json.dumps(config.to_dict(), sort_keys=True, default=str) + str(config._attn_implementation)


def is_sparse(model: PreTrainedModel) -> bool:
    """Whether a forward pass drops keys, told by what the model says and not by what it counts."""
    dense = tiny.logits(tiny.model(model.config.model_type.removesuffix("_text")), IDS)
    return not torch.allclose(tiny.logits(model, IDS), dense, atol=1e-3)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_unpatch_leaves_nothing_behind(name: str) -> None:
    model = tiny.model(name)
    before, hung, said = tiny.logits(model, IDS), attributes(model), settings(model)
    config = model.config
    assert not hf_sparse.is_patched(model)

    assert hf_sparse.patch(model, SPARSE) is model
    assert hf_sparse.is_patched(model)
    assert not torch.allclose(tiny.logits(model, IDS), before, atol=1e-3)
    model.generate(IDS, max_new_tokens=2)

    assert hf_sparse.unpatch(model) is model
    assert not hf_sparse.is_patched(model)
    assert model.config is config
    assert settings(model) == said
    assert attributes(model) == hung
    assert torch.equal(tiny.logits(model, IDS), before)
    assert hf_sparse.unpatch(model) is model
    assert attributes(model) == hung


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unpatch_restores_the_implementation_that_was_set(implementation: str) -> None:
    model = tiny.model("llama")
    model.set_attn_implementation(implementation)
    before = tiny.logits(model, IDS)
    hf_sparse.unpatch(hf_sparse.patch(model, SPARSE))
    assert model.config._attn_implementation == implementation
    assert torch.equal(tiny.logits(model, IDS), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_sibling_that_shares_the_configuration_stays_dense(name: str) -> None:
    model = tiny.model(name)
    sibling = type(model)(model.config).eval()
    sibling.load_state_dict(model.state_dict())
    before = tiny.logits(sibling, IDS)
    hf_sparse.patch(model, SPARSE)
    assert not hf_sparse.is_patched(sibling)
    assert torch.equal(tiny.logits(sibling, IDS), before)
    assert sibling.config._attn_implementation == "sdpa"
    # ... and the other way round: patching and restoring the sibling leaves the model patched.
    sparse = tiny.logits(model, IDS)
    hf_sparse.unpatch(hf_sparse.patch(sibling, SPARSE))
    assert torch.equal(tiny.logits(model, IDS), sparse)


def test_patching_twice_is_patching_once() -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    tiny.logits(model, IDS)
    hung, calls = attributes(model), hf_sparse.report(model).rows
    assert hf_sparse.patch(model, SPARSE) is model
    assert attributes(model) == hung
    assert hf_sparse.report(model).rows == calls
    hf_sparse.unpatch(model)
    assert not hf_sparse.is_patched(model)
    assert not is_sparse(model)


@pytest.mark.parametrize("again", [SPARSE, replace(SPARSE, alpha=3.0)], ids=["the same", "another"])
def test_patching_again_after_another_implementation_was_set(again: SparseAttentionConfig) -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    model.set_attn_implementation("sdpa")
    assert not is_sparse(model)
    assert "set to 'sdpa' after patching" in str(hf_sparse.report(model))
    hf_sparse.patch(model, again)
    assert is_sparse(model)
    assert "after patching" not in str(hf_sparse.report(model))


def test_a_model_inside_another_is_patched_with_it_or_alone() -> None:
    model = tiny.model("llama")
    for first, second in ((model.model, model), (model, model.model)):
        hf_sparse.patch(first, SPARSE)
        with pytest.raises(ValueError, match="unpatch that one first"):
            hf_sparse.patch(second, SPARSE)
        hf_sparse.unpatch(second)
        assert is_sparse(model)
        hf_sparse.unpatch(first)
        assert not is_sparse(model)


def test_what_changes_while_a_model_is_patched_stays_changed(tmp_path: Path) -> None:
    model = tiny.model("llama")
    config = model.config
    with hf_sparse.patched(model, SPARSE):
        model.resize_token_embeddings(tiny.VOCAB + 23)
    assert model.config is config
    assert config.vocab_size == tiny.VOCAB + 23
    assert config._attn_implementation == "sdpa"
    assert model(IDS, labels=IDS).loss.isfinite()
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).vocab_size == tiny.VOCAB + 23


def test_a_patched_model_is_freed_at_once() -> None:
    """And not when Python next looks for cycles: on a GPU that would be too late."""
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    weight = weakref.ref(model.model.embed_tokens.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_patching_with_another_configuration_replaces_it() -> None:
    model, other = tiny.model("llama"), tiny.model("llama")
    hung, before = attributes(model), tiny.logits(model, IDS)
    hf_sparse.patch(model, SPARSE, alpha=1.0)
    tiny.logits(model, IDS)
    hf_sparse.patch(model, SPARSE, alpha=3.0)
    assert hf_sparse.report(model).rows == []
    assert torch.equal(tiny.logits(model, IDS), tiny.logits(hf_sparse.patch(other, SPARSE, alpha=3.0), IDS))
    hf_sparse.unpatch(model)
    assert attributes(model) == hung
    assert torch.equal(tiny.logits(model, IDS), before)


def test_fields_replace_those_of_the_configuration() -> None:
    one, other = tiny.model("llama"), tiny.model("llama")
    hf_sparse.patch(one, SPARSE, alpha=5.0, selector="window")
    hf_sparse.patch(
        other,
        alpha=5.0,
        min_keys=2,
        sink_keys=1,
        recent_keys=2,
        dense_layers=(),
        dense_below=0,
        selector="window",
    )
    assert torch.equal(tiny.logits(one, IDS), tiny.logits(other, IDS))


def test_an_exception_leaves_nothing_behind() -> None:
    model = tiny.model("gemma2")
    hung, before = attributes(model), tiny.logits(model, IDS)

    def fails() -> None:
        with hf_sparse.patched(model, SPARSE) as inside:
            assert inside is model
            assert hf_sparse.is_patched(model)
            assert not torch.allclose(tiny.logits(model, IDS), before, atol=1e-3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert attributes(model) == hung
    assert torch.equal(tiny.logits(model, IDS), before)


def test_patched_inside_a_patch_restores_the_patch() -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    outer = tiny.logits(model, IDS)
    hf_sparse.generate_lossless(model, IDS[:1], max_new_tokens=4, gamma=2)
    cache = DynamicCache(config=model.config)

    def decode() -> None:
        with torch.no_grad():
            model(IDS[:, :1], past_key_values=cache)

    decode()
    decode()
    before = hf_sparse.report(model)
    with hf_sparse.patched(model, SPARSE, alpha=1.0):
        assert not torch.allclose(tiny.logits(model, IDS), outer, atol=1e-3)
        decode()
        hf_sparse.generate_lossless(model, IDS[:1], max_new_tokens=4, gamma=2)
    assert hf_sparse.is_patched(model)
    assert hf_sparse.report(model) == before
    assert before.drafts.drafted
    assert before.notes
    assert torch.equal(tiny.logits(model, IDS), outer)


def test_unpatching_inside_a_patched_block_is_undone_with_it() -> None:
    model = tiny.model("llama")
    hung = attributes(model)
    with hf_sparse.patched(model, SPARSE):
        hf_sparse.unpatch(model)
        assert not is_sparse(model)
    assert attributes(model) == hung

    hf_sparse.patch(model, SPARSE)
    with hf_sparse.patched(model, SPARSE, alpha=1.0):
        hf_sparse.unpatch(model)
    assert hf_sparse.is_patched(model)
    assert is_sparse(model)
    hf_sparse.unpatch(model)
    assert attributes(model) == hung


def test_a_refused_field_inside_patched_leaves_nothing_behind() -> None:
    model = tiny.model("llama")
    hung = attributes(model)
    with pytest.raises(ValueError, match="alpha"), hf_sparse.patched(model, alpha=-1.0):
        pass
    assert attributes(model) == hung


@pytest.mark.parametrize("name", tiny.UNSUPPORTED)
def test_unsupported_models_are_refused_by_name_and_not_touched(name: str) -> None:
    model = tiny.unsupported(name)
    hung, said = attributes(model), settings(model)
    support = hf_sparse.inspect(model)
    assert not support.supported
    assert support.reasons
    with pytest.raises(ValueError, match=type(model).__name__) as caught:
        hf_sparse.patch(model, SPARSE)
    for reason in support.reasons:
        assert reason in str(caught.value)
    # What to do instead.
    assert any(word in str(caught.value) for word in ("use a", "only", "instead"))
    assert not hf_sparse.is_patched(model)
    assert attributes(model) == hung
    assert settings(model) == said


@pytest.mark.parametrize("name", tiny.UNSUPPORTED)
def test_inspect_refuses_by_configuration_alone(name: str) -> None:
    model = tiny.unsupported(name)
    assert not hf_sparse.inspect(model.config).supported


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_inspect_finds_the_layers(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    hung = attributes(model)
    support = hf_sparse.inspect(model)
    assert support.supported
    assert support.reasons == ()
    assert support.architecture == type(model).__name__
    assert [layer.layer for layer in support.layers] == [0, 1]
    kv_heads = {"gpt2": 4, "gpt_neox": 4}.get(name, 2)
    assert {(layer.heads, layer.kv_heads) for layer in support.layers} == {(4, kv_heads)}
    windows = [layer.sliding_window for layer in support.layers]
    expected = [tiny.WINDOW if name in tiny.SLIDING else None, tiny.WINDOW if name == "mistral" else None]
    assert windows == expected
    assert support.hybrid == (name in tiny.HYBRID)
    assert attributes(model) == hung
    # The same without weights: from a configuration, and from a folder that holds nothing else.
    assert hf_sparse.inspect(model.config) == support
    model.config.save_pretrained(tmp_path)
    assert hf_sparse.inspect(str(tmp_path)) == support


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this version of transformers has no Gemma-4")
def test_inspect_finds_layers_with_key_heads_of_their_own() -> None:
    sizes = {"vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 16}
    config = transformers.Gemma4TextConfig(
        **sizes,
        **heads,
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=12,
        attention_k_eq_v=True,
        pad_token_id=0,
    )
    support = hf_sparse.inspect(config)
    assert [(layer.kv_heads, layer.sliding_window) for layer in support.layers] == [(2, 12), (1, None)]


def test_inspect_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="Linear"):
        hf_sparse.inspect(nn.Linear(2, 2))
    for name in ("./nowhere", ""):
        with pytest.raises(UserError, match=f"{name!r} is not a model: pass a Hub id, a folder"):
            hf_sparse.inspect(name)


def test_patch_refuses_what_it_does_not_know() -> None:
    model = tiny.model("llama")
    hung = attributes(model)
    with pytest.raises(TypeError, match="Linear"):
        hf_sparse.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="'beta' is not a field of SparseAttentionConfig, which are alpha, exponent,"):
        hf_sparse.patch(model, beta=3)
    with pytest.raises(TypeError, match="dict"):
        hf_sparse.patch(model, {"alpha": 3.0})
    with pytest.raises(ValueError, match="exponent"):
        hf_sparse.patch(model, exponent=2.0)
    with pytest.raises(ValueError, match=r"dense_layers.*\[7\].*\[0, 1\]"):
        hf_sparse.patch(model, dense_layers=(0, 7))
    with pytest.raises(ValueError, match=r"per_head.*\[5\]"):
        hf_sparse.patch(model, per_head={5: ((1.0, 0.5),) * 4})
    with pytest.raises(ValueError, match=r"per_head\[1\].*3.*4 query heads"):
        hf_sparse.patch(model, per_head={1: ((1.0, 0.5),) * 3})
    assert attributes(model) == hung


def test_a_wrong_repatch_leaves_the_patch_as_it_was() -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    sparse, hung = tiny.logits(model, IDS), attributes(model)
    with pytest.raises(ValueError, match="dense_layers"):
        hf_sparse.patch(model, SPARSE, dense_layers=(9,))
    assert attributes(model) == hung
    assert torch.equal(tiny.logits(model, IDS), sparse)


class OddAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    """Attention that biases its scores by position, in a way that no one here knows."""

    def forward(self, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        bias = torch.zeros(1, 4, 1, key.shape[2])
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, position_bias=bias)
        return self.o_proj(out.flatten(2)), weights


def test_an_argument_that_is_not_understood_is_refused() -> None:
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = OddAttention
    hung = attributes(model)
    support = hf_sparse.inspect(model)
    assert not support.supported
    assert "position_bias" in str(support)
    with pytest.raises(ValueError, match="position_bias"):
        hf_sparse.patch(model, SPARSE)
    assert attributes(model) == hung


@pytest.mark.parametrize("argument", ["position_bias", "sinks", "indices"])
def test_an_argument_that_turns_up_at_run_time_is_refused(argument: str) -> None:
    """A model's forward hands unknown keyword arguments on to its attention."""
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    with pytest.raises(ValueError, match=argument):
        model(IDS, **{argument: torch.zeros(4)})


class MaskChangingAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    """Leaves out keys by a mask of its own, as models with sparse attention do."""

    def forward(self, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **_: Any) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        attention_mask = attention_mask.masked_fill(attention_mask < 0, -1.0)
        return attend(self, hidden_states, hidden_states, hidden_states, attention_mask, scaling=self.scaling)


def test_attention_that_makes_a_mask_of_its_own_is_refused() -> None:
    model = tiny.model("llama")
    model.model.layers[1].self_attn.__class__ = MaskChangingAttention
    with pytest.raises(ValueError, match="MaskChangingAttention changes the mask"):
        hf_sparse.patch(model, SPARSE)


def test_our_implementation_without_a_patch_says_what_to_do() -> None:
    model = tiny.model("llama")
    model.set_attn_implementation("hf_sparse")
    with pytest.raises(RuntimeError, match=r"hf_sparse\.patch"):
        tiny.logits(model, IDS)


def test_patch_prints_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("gemma3")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        hf_sparse.patch(model)
        hf_sparse.patch(model, SPARSE)
        tiny.logits(model, IDS)
        hf_sparse.unpatch(model)
    finally:
        transformers.logging.set_verbosity(verbosity)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert not caplog.records


def test_a_law_that_grows_too_slowly_is_named_once() -> None:
    model = tiny.model("llama")
    with pytest.warns(UserWarning, match="log") as caught:
        hf_sparse.patch(model, law="fixed", keys=64)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    hf_sparse.patch(model, law="fixed", keys=64)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_saving_a_patched_model_saves_the_model(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    before = tiny.logits(model, IDS)
    model.save_pretrained(tmp_path / "dense")
    hf_sparse.patch(model, SPARSE)
    tiny.logits(model, IDS)
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "dense").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == files
    for file in files:
        assert (tmp_path / "dense" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes(), file
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(tiny.logits(loaded, IDS), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_patched_model_is_patched_on_its_own(way: str) -> None:
    model = tiny.model("gemma2")
    before = tiny.logits(model, IDS)
    sparse = tiny.logits(hf_sparse.patch(model, SPARSE), IDS)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        pickle.dump(model, buffer)
        twin = pickle.loads(buffer.getvalue())
    assert hf_sparse.is_patched(twin)
    assert torch.equal(tiny.logits(twin, IDS), sparse)
    calls = hf_sparse.report(model).rows[0]["calls"]
    tiny.logits(twin, IDS)
    assert hf_sparse.report(model).rows[0]["calls"] == calls
    hf_sparse.unpatch(twin)
    assert torch.equal(tiny.logits(twin, IDS), before)
    assert torch.equal(tiny.logits(model, IDS), sparse)
    hf_sparse.unpatch(model)
    assert torch.equal(tiny.logits(model, IDS), before)


def test_patching_survives_a_change_of_dtype_and_of_mode() -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    sparse = tiny.logits(model, IDS)
    model.train()
    assert torch.equal(tiny.logits(model, IDS), sparse)
    assert torch.equal(tiny.logits(model.double().float(), IDS), sparse)
    assert tiny.logits(model.to(torch.bfloat16), IDS).isfinite().all()


def test_patching_goes_along_with_offloading() -> None:
    """Accelerate replaces the modules' forward methods; `device_map` does so whenever a model is split."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny.model("llama")
    sparse = tiny.logits(hf_sparse.patch(tiny.model("llama"), SPARSE), IDS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    hf_sparse.patch(model, SPARSE)
    assert torch.equal(tiny.logits(model, IDS), sparse)
