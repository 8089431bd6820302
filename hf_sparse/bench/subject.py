"""What is measured, a model or a shape, and the cells of a plan for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hf_sparse.bench import layer
from hf_sparse.bench.end_to_end import Generation
from hf_sparse.bench.inputs import LayerInputs, capture, describe, gaussian
from hf_sparse.bench.run import LAYER_KINDS, Cell
from hf_sparse.bench.shapes import Shape, check_shape, random_model
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.machine import device_name
from hf_sparse.measure.data import load_documents
from hf_sparse.measure.windows import cut_windows
from hf_sparse.results import Record, software
from hf_sparse.share.source import ModelSource, check_config

# Tokens of text on which a real layer's inputs are captured, at most; beyond that length they are repeated.
_CAPTURED = 8192


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often.

    Attributes:
        lengths: Of each of `run.KINDS`, rising; none to leave a kind out.
        config: Of the patch.
        new_tokens: Tokens a model writes.
        left_out: Dense methods not to measure.
        repeats: Fewest rounds of a cell.
        seconds: Rounds go on for this long.
        seed: Of random weights, inputs and prompts.
    """

    lengths: dict[str, list[int]]
    config: SparseAttentionConfig
    new_tokens: int
    left_out: frozenset[str]
    repeats: int
    seconds: float
    seed: int

    @property
    def alone(self) -> bool:
        """Whether a layer is measured alone."""
        return any(self.lengths[kind] for kind in LAYER_KINDS)

    @property
    def written(self) -> list[int]:
        """Tokens of all prompts: a cache holds all tokens of a prompt but the last."""
        whole = (self.lengths[kind] for kind in ("generate", "padded"))
        return sorted({*chain(*whole), *(length + 1 for length in self.lengths["cached"])})


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        about: What every row says of it and of the machine.
        inputs: Of a layer alone; `None` if no layer is.
        generation: The model; `None` if none is made to write.
        prompts: int64 `(length,)` by length.
    """

    about: Record
    inputs: LayerInputs | None
    generation: Generation | None
    prompts: dict[int, Tensor]

    @classmethod
    def in_memory(cls, plan: Plan, name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Subject:
        """Random weights of a shape, called `name`.

        The model stands for the sparse layers of a deeper one: unless the configuration names dense layers, its first
        layer is as sparse as the others.

        Raises:
            UserError: for a configuration that cannot be used, or a shape that does not fit into memory.
        """
        check_shape(shape, plan.config, dtype, device, weights=bool(plan.written))
        generation = None
        generator = torch.Generator().manual_seed(plan.seed)
        ids = torch.randint(shape.vocab_size, (max(plan.written, default=0),), generator=generator)
        if plan.written:
            sparse = plan.config if plan.config.dense_layers is not None else replace(plan.config, dense_layers=())
            made = random_model(shape, dtype, device, plan.seed)
            generation = Generation(made, sparse, plan.new_tokens, False, plan.left_out)
        return cls(
            _about({"name": name, **shape.to_dict()}, dtype, device, plan.seed),
            gaussian(shape, dtype, device, plan.seed) if plan.alone else None,
            generation,
            {length: ids[:length] for length in plan.written},
        )

    @classmethod
    def loaded(cls, plan: Plan, source: ModelSource, text: str | None, dtype: str, device: str) -> Subject:
        """A real model, with what a layer of it gets and with prompts from a text.

        Raises:
            UserError: for a text, a model or a configuration that cannot be used.
        """
        info = source.info()
        captured = min(_CAPTURED, info["max_positions"] or _CAPTURED)
        lengths = sorted({*plan.written, *([captured] if plan.alone else [])})
        documents = load_documents([] if text is None else [text], count=1, tokens=lengths[-1] + 1)
        windows = cut_windows(documents[:1], source.tokenizer(), lengths, targets=1)
        prompts = {window.length: window.input_ids for window in windows}
        made = source.model(dtype=dtype, device_map=device)
        check_config(made, plan.config)
        return cls(
            _about({**info, "text_sha256": documents[0].sha256}, made.dtype, made.device, plan.seed),
            capture(made, prompts[captured], plan.seed) if plan.alone else None,
            Generation(made, plan.config, plan.new_tokens, True, plan.left_out) if plan.written else None,
            prompts,
        )

    def cells(self, plan: Plan) -> Iterator[Cell]:
        """The cells of `plan`, the quick ones first."""
        effort = {"repeats": plan.repeats, "seconds": plan.seconds, "left_out": sorted(plan.left_out)}
        often = (plan.repeats, plan.seconds)
        if self.inputs is not None:
            given = self.inputs
            facts = {"config": replace(plan.config, dense_below=0).to_dict(), **describe(given), **effort}
            for n in plan.lengths["decode"]:
                yield Cell("decode", n, facts, partial(layer.decode_cell, given, n, plan.config, *often))
            for n in plan.lengths["prefill"]:
                measure = partial(layer.prefill_cell, given, n, plan.config, *often, plan.left_out)
                yield Cell("prefill", n, facts, measure)
        if self.generation is not None:
            facts = {"config": self.generation.config.to_dict(), "new_tokens": plan.new_tokens, **effort}
            for n in plan.lengths["cached"]:
                yield Cell("cached", n, facts, partial(self.generation.from_cache, self.prompts[n + 1], *often))
            for n in plan.lengths["generate"]:
                yield Cell("generate", n, facts, partial(self.generation.from_prompt, self.prompts[n], *often))
            for n in plan.lengths["padded"]:
                yield Cell("padded", n, facts, partial(self.generation.from_padded, self.prompts[n], *often))


def _about(model: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int) -> Record:
    return {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        **software(),
    }
