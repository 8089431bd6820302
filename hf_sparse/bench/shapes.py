"""Shapes of models, and random models of a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_sparse.bench.timing import available_bytes
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.schema import shown
from hf_sparse.share.source import check_config

_LONGEST = 1 << 20
# Above any published model.
_MOST_HEADS = _MOST_DIM = _MOST_LAYERS = 1024
_WIDEST = 1 << 15


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Size of a head.
        intermediate_size: Width of the MLP.
        vocab_size: Tokens in the vocabulary.
        layers: Layers of the whole model.
    """

    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    layers: int

    def part(self, layers: int) -> Shape:
        """The same with only so many layers, and their share of the vocabulary.

        The product with the whole vocabulary takes as long as several layers, and would hide the time of a few.

        Raises:
            UserError: for more layers than any model has.
        """
        if layers > _MOST_LAYERS:
            raise UserError(f"layers must be at most {_MOST_LAYERS:,}; got {layers}")
        return replace(self, layers=layers, vocab_size=self.vocab_size * layers // self.layers)


SHAPES = {
    "smollm2-135m": Shape(9, 3, 64, 1536, 49152, 30),
    "llama-1b": Shape(32, 8, 64, 8192, 128256, 16),
    "llama-8b": Shape(32, 8, 128, 14336, 128256, 32),
    "qwen3-4b": Shape(32, 8, 128, 9728, 151936, 36),
}
"""Shapes of published models."""


def parse_shape(text: str) -> Shape:
    """The shape called `text`: one of `SHAPES`, or query heads, key heads and head size such as `9/3/64`.

    A shape in numbers gets an MLP of 8/3 the width of all its heads, 32,768 tokens and 32 layers.

    Raises:
        UserError: if it is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"shape must be one of {', '.join(SHAPES)}, or heads/kv-heads/head-dim; got {text!r}")
    heads, kv_heads, head_dim = map(int, parts)
    if heads > _MOST_HEADS or head_dim > _MOST_DIM or heads * head_dim > _WIDEST:
        raise UserError(
            f"shape takes at most {_MOST_HEADS:,} heads of size {_MOST_DIM:,}, and {_WIDEST:,} as their product; got "
            f"{shown(text)}"
        )
    if heads % kv_heads or head_dim % 2:
        raise UserError(f"shape needs heads that are a multiple of the kv-heads, and an even head size; got {text!r}")
    return Shape(heads, kv_heads, head_dim, heads * head_dim * 8 // 3, 1 << 15, 32)


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """A Llama with random weights in evaluation mode, for texts of up to 2^20 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.heads * shape.head_dim,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=_LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype
        )
    model.train(False)
    return model


def check_shape(
    shape: Shape, config: SparseAttentionConfig, dtype: torch.dtype, device: torch.device, *, weights: bool
) -> None:
    """Refuse a model that cannot be patched, or whose `weights`, if they are needed, do not fit into memory."""
    model = random_model(shape, dtype, torch.device("meta"), seed=0)
    check_config(model, config)
    needed, free = sum(weight.nbytes for weight in model.parameters()), available_bytes(device)
    if weights and needed > free:
        raise UserError(
            f"a model of this shape takes {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of {device} are free: "
            "choose a smaller shape, or fewer layers"
        )
