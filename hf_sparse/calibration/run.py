"""The measurements of a calibration, each made once and kept: a run that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.calibration.curves import ErrorCurve, error_curves, visible_grid
from hf_sparse.calibration.sensitivity import divergences, layer_sensitivity
from hf_sparse.calibration.solve import highest_price, mean_density
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.evaluation.data import Document
from hf_sparse.evaluation.perplexity import evaluate
from hf_sparse.evaluation.perplexity_summary import Summary, summarise
from hf_sparse.evaluation.results import ResultFile, Row, row_key, software
from hf_sparse.evaluation.windows import Window, cut_windows
from hf_sparse.support import SupportReport

SHORTEST = 512
"""Visible keys below which no law is fitted."""

CHECKED_TOKENS = 512
"""Tokens of each held-out document on which a calibration is checked."""


class Run:
    """A model, and what was measured on it.

    Args:
        model: The model, unpatched.
        tokenizer: Its tokenizer.
        support: From `inspect`.
        config: Everything but the laws.
        folder: Where measurements are kept.
        seed: Seed of the bootstraps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        support: SupportReport,
        config: SparseAttentionConfig,
        folder: Path,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.config, self.folder, self.seed = model, tokenizer, config, folder, seed
        hybrid = support.hybrid
        self.modules: dict[int, nn.Module] = {
            layer.layer: model.get_submodule(layer.name)
            for layer in support.layers
            if not (hybrid and layer.sliding_window is not None)
        }
        self.layers = sorted(self.modules)
        """Layers with laws to fit: all, or in a hybrid model those with full attention."""
        self.every = sorted(layer.layer for layer in support.layers)
        self.sliding = [layer for layer in self.every if layer not in self.modules]
        self.about: Row = {
            "model": {
                "name": Path(model.config.name_or_path or "").name,
                "revision": getattr(model.config, "_commit_hash", None),
            },
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "threads": torch.get_num_threads(),
            "seed": seed,
            **software(),
        }
        self._decisive = [
            self.about["model"],
            self.about["dtype"],
            config.selector,
            config.sink_keys,
            config.recent_keys,
        ]

    def curves(self, windows: Sequence[Window]) -> dict[str, list[ErrorCurve]]:
        """Error curves of all layers with laws, by document."""
        results = ResultFile(self.folder / "curves.jsonl")
        results.repair()
        out: dict[str, list[ErrorCurve]] = {}
        done = results.rows()
        for window in tqdm(windows, desc="error against budget", unit="document"):
            key = row_key(command="calibrate curves", window=window.sha256, about=self._decisive)
            if key not in done:
                visible = visible_grid(SHORTEST, window.length)
                curves = error_curves(self.model, window.input_ids, visible, self.modules, self.config)
                row = {"document": window.document, "text_sha256": window.text_sha256, **self.about}
                results.append({"key": key, **row, "curves": [curve.to_dict() for curve in curves]})
                done = results.rows()
            out[window.document] = [ErrorCurve.from_dict(curve) for curve in done[key]["curves"]]
        return out

    def sensitivity(self, windows: Sequence[Window], curves: Mapping[str, Sequence[ErrorCurve]]) -> dict[int, float]:
        """Nats a token that a relative error of 1 costs, by layer (`layer_sensitivity`)."""
        results = ResultFile(self.folder / "probes.jsonl")
        results.repair()
        rows = windows[0].length // 2
        total = dict.fromkeys(self.layers, 0.0)
        with tqdm(total=len(windows) * len(self.layers), desc="layers one at a time", unit="layer") as progress:
            for window in windows:
                done = results.rows()
                keys = {
                    layer: row_key(command="calibrate probe", window=window.sha256, about=self._decisive, layer=layer)
                    for layer in self.layers
                }
                missing = [layer for layer in self.layers if keys[layer] not in done]
                progress.update(len(self.layers) - len(missing))
                for layer, nats in divergences(self.model, window.input_ids, rows, missing, self.every, self.config):
                    row = {"document": window.document, "layer": layer, "nats": nats, **self.about}
                    results.append({"key": keys[layer], **row})
                    progress.update()
                done = results.rows()
                for layer, key in keys.items():
                    total[layer] += done[key]["nats"] / len(windows)
        probed = [curve for window in windows for curve in curves[window.document]]
        return layer_sensitivity(probed, total, (windows[0].length - rows, windows[0].length))

    def check(self, calibrated: SparseAttentionConfig, documents: Sequence[Document], length: int) -> Summary:
        """Perplexity on held-out documents: dense, calibrated, and one law for all heads at equal cost."""
        windows = cut_windows(documents, self.tokenizer, [length], min(CHECKED_TOKENS, length // 2))
        methods = {"dense": None, "calibrated": calibrated, "uniform": self.uniform(calibrated, length)}
        rows = evaluate(self.model, windows, methods, ResultFile(self.folder / "check.jsonl"), self.about)
        return summarise(rows, self.seed)

    def uniform(self, calibrated: SparseAttentionConfig, length: int) -> SparseAttentionConfig:
        """One law with the default exponent that keeps as many keys of an input of `length` tokens as `calibrated`.

        The layer that is dense by default is dense here too, if that leaves anything to the others.
        """
        wanted = mean_density(calibrated, self.layers, length)
        for dense in ([*self.sliding, self.layers[0]], self.sliding):
            config = replace(self.config, per_head=None, calibration=None, dense_layers=tuple(sorted(dense)))
            smallest = replace(config, alpha=1e-3)
            if mean_density(smallest, self.layers, length) <= wanted:
                break

        def spends(alpha: float) -> float:
            return mean_density(replace(config, alpha=alpha), self.layers, length)

        # A price is a falling scale from many keys to few: alpha is its inverse.
        alpha = 1 / highest_price(lambda price: spends(1 / price) >= wanted, (1 / length, 1e3))
        return replace(config, alpha=float(f"{alpha:.4g}"))


def reached(check: Summary) -> dict[str, Any]:
    """The ratio of perplexities of the calibrated model to the dense one, with its interval."""
    return next(result for result in check["results"] if result["method"] == "calibrated")
