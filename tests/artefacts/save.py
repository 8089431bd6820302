"""Save what later releases must read to the same values: policies, a model with its card, a cache and logits.

python tests/artefacts/save.py    # into tests/artefacts/VERSION, which must not be there yet

Run it once for each release, before it is tagged; `tests/test_artefacts.py` reads all of them ever after. Everything is
made through the public interface. The model is small and random; its weights are saved, for random numbers may differ
between releases of PyTorch. Logits are saved only if arithmetic in float64 keeps the same keys: they do not hang on how
a CPU rounds.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse import CalibrationRecord, SparseAttentionConfig

FOLDER = Path(__file__).parent / hf_sparse.__version__
MEASURED = Path(__file__).parents[2] / "model_cards/gemma-3-270m/perplexity"
"""Results under the default configuration, for a card to report."""

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PER_HEAD = {1: ((1.0, 0.5), (2.0, 0.5), (3.0, 0.4), (1.5, 0.6))}
RECORD = CalibrationRecord(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layers=2,
    heads={0: 4, 1: 4},
    selector="grouped",
    documents=("a.txt", "b.txt"),
    held_out=("c.txt",),
    texts_sha256="0f" * 32,
    fitted_from=64,
    fitted_to=256,
    target="density",
    target_value=0.25,
    reached=0.26,
    reached_at=256,
    intervals={1: ((0.5, 1.5, 0.4, 0.6), (1.5, 2.5, 0.4, 0.6), (2.5, 3.5, 0.3, 0.5), (1.0, 2.0, 0.5, 0.7))},
)
# Name -> fields: every law, selector and engine that a file can name, and every field that is not the default.
POLICIES: dict[str, dict[str, Any]] = {
    "default": {},
    "calibrated": {"per_head": PER_HEAD, "calibration": RECORD, "dense_layers": ()},
    "power": {"alpha": 12.0, "exponent": 0.4, "max_keys": 4096, "engine": "gather"},
    "fixed": {"law": "fixed", "keys": 512, "selector": "topk", "engine": "reference"},
    "fraction": {"law": "fraction", "fraction": 0.1, "selector": "window", "engine": "cpu", "dense_layers": (0, 1)},
    "log": {"law": "log", "alpha": 64.0, "min_keys": 16, "engine": "triton", "dense_below": 0},
    "ends": {"sink_keys": 0, "recent_keys": 128, "min_keys": 130},
}
VISIBLE = (1, 2, 100, 128, 255, 256, 257, 1000, 4096, 100_000, 1_000_000)
"""Numbers of visible keys for which budgets are saved."""

SPARSE = SparseAttentionConfig(
    alpha=2.0, min_keys=4, sink_keys=1, recent_keys=3, dense_layers=(), dense_below=8, per_head=PER_HEAD
)
TOKENS, CACHED = 96, 72


def small_model() -> LlamaForCausalLM:
    """A random model in bfloat16 whose attention matters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
            if "q_proj" in name:
                weight.mul_(2)
    return model.to(torch.bfloat16)


def budgets(config: SparseAttentionConfig) -> dict[str, list[list[int]]]:
    """Layer -> for each head, or for all heads at once, how many keys a query keeps of those in `VISIBLE`."""
    visible = torch.tensor(VISIBLE)
    return {str(layer): config.budget(layer)(visible).reshape(-1, len(VISIBLE)).tolist() for layer in (0, 1)}


@torch.no_grad()
def read(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, hf_sparse.SparseCache]:
    """Logits of all tokens in two passes, and the cache after the first one."""
    cache = hf_sparse.SparseCache(model.config)
    first = model(ids[:, :CACHED], past_key_values=cache, use_cache=True).logits
    held = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    logits = torch.cat([first, model(ids[:, CACHED:], past_key_values=cache, use_cache=True).logits], dim=1)
    before = hf_sparse.SparseCache(model.config)
    for layer, (keys, values) in enumerate(held):
        before.update(keys, values, layer)
    return logits, before


def save_policies() -> dict[str, Any]:
    """Write `policies`; gives the budgets of each."""
    (FOLDER / "policies").mkdir(parents=True)
    configs = {name: SparseAttentionConfig(**fields) for name, fields in POLICIES.items()}
    for name, config in configs.items():
        text = json.dumps(config.to_dict(), indent=1) + "\n"
        (FOLDER / "policies" / f"{name}.json").write_text(text, encoding="utf-8")
    return {name: budgets(config) for name, config in configs.items()}


def save_published() -> None:
    """Write `published`: a policy without weights, and a card with figures."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "published"
        base = {"base_model": "someone/model", "base_revision": "0a" * 20}
        hf_sparse.save_pretrained(hf_sparse.patch(small_model()), made, results=[MEASURED], **base)
        (FOLDER / "published").mkdir()
        for name in ("README.md", "sparse_config.json"):
            shutil.copy(made / name, FOLDER / "published" / name)


def save_logits() -> dict[str, float]:
    """Write `logits.safetensors`, of the model in `model`; gives the density under each selector."""
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    tensors, densities = {"ids": ids}, {}
    for selector in ("grouped", "topk", "window"):
        found = []
        for dtype in ("float64", "float32"):
            model = hf_sparse.from_pretrained(FOLDER / "model", dtype=dtype)
            found.append(read(hf_sparse.patch(model, SPARSE, selector=selector, engine="reference"), ids))
        (exact, _), (logits, cache) = found
        torch.testing.assert_close(logits, exact.float(), atol=2e-5, rtol=1e-4)
        tensors[f"logits.{selector}"] = logits[0]
        densities[selector] = hf_sparse.report(model).density
        if selector == "grouped":
            for layer, held in enumerate(cache.layers):
                tensors |= {f"keys.{layer}": held.keys, f"values.{layer}": held.values}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, FOLDER / "logits.safetensors")
    return densities


def main() -> None:
    """Write everything, unless the folder is there."""
    if FOLDER.exists():
        sys.exit(f"{FOLDER} is there: a release saves once")
    expected: dict[str, Any] = {"visible": VISIBLE, "budgets": save_policies()}
    model = hf_sparse.patch(small_model(), SPARSE, calibration=RECORD)
    hf_sparse.save_pretrained(model, FOLDER / "model", weights=True)
    save_published()
    expected["density"] = save_logits()
    (FOLDER / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
