"""Experiment `depth`: the error of sparse attention through the layers of a model.

Theory bounds the error of one layer. Here one layer at a time is sparse, then all are, and the hidden states are
compared with those of the dense model after every layer; on random models of attention alone also without residual
connections and without normalisation. (With a gated feed-forward part and without normalisation, hidden states vanish
or explode within a few layers, whatever attention does.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.lab import probe
from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.fits import shortened
from hf_sparse.lab.tiny import random_model, random_tokens
from hf_sparse.patching import patched, report
from hf_sparse.results import Record

ALPHA = 2.0
"""alpha of the sparse layers, which keep alpha sqrt(n) keys: few, for errors to be seen."""

LONGEST = 512
RANDOM = {"small": (6, 256, 2), "full": (12, 256, 3)}
"""Layers, tokens and repeats of the random models."""

KINDS = {
    f"{'with' if residual else 'without'} residual, {'with' if norm else 'without'} norm": (residual, norm)
    for residual in (True, False)
    for norm in (True, False)
}


def cells(setting: Setting) -> Sequence[Cell]:
    """The model on one document; random models with residual and normalisation on and off."""
    window = probe.longest_windows(setting, LONGEST)[0]
    layers, length, repeats = RANDOM[setting.scale]
    return [
        probe.window_cell(window, part="model", alpha=ALPHA),
        *(
            {"part": "random", "residual": residual, "norm": norm, "repeat": repeat, "layers": layers, "length": length}
            for residual, norm in KINDS.values()
            for repeat in range(repeats)
        ),
    ]


def measure(cell: Cell, setting: Setting) -> Record:
    """See `errors_through_depth`."""
    if cell["part"] == "model":
        return errors_through_depth(setting.model, probe.find_window(cell, setting).input_ids, ALPHA)
    seed = int(setting.rng(cell).integers(1 << 31))
    model = random_model(seed, layers=cell["layers"])
    with without(model, residual=not cell["residual"], norm=not cell["norm"]):
        return errors_through_depth(model, random_tokens(cell["length"], seed), ALPHA)


@contextmanager
def without(model: PreTrainedModel, *, residual: bool, norm: bool) -> Iterator[None]:
    """Run a Llama without its feed-forward parts, and without residual connections, normalisations, both or neither."""

    def attend(block: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
        inputs = hidden_states if norm else block.input_layernorm(hidden_states)
        output: Tensor = block.self_attn(hidden_states=inputs, **arguments)[0]
        return output if residual else hidden_states + output

    blocks = [layer.block for layer in probe.layers_of(model)]
    try:
        for block in blocks:
            block.forward = partial(attend, block)
        yield
    finally:
        for block in blocks:
            del block.forward


def errors_through_depth(model: PreTrainedModel, ids: Tensor, alpha: float) -> Record:
    """Relative errors of the hidden states after every layer, means over the second half of the tokens.

    - `single`: entry [i][l]: the error after layer l when layer i alone is sparse, 0 for l < i;
    - `all`: entry [l]: the same when all layers are;
    - `all_centred`: the same, relative to the states less their mean over the tokens, which is what tells tokens
      apart: where the states of all tokens become alike, `all` becomes small and this does not;
    - `density`: kept over visible keys of a sparse layer.
    """
    indices = [layer.index for layer in probe.layers_of(model)]
    dense = _hidden_states(model, ids)
    config = SparseAttentionConfig(
        alpha=alpha, selector="topk", min_keys=1, sink_keys=0, recent_keys=0, dense_below=0, dense_layers=()
    )

    def ratio(error: Tensor, exact: Tensor) -> float:
        return float((error.norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)).mean())

    def errors(sparse: Sequence[int]) -> tuple[list[float], list[float], float]:
        dense_layers = tuple(index for index in indices if index not in sparse)
        with patched(model, config, dense_layers=dense_layers):
            pairs = list(zip(_hidden_states(model, ids), dense, strict=True))
            density = np.mean([row["density"] for row in report(model).rows if row["layer"] in sparse])
        plain = [ratio(ours - theirs, theirs) for ours, theirs in pairs]
        centred = [ratio(ours - theirs, theirs - theirs.mean(0)) for ours, theirs in pairs]
        return shortened(plain), shortened(centred), round(float(density), 4)

    single = [errors([index])[0] for index in indices]
    together, centred, density = errors(indices)
    return {"single": single, "all": together, "all_centred": centred, "density": density}


def _hidden_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The output of each layer for the second half of the tokens, `(tokens, hidden)`."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: object, result: Any) -> None:
        hidden = result[0] if isinstance(result, tuple) else result
        found.append(hidden[0, len(ids) // 2 :].float().cpu().clone())

    with probe.hooked((layer.block, note) for layer in probe.layers_of(model)):
        probe.read(model, ids)
    return found


def summary(record: Record) -> dict[str, float]:
    """How errors of single layers travel and add up.

    - `own`: error right after a sparse layer, median over layers; `final`: the same after the last layer;
    - `travel`: final over own error, median over layers but the last;
    - `together`: final error with all layers sparse; `centred`: the same, relative to what tells the tokens apart;
    - `over_root`, `over_sum`: `together` over the root of the sum of squares, and over the sum, of the final errors of
      single layers: 1 where errors add up as independent, or as aligned vectors;
    - `growth`: factor a layer by which the error grows with all layers sparse, over the second half of the layers.
    """
    single, together = np.array(record["single"]), np.maximum(np.array(record["all"]), 1e-30)
    own, final = np.diagonal(single), single[:, -1]
    half = len(together) // 2
    found = {
        "own": np.median(own),
        "final": np.median(final),
        "travel": np.median(final[:-1] / np.maximum(own[:-1], 1e-30)),
        "together": together[-1],
        "over_root": together[-1] / np.sqrt(np.square(final).sum()),
        "over_sum": together[-1] / final.sum(),
        "centred": record["all_centred"][-1],
        "growth": (together[-1] / together[half]) ** (1 / (len(together) - 1 - half)),
    }
    return {name: float(value) for name, value in found.items()}


def conclude(records: Sequence[Record]) -> Findings:
    """How errors grow with depth, and the part of residual connections and normalisation in it."""
    model = next(record for record in records if record["part"] == "model")
    own = [record for record in records if record["part"] == "random"]
    random = {}
    for kind, switches in KINDS.items():
        found = [summary(record) for record in own if (record["residual"], record["norm"]) == switches]
        random[kind] = {name: float(np.median([entry[name] for entry in found])) for name in found[0]}
    single = np.array(model["single"])
    squares = np.square(single[:, -1])
    worst = int(squares.argmax())
    real = summary(model) | {"worst_layer": worst, "share_of_worst": float(squares.max() / squares.sum())}
    layers = range(len(single))
    alone = np.where(np.array(layers) < worst, np.nan, single[worst])
    lines = {f"layer {worst} alone": alone, "all": model["all"]}
    root = {"root of the sum of squares of single layers": np.sqrt(np.square(single).sum(0))}
    plot = Plot("after layer", "relative error of hidden states, sparse layers", layers, lines, root, log="")
    more = {name: {kind: found[name] for kind, found in random.items()} for name in ("centred", "together")}
    about = {"layers": len(layers), "density": model["density"], "random layers": len(own[0]["all"])}
    with_residual, without_residual = (random[f"{word} residual, with norm"]["centred"] for word in ("with", "without"))
    held = [real["over_root"] <= 1.5, without_residual > 2 * with_residual]
    return Findings({"model": real, "random": random}, more | about, held, plot)
