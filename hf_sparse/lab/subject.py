"""What the model experiments look at: the layers of a model, its text, and small random models to try them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_sparse.errors import UserError
from hf_sparse.lab.experiment import Setting, Subject
from hf_sparse.measure.windows import Window
from hf_sparse.results import provenance
from hf_sparse.share.source import ModelInfo
from hf_sparse.support import attention_modules

_ROWS_OF_LOGITS = 32
_VOCABULARY = 97
_LEAST_LAYERS = 3
_SHARPNESS = 2.0
"""Standard deviation of the logits of `random_model`, about."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a model.

    Attributes:
        index: Index of the layer.
        attention: Its attention module.
        block: The decoder layer that holds it: hidden states in, hidden states out.
    """

    index: int
    attention: Any
    block: nn.Module

    def heads(self, side: str) -> int:
        """Number of heads of the queries (`"q"`) or the keys (`"k"`)."""
        weight: Tensor = getattr(self.attention, f"{side}_proj").weight
        return len(weight) // int(self.attention.head_dim)


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """The decoder layers of `model`, in order.

    Raises:
        UserError: if its attention modules do not have the projections `q_proj` and `k_proj` and an index.
    """
    layers = []
    for name, module in attention_modules(model):
        if not all(hasattr(module, part) for part in ("q_proj", "k_proj", "o_proj", "layer_idx")):
            raise UserError(
                f"{type(module).__name__} has no separate q_proj, k_proj and o_proj, which the theory experiments read"
            )
        attention: Any = module
        layers.append(Layer(attention.layer_idx, module, model.get_submodule(name.rpartition(".")[0])))
    return sorted(layers, key=lambda layer: layer.index)


def check_layers(config: PreTrainedConfig) -> None:
    """Refuse a model whose layers cannot be looked at, before it is loaded.

    Raises:
        UserError: as `layers_of`, or if there are too few for errors to travel through.
    """
    with torch.device("meta"):
        layers = layers_of(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
    if len(layers) < _LEAST_LAYERS:
        raise UserError(f"the theory experiments need a model of {_LEAST_LAYERS} layers or more; it has {len(layers)}")


def token_axis(x: Tensor, heads: int) -> int:
    """The axis of tokens in queries or keys: `(batch, tokens, heads * dim)`, or 4-D with heads before or after them."""
    return 2 if x.dim() == 4 and x.shape[1] == heads else 1


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Queries or keys of the first sequence, in any layout of `token_axis`, as `(heads, tokens, dim)`."""
    if token_axis(x, heads) == 2:
        return x[0]
    return x[0].reshape(x.shape[1], heads, -1).transpose(0, 1) if x.dim() == 3 else x[0].transpose(0, 1)


def subject_of(setting: Setting) -> Subject:
    """The subject of a setting.

    Raises:
        ValueError: if it has none.
    """
    if setting.subject is None:
        raise ValueError("this experiment needs a model: the setting has no subject")
    return setting.subject


def longest_windows(subject: Subject, at_most: int | None = None) -> list[Window]:
    """For each document its longest window, or the longest of `at_most` tokens if there is one that short."""
    found: dict[str, Window] = {}
    for window in sorted(subject.windows, key=lambda window: window.length):
        if window.document not in found or at_most is None or window.length <= at_most:
            found[window.document] = window
    order = dict.fromkeys(window.document for window in subject.windows)
    return [found[document] for document in order]


def window_cell(window: Window, **more: Any) -> dict[str, Any]:
    """The entries of a cell that say which tokens it reads."""
    return {"document": window.document, "window": window.sha256, "length": window.length, **more}


def find_window(subject: Subject, sha256: str) -> Window:
    """The window with this hash."""
    return next(window for window in subject.windows if window.sha256 == sha256)


def row_lengths(length: int, least: int = 128) -> list[int]:
    """Two or more n at which rows are looked at: `least` times powers of 2, and at last `length`."""
    powers = [least << i for i in range(32) if least << i < length]
    return [*(powers or [length // 2]), length]


@torch.no_grad()
def mean_nll(model: PreTrainedModel, window: Window) -> float:
    """Mean nats per target token of a window."""
    targets = window.targets.to(model.device)
    out: Any = model(input_ids=window.input_ids[None].to(model.device), use_cache=False, logits_to_keep=len(targets))
    # A few rows at a time: with a large vocabulary a second copy of the logits is more than all else.
    parts = zip(*(torch.split(x, _ROWS_OF_LOGITS) for x in (out.logits[0], targets)), strict=True)
    return sum(float(F.cross_entropy(rows.float(), wanted, reduction="sum")) for rows, wanted in parts) / len(targets)


def random_model(
    seed: int, *, layers: int = 4, hidden: int = 64, heads: int = 4, kv_heads: int = 2, positions: int = 4096
) -> PreTrainedModel:
    """A random Llama in which every matrix keeps the variance of its input and logits spread by about 2.

    A freshly initialised model attends almost uniformly and hardly moves its residual stream; this one does not.
    """
    config: Any = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.weight.shape[1] ** -0.5, generator=generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
        for layer in layers_of(model):
            layer.attention.q_proj.weight.mul_(_SHARPNESS)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def random_tokens(count: int, seed: int) -> Tensor:
    """Random tokens for `random_model`, int64 `(count,)`."""
    return torch.randint(_VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def tiny_subject(seed: int, lengths: Sequence[int], targets: int = 64, documents: int = 3) -> Subject:
    """A random tiny model that reads random tokens: for trying the experiments where there is no real model.

    Args:
        seed: Of the weights and the tokens.
        lengths: Tokens of the windows, rising.
        targets: Predicted tokens.
        documents: Number of texts.
    """
    model = random_model(seed)
    windows = []
    for i in range(documents):
        ids = random_tokens(lengths[-1] + 1, seed + 1 + i)
        for length in lengths:
            windows.append(Window(f"random tokens {i}", f"seed {seed + 1 + i}", ids[-1 - length : -1], ids[-targets:]))
    info = ModelInfo("random tiny model", f"seed {seed}", int(model.config.max_position_embeddings), "llama")
    return Subject(model, windows=windows, about=provenance(info.to_dict(), model, seed))
