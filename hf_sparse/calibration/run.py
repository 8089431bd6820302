"""The measurements of a calibration, each made once and kept: a run that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_sparse.calibration.curves import ErrorCurve, error_curves, visible_grid
from hf_sparse.calibration.sensitivity import divergences, layer_sensitivity
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.equal_cost import matched
from hf_sparse.measure.perplexity import evaluate
from hf_sparse.measure.perplexity_summary import summarise
from hf_sparse.measure.windows import Window
from hf_sparse.results import ResultFile, Row, Summary, row_key
from hf_sparse.support import SupportReport

SHORTEST = 512
"""Visible keys below which no law is fitted."""


class Run:
    """A model, and what was measured on it.

    Args:
        model: The model, unpatched.
        support: From `inspect`.
        config: Everything but the laws.
        folder: Where measurements are kept.
        about: From `provenance`; written into every row.

    Attributes:
        layers: The layers with laws to fit: all but those in `config.dense_layers` and the sliding-window layers of
            a hybrid model.
        dense: The other layers.

    Raises:
        UserError: (a `ValueError`) if there is no layer with a law to fit.
    """

    def __init__(
        self, model: PreTrainedModel, support: SupportReport, config: SparseAttentionConfig, folder: Path, about: Row
    ) -> None:
        self.model, self.support, self.config, self.folder, self.about = model, support, config, folder, about
        out = {*support.sliding_layers, *(config.dense_layers or ())}
        self.layers = [layer for layer in support.layers if layer.layer not in out]
        self.dense = sorted(layer.layer for layer in support.layers if layer.layer in out)
        if not self.layers:
            raise UserError(f"{support.architecture} has no layer to fit a law to: all {len(self.dense)} are dense")
        self._modules: dict[int, nn.Module] = {layer.layer: model.get_submodule(layer.name) for layer in self.layers}
        self._decisive = [
            [about["model"]["name"], about["model"]["revision"], about["dtype"], about["device"]],
            [config.selector, config.sink_keys, config.recent_keys],
        ]

    def curves(self, windows: Sequence[Window]) -> dict[str, list[ErrorCurve]]:
        """Error curves of all layers with laws, by document."""
        results = ResultFile(self.folder / "curves.jsonl")
        results.repair()
        out: dict[str, list[ErrorCurve]] = {}
        done = results.rows()
        layers = sorted(self._modules)
        for window in tqdm(windows, desc="error against budget", unit="document"):
            key = row_key(command="calibrate curves", window=window.sha256, about=self._decisive, layers=layers)
            if key not in done:
                visible = visible_grid(SHORTEST, window.length)
                curves = error_curves(self.model, window.input_ids, visible, self._modules, self.config)
                row = {"document": window.document, "text_sha256": window.text_sha256, **self.about}
                results.append({"key": key, **row, "curves": [curve.to_dict() for curve in curves]})
                done = results.rows()
            with results.summed_up():
                out[window.document] = [ErrorCurve.from_dict(curve) for curve in done[key]["curves"]]
        return out

    def sensitivity(self, windows: Sequence[Window], curves: Mapping[str, Sequence[ErrorCurve]]) -> dict[int, float]:
        """Nats a token that a relative error of 1 costs, by layer (`layer_sensitivity`)."""
        results = ResultFile(self.folder / "probes.jsonl")
        results.repair()
        rows = windows[0].length // 2
        total = dict.fromkeys(self._modules, 0.0)
        every = [layer.layer for layer in self.support.layers]
        with tqdm(total=len(windows) * len(total), desc="layers one at a time", unit="layer") as progress:
            for window in windows:
                done = results.rows()
                keys = {
                    layer: row_key(command="calibrate probe", window=window.sha256, about=self._decisive, layer=layer)
                    for layer in total
                }
                missing = [layer for layer in total if keys[layer] not in done]
                progress.update(len(total) - len(missing))
                for layer, nats in divergences(self.model, window.input_ids, rows, missing, every, self.config):
                    row = {"document": window.document, "layer": layer, "nats": nats, **self.about}
                    results.append({"key": keys[layer], **row})
                    progress.update()
                done = results.rows()
                with results.summed_up():
                    for layer, key in keys.items():
                        total[layer] += done[key]["nats"] / len(windows)
        probed = [curve for window in windows for curve in curves[window.document]]
        return layer_sensitivity(probed, total, (windows[0].length - rows, windows[0].length))

    def ratio(self, config: SparseAttentionConfig, windows: Sequence[Window]) -> float:
        """Perplexity under `config` over that of the dense model."""
        ratio: float = calibrated(self._perplexities(windows, {"dense": None, "calibrated": config}))["ratio"]
        return ratio

    def check(self, config: SparseAttentionConfig, windows: Sequence[Window]) -> Summary:
        """Perplexities: dense, under `config` ("calibrated"), and under one law for all heads at equal cost."""
        uniform = matched(config, self.support, [windows[0].length], "power")
        return self._perplexities(windows, {"dense": None, "calibrated": config, "uniform": uniform})

    def _perplexities(self, windows: Sequence[Window], methods: Mapping[str, SparseAttentionConfig | None]) -> Summary:
        results = ResultFile(self.folder / "check.jsonl")
        rows = evaluate(self.model, windows, methods, results, self.about)
        with results.summed_up():
            return summarise(rows, self.about["seed"])


def calibrated(check: Summary) -> Summary:
    """The result of the calibrated model in a check of one length."""
    result: Summary = next(result for result in check["results"] if result["method"] == "calibrated")
    return result
