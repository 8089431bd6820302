"""Experiment: what the error of sparse attention becomes through the layers of a model.

Theory bounds the error of one layer. Here one layer at a time is sparse, then all are, and the hidden states are
compared with those of the dense model after every layer; on random models of attention alone also without residual
connections and without normalisation. (With a gated feed-forward part and without normalisation, hidden states vanish
or explode within a few layers, whatever attention does.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.lab.bounds import FloatArray
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Panel, Setting, Verdict
from hf_sparse.lab.norms import shortened_keys
from hf_sparse.lab.rows import shortened
from hf_sparse.lab.subject import (
    find_window,
    layers_of,
    longest_windows,
    random_model,
    random_tokens,
    subject_of,
    window_cell,
)
from hf_sparse.patching import base_model
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALPHA = 2.0
"""alpha of the sparse layers, which keep alpha sqrt(n) keys: few, for errors to be seen."""

LONGEST = 512
RANDOM = {"small": (6, 256, 2), "full": (12, 256, 3)}
"""Layers, tokens and repeats of the random models."""


def cells(setting: Setting) -> Sequence[Cell]:
    """The model on one document; random models with residual and normalisation on and off."""
    window = longest_windows(subject_of(setting), LONGEST)[0]
    layers, length, repeats = RANDOM[setting.scale]
    return [
        window_cell(window, part="model", alpha=ALPHA),
        *(
            {"part": "random", "residual": residual, "norm": norm, "repeat": repeat, "layers": layers, "length": length}
            for residual in (True, False)
            for norm in (True, False)
            for repeat in range(repeats)
        ),
    ]


def measure(cell: Cell, setting: Setting) -> Row:
    """See `errors_through_depth`."""
    if cell["part"] == "model":
        subject = subject_of(setting)
        return errors_through_depth(subject.model, find_window(subject, cell["window"]).input_ids, ALPHA)
    seed = int(setting.rng(cell).integers(1 << 31))
    model = random_model(seed, layers=cell["layers"])
    with without(model, residual=not cell["residual"], norm=not cell["norm"]):
        return errors_through_depth(model, random_tokens(cell["length"], seed), ALPHA)


@contextmanager
def without(model: PreTrainedModel, *, residual: bool, norm: bool) -> Iterator[PreTrainedModel]:
    """Run a Llama without its feed-forward parts, and without residual connections, normalisations, both or neither."""
    handles: list[Any] = []
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept[module] = arguments[0]

    def subtract(module: nn.Module, _: object, result: tuple[Tensor, ...]) -> tuple[Any, ...]:
        # The layer adds its input to this output afterwards.
        return (result[0] - kept.pop(before[module]), *result[1:])

    def bypass(_: nn.Module, arguments: tuple[Tensor, ...], __: Tensor) -> Tensor:
        return arguments[0]

    def nothing(_: nn.Module, __: object, result: Tensor) -> Tensor:
        return torch.zeros_like(result)

    blocks: list[Any] = [layer.block for layer in layers_of(model)]
    before: dict[nn.Module, nn.Module] = {block.self_attn: block.input_layernorm for block in blocks}
    try:
        for block in blocks:
            handles.append(block.mlp.register_forward_hook(nothing))
            if residual:
                handles.append(block.input_layernorm.register_forward_pre_hook(keep))
                handles.append(block.self_attn.register_forward_hook(subtract))
            if norm:
                handles.append(block.input_layernorm.register_forward_hook(bypass))
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def errors_through_depth(model: PreTrainedModel, ids: Tensor, alpha: float) -> Row:
    """Relative errors of the hidden states after every layer, means over the second half of the rows.

    Returns:
        - `single`: entry [i][l]: the error after layer l when layer i alone is sparse, 0 for l < i;
        - `all`: entry [l]: the same when all layers are;
        - `all_centred`: the same, relative to the states less their mean over the rows, which is what tells tokens
          apart: where the states of all rows become alike, `all` becomes small and this does not;
        - `density`: kept over visible keys of a sparse layer.
    """
    layers = layers_of(model)
    indices = [layer.index for layer in layers]
    dense = [hidden.clone() for hidden in _hidden_states(model, ids)]
    config = hf_sparse.SparseAttentionConfig(
        alpha=alpha, selector="topk", min_keys=1, sink_keys=0, recent_keys=0, dense_below=0, dense_layers=()
    )

    def errors(sparse: Sequence[int]) -> tuple[list[float], list[float], float]:
        dense_layers = tuple(index for index in indices if index not in sparse)
        with hf_sparse.patched(model, config, dense_layers=dense_layers):
            states = _hidden_states(model, ids)
            density = np.mean([row["density"] for row in hf_sparse.report(model).rows if row["layer"] in sparse])
        plain = [_ratio(ours - theirs, theirs) for ours, theirs in zip(states, dense, strict=True)]
        centred = [_ratio(ours - theirs, theirs - theirs.mean(0)) for ours, theirs in zip(states, dense, strict=True)]
        return shortened(plain), shortened(centred), float(density)

    single = [errors([index])[0] for index in indices]
    together, centred, density = errors(indices)
    return {"single": single, "all": together, "all_centred": centred, "density": round(density, 4)}


def _ratio(error: Tensor, exact: Tensor) -> float:
    """Mean over the rows of ||error|| / ||exact||."""
    return float((error.norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)).mean())


def _hidden_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What leaves each layer, second half of the rows: `(rows, hidden)`, one after the other."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: object, result: Any) -> None:
        hidden = result[0] if isinstance(result, tuple) else result
        found.append(hidden[0, len(ids) // 2 :].float().cpu())

    handles = [layer.block.register_forward_hook(note) for layer in layers_of(model)]
    try:
        base_model(model).base_model(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def summary(rows: Sequence[Row]) -> Row:
    """How errors of single layers travel and add up, medians over repeats.

    Returns:
        - `own`: error right after a sparse layer, median over layers; `final`: the same after the last layer;
        - `travel`: final over own error, median over layers but the last;
        - `together`: final error with all layers sparse;
        - `over_root`, `over_sum`: that over the root of the sum of squares, and over the sum, of the final errors of
          single layers: 1 where errors add up as independent, or as aligned vectors;
        - `centred`: as `together`, relative to what tells the rows apart;
        - `growth`: factor a layer by which the error grows with all layers sparse, over the second half of the layers.
    """
    columns: dict[str, list[float]] = {}
    for row in rows:
        single: FloatArray = np.array(row["single"])
        together: FloatArray = np.maximum(np.array(row["all"]), 1e-30)
        own, final = np.diagonal(single), single[:, -1]
        half = len(together) // 2
        travel = final[:-1] / np.maximum(own[:-1], 1e-30)
        found = {
            "own": np.median(own),
            "final": np.median(final),
            "travel": np.median(travel),
            "together": together[-1],
            "over_root": together[-1] / np.sqrt(np.square(final).sum()),
            "over_sum": together[-1] / final.sum(),
            "centred": row["all_centred"][-1],
            "growth": (together[-1] / together[half]) ** (1 / (len(together) - 1 - half)),
        }
        for name, value in found.items():
            columns.setdefault(name, []).append(float(value))
    return {name: float(np.median(values)) for name, values in columns.items()}


def conclude(rows: Sequence[Row]) -> Findings:
    """Whether errors grow with depth, and what residual connections and normalisation have to do with it."""
    model = [row for row in rows if row["part"] == "model"]
    real = summary(model)
    kinds = {
        (residual, norm): [row for row in rows if row["part"] == "random" and (row["residual"], row["norm"]) == key]
        for key in ((True, True), (True, False), (False, True), (False, False))
        for residual, norm in [key]
    }
    random = {_name(*key): summary(found) for key, found in kinds.items() if found}
    layers = len(model[0]["all"])
    squares = np.square(np.array(model[0]["single"])[:, -1])
    worst, part = int(squares.argmax()), float(squares.max() / squares.sum())
    real_text = (
        f"with all {layers} layers sparse ({100 * model[0]['density']:.1f} % of keys) the hidden states after the last "
        f"layer are off by {real['together']:.3f}, against {real['final']:.4f} for the median single layer: "
        f"{real['over_root']:.2f} times the root of the sum of squares of the single errors and {real['over_sum']:.2f} "
        f"times their sum (layer {worst} alone has {100 * part:.0f} % of the sum of squares); an error grows "
        f"{real['travel']:.2f} times from its layer to the last (median)"
    )
    random_text = (
        "in random models of {} attention layers the error after the last layer with all layers sparse is ".format(
            len(next(iter(kinds.values()))[0]["all"])
        )
        + ", ".join(
            f"{found['together']:.2f} {name} ({found['centred']:.2f} of what tells tokens apart)"
            for name, found in random.items()
        )
    )
    with_residual, without_residual = (random[_name(residual, True)]["centred"] for residual in (True, False))
    verdicts = [
        Verdict(
            "errors of the layers add up no worse than independent ones: all layers sparse cost at most 1.5 times the "
            "root of the sum of squares of the single errors",
            "derived here",
            "holds" if real["over_root"] <= 1.5 else "fails",
            f"relative error of the hidden states after the last layer, top-k with {ALPHA:g} sqrt(n) keys a row",
            real_text,
        ),
        Verdict(
            "residual connections keep the error of sparse attention small through depth",
            "derived here",
            "holds" if without_residual > 2 * with_residual else "fails",
            "random models of attention alone, error of the hidden states after the last layer relative to what tells "
            "tokens apart",
            random_text,
        ),
    ]
    panels = [
        Panel(
            "Error through the layers of the model",
            f"{real_text[0].upper()}{real_text[1:]}.",
            lambda axes: _draw(axes, model[0]),
        ),
        Panel(
            "Residual and normalisation, random models",
            f"{random_text[0].upper()}{random_text[1:]}.",
            lambda axes: _draw_random(axes, kinds),
        ),
    ]
    return Findings(
        shortened_keys({"model": real | {"worst_layer": worst, "share_of_worst": part}, "random": random}),
        verdicts,
        panels,
    )


def _name(residual: bool, norm: bool) -> str:
    return f"{'with' if residual else 'without'} residual, {'with' if norm else 'without'} norm"


def _draw(axes: Axes, row: Row) -> None:
    single = np.array(row["single"])
    layers = np.arange(len(single))
    for i, errors in enumerate(single):
        axes.plot(layers[i:], errors[i:], color="#92c5de", linewidth=0.8, label="one layer sparse" if i == 0 else None)
    axes.plot(layers, row["all"], "o-", color="#b2182b", label="all layers sparse")
    root = np.sqrt(np.square(single).sum(0))
    axes.plot(layers, root, "--", color="#666666", label="root of the sum of squares of single errors")
    axes.set(xlabel="after layer", ylabel="relative error of hidden states", yscale="log")
    axes.legend(fontsize=8)


def _draw_random(axes: Axes, kinds: dict[tuple[bool, bool], list[Row]]) -> None:
    for (residual, norm), rows in kinds.items():
        if rows:
            errors = np.median([row["all_centred"] for row in rows], axis=0)
            style = "-" if residual else "--"
            axes.plot(np.arange(len(errors)), errors, style, marker="o" if norm else "s", label=_name(residual, norm))
    axes.set(xlabel="after layer", ylabel="error / what tells tokens apart, all layers sparse", yscale="log")
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    "depth",
    "Error through depth",
    "what the error of one sparse layer becomes with residual connections, normalisation and many layers",
    "machine summary",
    cells,
    measure,
    conclude,
    needs_model=True,
)
