"""The model that is timed, and the inputs of one of its layers: random weights of a shape, or a real model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.bench.generation import Generation
from hf_sparse.bench.inputs import LayerInputs, capture, gaussian
from hf_sparse.bench.shapes import Shape, check_shape, random_model
from hf_sparse.bench.tasks import BenchSettings
from hf_sparse.kernels import cpu
from hf_sparse.measure.data import load_documents
from hf_sparse.measure.windows import cut_windows
from hf_sparse.results import Row, provenance
from hf_sparse.share.source import ModelSource, check_config

# Tokens of text on which a real layer's inputs are captured, at most; longer inputs repeat them.
_CAPTURED = 8192
_CHARS_PER_TOKEN = 8


@dataclass(frozen=True)
class BenchModel:
    """What is timed.

    Attributes:
        about: Provenance of every record.
        inputs: Of one layer; `None` if no layer is timed alone.
        generation: The whole model; `None` if it is not timed.
        prompts: Length -> int64 `(length,)`.
    """

    about: Row
    inputs: LayerInputs | None
    generation: Generation | None
    prompts: dict[int, Tensor]

    @classmethod
    def random(
        cls, settings: BenchSettings, name: str, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> BenchModel:
        """Random weights of a shape, called `name`.

        The model stands for the sparse layers of a deeper one: all its layers are sparse unless the configuration names
        dense ones.

        Raises:
            UserError: if the model cannot be patched with the configuration, or does not fit into memory.
        """
        lengths = settings.prompt_lengths
        check_shape(shape, settings.config, dtype, device, weights=bool(lengths))
        generator = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(shape.vocab_size, (max(lengths, default=0),), generator=generator)
        generation = None
        if lengths:
            config = settings.config
            sparse = config if config.dense_layers is not None else replace(config, dense_layers=())
            made = random_model(shape, dtype, device, settings.seed)
            generation = Generation(made, sparse, settings.new_tokens, real=False, left_out=settings.left_out)
        return cls(
            _about({"name": name, **shape.to_dict()}, torch.empty(0, dtype=dtype, device=device), settings.seed),
            gaussian(shape, dtype, device, settings.seed) if settings.times_layer else None,
            generation,
            {length: ids[:length] for length in lengths},
        )

    @classmethod
    def loaded(
        cls, settings: BenchSettings, source: ModelSource, text: str | None, dtype: str, device: str
    ) -> BenchModel:
        """A real model, with the inputs of one of its layers and with prompts, both from a text.

        Raises:
            UserError: for a text, a model or a configuration that cannot be used.
        """
        info = source.info()
        captured = min(_CAPTURED, info.max_positions or _CAPTURED)
        lengths = sorted({*settings.prompt_lengths, *([captured] if settings.times_layer else [])})
        least = _CHARS_PER_TOKEN * (lengths[-1] + 1)
        document = load_documents([] if text is None else [text], count=1, min_chars=least)[0]
        windows = cut_windows([document], source.tokenizer(), lengths, targets=1)
        prompts = {window.length: window.input_ids for window in windows}
        made = source.model(dtype=dtype, device_map=device)
        check_config(made, settings.config)
        generation = None
        if settings.prompt_lengths:
            generation = Generation(made, settings.config, settings.new_tokens, True, settings.left_out)
        return cls(
            _about({**info.to_dict(), "text_sha256": document.sha256}, made, settings.seed),
            capture(made, prompts[captured], settings.seed) if settings.times_layer else None,
            generation,
            prompts,
        )


def cpu_capability(device: torch.device) -> dict[str, str | int | None] | None:
    """The vector instructions in use on a CPU; `None` on other devices.

    Returns:
        `torch`: what PyTorch's kernels use, such as `AVX2` or `AVX512`. `kernel_vector_bits`: the width of the vectors
        that the compiled kernels of this package use; `None` where there are none.
    """
    if device.type != "cpu":
        return None
    bits = 32 * cpu.lanes() if cpu.why_not() is None else None
    return {"torch": torch.backends.cpu.get_cpu_capability(), "kernel_vector_bits": bits}


def _about(model: dict[str, Any], weights: PreTrainedModel | Tensor, seed: int) -> Row:
    return {**provenance(model, weights, seed), "cpu_capability": cpu_capability(weights.device)}
