"""A random tiny model and random tokens: for `depth`, and to try the experiments on models without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_sparse.lab.experiment import Setting
from hf_sparse.lab.probe import layers_of
from hf_sparse.measure.windows import Window
from hf_sparse.results import provenance
from hf_sparse.share.source import describe

_VOCABULARY = 97
_CONFIG: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


@torch.no_grad()
def random_model(seed: int, layers: int = 4) -> PreTrainedModel:
    """A random Llama in which every matrix keeps the variance of its input and logits spread by about 2.

    A freshly initialised model attends almost uniformly and hardly moves its residual stream; this one does not.
    """
    made: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **_CONFIG))
    model: PreTrainedModel = made.eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.weight.shape[1] ** -0.5, generator=generator)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(generator=generator)
    for layer in layers_of(model):
        layer.attention.q_proj.weight.mul_(2.0)
    return model


def random_tokens(count: int, seed: int) -> Tensor:
    """Random tokens for `random_model`, int64 `(count,)`."""
    return torch.randint(_VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def tiny_setting(scale: str, seed: int, lengths: Sequence[int], targets: int = 64, documents: int = 3) -> Setting:
    """A random model with windows of random tokens, of rising `lengths`, to try the experiments without a real one."""
    model = random_model(seed)
    texts = [random_tokens(lengths[-1] + 1, seed + 1 + i) for i in range(documents)]
    windows = [
        Window(f"random tokens {i}", f"seed {seed + 1 + i}", ids[-1 - length : -1], ids[-targets:])
        for i, ids in enumerate(texts)
        for length in lengths
    ]
    info = describe("random tiny model", f"seed {seed}", model.config)
    return Setting(scale, seed, model, windows, provenance(info, model, seed))
