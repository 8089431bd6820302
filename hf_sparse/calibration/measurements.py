"""Measurements of a calibration, each made once and kept in a file: interrupted runs resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.calibration.answers import answered, lost_share
from hf_sparse.calibration.curves import ErrorCurve, error_curves, visible_grid
from hf_sparse.calibration.sensitivity import divergences, layer_sensitivity
from hf_sparse.calibration.texts import SHORTEST
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure import retrieval
from hf_sparse.measure.equal_cost import matched
from hf_sparse.measure.perplexity import evaluate
from hf_sparse.measure.perplexity_summary import summarise
from hf_sparse.measure.retrieval_prompts import Prompt
from hf_sparse.measure.windows import Window
from hf_sparse.patching import SupportReport
from hf_sparse.results import DENSE, Record, ResultFile, Summary, identity, record_key, resume


class Measurements:
    """A model, and what was measured on it.

    Args:
        model: The model, unpatched.
        support: From `inspect`.
        config: Everything but the laws.
        folder: Where measurements are kept.
        about: From `provenance`; written into every record.

    Attributes:
        layers: The layers with laws to fit: all but those in `config.dense_layers` and the sliding-window layers of
            a hybrid model. The first layer is one of them: its own error decides whether it stays dense.
        dense: The other layers.

    Raises:
        UserError: (a `ValueError`) if there is no layer with a law to fit.
    """

    def __init__(
        self, model: PreTrainedModel, support: SupportReport, config: SparseAttentionConfig, folder: Path, about: Record
    ) -> None:
        self.model, self.support, self.config, self.folder, self.about = model, support, config, folder, about
        out = {*support.sliding_layers, *(config.dense_layers or ())}
        self.layers = [layer for layer in support.layers if layer.layer not in out]
        self.dense = sorted(layer.layer for layer in support.layers if layer.layer in out)
        if not self.layers:
            raise UserError(f"{support.architecture} has no layer to fit a law to: all {len(self.dense)} are dense")
        self._answers = ResultFile(folder / "answers.jsonl")
        self._modules: dict[int, nn.Module] = {layer.layer: model.get_submodule(layer.name) for layer in self.layers}
        self._decisive = [
            identity(about),
            [config.to_dict()["selector"], config.sink_keys, config.recent_keys],
        ]

    def curves(self, windows: Sequence[Window]) -> dict[str, list[ErrorCurve]]:
        """Error curves of all layers with laws, by document."""
        results = ResultFile(self.folder / "curves.jsonl")
        keys = [self._key("calibrate curves", window, layers=sorted(self._modules)) for window in windows]
        cells = dict(zip(keys, windows, strict=True))

        def measured(missing: Mapping[str, Window]) -> Iterator[tuple[str, Record]]:
            for key, window in tqdm(missing.items(), desc="error against budget", unit="document"):
                visible = visible_grid(SHORTEST, window.length)
                curves = error_curves(self.model, window.input_ids, visible, self._modules, self.config)
                place = {"document": window.document, "text_sha256": window.text_sha256, **self.about}
                yield key, place | {"curves": [curve.to_dict() for curve in curves]}

        records = dict(zip(cells, resume(results, cells, measured), strict=True))
        with results.summed_up():
            return {
                window.document: [ErrorCurve.from_dict(curve) for curve in records[key]["curves"]]
                for window, key in zip(windows, keys, strict=True)
            }

    def sensitivity(self, windows: Sequence[Window], curves: Mapping[str, Sequence[ErrorCurve]]) -> dict[int, float]:
        """Nats a token that a relative error of 1 costs, by layer (`layer_sensitivity`).

        Args:
            windows: Texts to make layers sparse on, all of one length; their second halves are compared.
            curves: From `curves`, of these texts and others.
        """
        results = ResultFile(self.folder / "probes.jsonl")
        length = windows[0].length
        compared = length // 2
        places = [(window, layer) for window in windows for layer in self._modules]
        keys = [self._key("calibrate probe", window, layer=layer) for window, layer in places]
        cells = dict(zip(keys, places, strict=True))

        def measured(missing: Mapping[str, tuple[Window, int]]) -> Iterator[tuple[str, Record]]:
            with tqdm(total=len(missing), desc="layers one at a time", unit="layer") as progress:
                for window in windows:
                    own = {layer: key for key, (text, layer) in missing.items() if text is window}
                    found = divergences(self.model, window.input_ids, compared, [*own], self.support, self.config)
                    for layer, nats in found:
                        yield own[layer], {"document": window.document, "layer": layer, "nats": nats, **self.about}
                        progress.update()

        total = dict.fromkeys(self._modules, 0.0)
        records = dict(zip(cells, resume(results, cells, measured), strict=True))
        with results.summed_up():
            for (_, layer), key in zip(places, keys, strict=True):
                total[layer] += records[key]["nats"] / len(windows)
        probed = [curve for window in windows for curve in curves[window.document]]
        return layer_sensitivity(probed, total, (length - compared, length))

    def ratio(self, config: SparseAttentionConfig, windows: Sequence[Window]) -> float:
        """Perplexity under `config` over that of the dense model."""
        return calibrated_ratio(self._perplexities(windows, {"dense": None, "calibrated": config}))

    def check(self, config: SparseAttentionConfig, windows: Sequence[Window]) -> Summary:
        """Perplexities: dense, under `config` ("calibrated"), and under one law for all heads at equal cost."""
        uniform = matched(config, self.support, [windows[0].length], "power")
        return self._perplexities(windows, {"dense": None, "calibrated": config, "uniform": uniform})

    def _perplexities(self, windows: Sequence[Window], methods: Mapping[str, SparseAttentionConfig | None]) -> Summary:
        results = ResultFile(self.folder / "check.jsonl")
        records = evaluate(self.model, windows, methods, results, self.about)
        with results.summed_up():
            return summarise(records, self.about["seed"])

    def check_answers(self, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse questions none of which the dense model answers."""
        records = retrieval.evaluate(self.model, tokenizer, prompts, {DENSE: None}, self._answers, self.about)
        with self._answers.summed_up():
            answered(records)

    def lost_answers(
        self, config: SparseAttentionConfig, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> float:
        """Of the answers that the dense model picks, the share that is lost under `config`."""
        methods = {DENSE: None, "calibrated": config}
        records = retrieval.evaluate(self.model, tokenizer, prompts, methods, self._answers, self.about)
        with self._answers.summed_up():
            return lost_share(records)

    def _key(self, command: str, window: Window, **more: object) -> str:
        return record_key(command=command, window=window.sha256, about=self._decisive, **more)


def calibrated_ratio(check: Summary) -> float:
    """Perplexity of the calibrated model over that of the dense one, in a check of one length."""
    return next(float(result["ratio"]) for result in check["results"] if result["method"] == "calibrated")
