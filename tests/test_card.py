"""Model cards: what they say is what was measured, huggingface_hub reads them, and other people's words stay."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_sparse import CalibrationRecord, SparseAttentionConfig
from hf_sparse.config import Policy
from hf_sparse.config.files import NAME, read
from hf_sparse.errors import UserError
from hf_sparse.schema import QualityRecord
from hf_sparse.share.card import TAGS, license_in, parse_card
from hf_sparse.share.card import make_card as edit_card
from hf_sparse.share.card_tables import losses
from hf_sparse.share.card_text import BEGIN, END
from hf_sparse.share.measured import Results, plots, quality, results_beside

PUBLISHED = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob(f"*/{NAME}"))
HERE = pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)


def make_card(policy: Policy, name: str, existing: str | None = None, **options: Any) -> str:
    """A card: a new one, or `existing` edited."""
    return edit_card(parse_card(existing, name), policy, name, **options)


def row(length: int, value: float, low: float, high: float, **fields: Any) -> QualityRecord:
    fields = {"method": "grouped", "density": 0.25, "documents": ("a.txt", "b.txt"), "model": "m.gguf"} | fields
    return QualityRecord(length=length, value=value, low=low, high=high, dtype="float32", device="cpu", **fields)


MEASURED = Policy(
    base_model="someone/model",
    revision="a" * 40,
    quality=(
        QualityRecord(metric="perplexity", method="dense", length=512, value=20.0),
        QualityRecord(metric="perplexity", method="grouped", length=512, value=20.246),
        row(512, 1.0123, 1.001, 1.02),
        row(4096, 0.9987, 0.99, 1.01),
    ),
)


@HERE
def test_a_published_card_is_made_of_its_results(folder: Path) -> None:
    policy, results = read(folder / NAME), results_beside(folder)
    assert policy.quality == quality(results, policy.config) != ()
    assert policy.base.is_on_hub
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert make_card(policy, folder.name, text, plots=plots(results)) == text
    assert make_card(policy, folder.name, plots=plots(results), license=license_in(text)) == text
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert links
    assert all((folder / link).is_file() for link in links)


@HERE
def test_figures_of_a_published_card_are_those_of_the_summary(folder: Path) -> None:
    """Without the code that makes cards: the text against the JSON that `hf-sparse perplexity` wrote."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    summary = json.loads((folder / "perplexity" / "summary.json").read_text(encoding="utf-8"))
    policy = json.loads((folder / NAME).read_text(encoding="utf-8"))
    decisive = set(policy) & set(next(filter(None, summary["configs"].values()))) - {"engine", "calibration"}
    method, *decode = [
        name
        for name, config in summary["configs"].items()
        if config is not None and all(config[field] == policy[field] for field in decisive)
    ]
    assert decode in ([], ["decode"])
    found = {(result["method"], result["length"]): result for result in summary["results"]}
    lines = re.findall(r"\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| ([\d.]+) \|", text)
    quoted = [name for name in (method, *decode) for _ in summary["lengths"]]
    for name, (length, dense, sparse, ratio, low, high, density) in zip(quoted, lines, strict=True):
        n = int(length.replace(",", ""))
        ours = found[name, n]
        assert float(dense) == pytest.approx(found["dense", n]["perplexity"], abs=0.005)
        assert float(sparse) == pytest.approx(ours["perplexity"], abs=0.005)
        for shown, field in ((ratio, "ratio"), (low, "low"), (high, "high")):
            assert float(shown) == pytest.approx(ours[field], abs=5.1e-5)
        assert float(density) == pytest.approx(ours["density"], abs=5.1e-4)
    results = ModelCard(text).data.eval_results
    assert results is not None
    assert len(results) == 3 * len(summary["lengths"])
    for result in results:
        arguments = result.metric_args
        ours = found["dense" if arguments["method"] == "dense" else method, arguments["context_length"]]
        name = {"perplexity": "perplexity", "perplexity_ratio": "ratio"}[result.metric_type]
        assert result.metric_value == pytest.approx(ours[name], abs=1e-6)


def test_the_metadata_is_what_the_hub_expects() -> None:
    card = ModelCard(make_card(MEASURED, "me/model-sparse", license="mit"))
    data = card.data.to_dict()
    assert data["base_model"] == "someone/model"
    assert "base_model_relation" not in data
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == ("hf-sparse", "mit", "text-generation")
    assert data["tags"] == list(TAGS)
    assert data["model-index"][0]["name"] == "model-sparse"
    ratios = {
        result.metric_args["context_length"]: result.metric_value
        for result in card.data.eval_results or []
        if result.metric_type == "perplexity_ratio"
    }
    assert ratios == {512: 1.0123, 4096: 0.9987}


def test_what_was_not_measured_is_not_there() -> None:
    text = make_card(Policy(), "name")
    assert "Nothing was measured with this configuration yet." in text
    assert "model-index" not in text
    assert "license" not in ModelCard(text).data.to_dict()
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "![" not in text
    assert "**Attention error**" not in make_card(MEASURED, "name")
    assert "**Speed**" not in make_card(MEASURED, "name")


def test_what_was_measured_and_where_it_loses() -> None:
    text = make_card(MEASURED, "name")
    assert "| 512 | 20.00 | 20.25 | 1.0123 | 1.0010 to 1.0200 | 0.250 |" in text
    assert "| 4,096 | - | - | 0.9987 | 0.9900 to 1.0100 | 0.250 |" in text
    assert "Perplexity: weights `m.gguf`, dequantised, float32 on cpu; texts: a.txt and b.txt." in text
    said = list(losses(MEASURED.quality))
    assert said[0] == "Perplexity against dense is worst at 512 tokens, with a ratio of 1.0123 (1.0010 to 1.0200)."
    assert said[1] == "Dense is better, beyond what resampling explains, at 512 tokens."
    assert "up to 4,096 tokens" in said[2]
    unmeasured = ("Perplexity in decoding", "Attention error", "Speed")
    assert said[3:] == [f"{what} was not measured." for what in unmeasured]
    assert "at no length that was measured." in list(losses((row(512, 0.99, 0.98, 1.0),)))[1]


def test_decoding_has_a_table_and_losses_of_its_own() -> None:
    decoded = (
        QualityRecord(metric="decoded_perplexity", method="dense", length=512, value=20.0),
        QualityRecord(metric="decoded_perplexity", method="grouped", length=512, value=20.1),
        row(512, 1.005, 1.002, 1.01, metric="decoded_perplexity_ratio"),
    )
    text = make_card(replace(MEASURED, quality=MEASURED.quality + decoded), "name")
    assert "**Perplexity in decoding**" in text
    assert "| 512 | 20.00 | 20.10 | 1.0050 | 1.0020 to 1.0100 | 0.250 |" in text
    assert "Dense is better in decoding, beyond what resampling explains, at 512 tokens." in text
    assert "in decoding" not in "".join(line for line in make_card(MEASURED, "name").splitlines() if "|" in line)


def test_a_slower_length_and_a_better_fixed_budget_are_named() -> None:
    rows = (
        row(512, 1.2, 1.1, 1.3, metric="ratio_to_fixed"),
        row(2048, 0.7, 0.6, 0.8, metric="generate-token-speedup"),
        row(4096, 1.4, 1.3, 1.5, metric="generate-token-speedup"),
        QualityRecord(metric="generate-token", method="dense", length=2048, value=0.5),
        QualityRecord(metric="generate-token", method="grouped", length=2048, value=0.7),
    )
    said = "\n".join(losses(rows))
    assert "A fixed number of keys at equal cost is better, beyond what resampling explains, at 512 tokens." in said
    assert "Slower than dense (a further token of the whole model, after a prompt of n) at 2,048 tokens." in said
    text = make_card(Policy(quality=rows), "name")
    assert "| 2,048 | 0.5 | 0.7 | 0.70 | 0.60 to 0.80 |" in text
    assert "| 4,096 | - | - | 1.40 | 1.30 to 1.50 |" in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SparseAttentionConfig(), "`k(n) = ceil(8 · n^0.5)`, at least 128 and never more than n: 256 of 1,024"),
        (SparseAttentionConfig(law="fixed", keys=700), "`k(n) = 700`"),
        (SparseAttentionConfig(law="fraction", fraction=0.1), "`k(n) = ceil(0.1 · n)`"),
        (SparseAttentionConfig(law="log", alpha=50), "`k(n) = ceil(50 · ln n)`"),
        (SparseAttentionConfig(max_keys=4096), "at least 128, at most 4,096 and never"),
        (SparseAttentionConfig(dense_layers=(0, 3)), "Layers that stay dense: 0, 3."),
        (SparseAttentionConfig(dense_layers=(), dense_below=0), "Layers that stay dense: none.\n"),
        (
            SparseAttentionConfig(per_head={1: ((1.0, 0.5), (3.0, 0.7)), 2: ((2.0, 0.6), (4.0, 0.8))}),
            "alpha from 1 to 4 (median 2.5) and C from 0.5 to 0.8 (median 0.65) over the 4 heads of 2 layers",
        ),
        (
            SparseAttentionConfig(
                calibration=CalibrationRecord(
                    layers=2,
                    architecture="LlamaForCausalLM",
                    target="perplexity_ratio",
                    target_value=1.01,
                    reached=1.008,
                    reached_at=8192,
                    documents=("a", "b"),
                    held_out=("c",),
                    fitted_from=256,
                    fitted_to=8192,
                )
            ),
            "The calibration, for the 2 attention layers of `LlamaForCausalLM`, aimed at a perplexity ratio to dense "
            "of 1.01 and reached 1.008 at 8,192 tokens on held-out texts. It was fitted on a and b; held out: c. The "
            "queries that were fitted see 256 to 8,192 keys; beyond, the laws are extrapolated.",
        ),
    ],
)
def test_the_law_in_words(config: SparseAttentionConfig, said: str) -> None:
    assert said in make_card(Policy(config), "name")


def test_only_our_part_of_a_card_changes() -> None:
    others = (
        "---\nlanguage: de\nlicense: mit\nlibrary_name: transformers\ntags:\n- mine\nmodel-index:\n- name: theirs\n"
        "  results:\n  - task:\n      type: text-generation\n"
        "    dataset:\n      name: HellaSwag\n      type: hellaswag\n"
        "    metrics:\n    - type: accuracy\n      value: 0.5\n---\n\n# Theirs\n\nBefore.\n"
    )
    once = make_card(MEASURED, "me/x", existing=others, license="apache-2.0")
    edited = once.replace(END, END + "\n\nAfter.")
    again = make_card(Policy(base_model="someone/model"), "me/x", existing=edited)
    for text in (once, again):
        data = ModelCard(text).data
        assert (data.language, data.license, data.library_name) == ("de", "mit", "transformers")
        assert data.tags == ["mine", *TAGS]
        assert data.model_name == "theirs"
        assert "# Theirs\n\nBefore.\n" in text
        assert text.count(BEGIN) == text.count(END) == 1
    assert len(ModelCard(once).data.eval_results or []) == 5
    assert [result.metric_type for result in ModelCard(again).data.eval_results or []] == ["accuracy"]
    assert again.endswith("After.\n")
    assert make_card(MEASURED, "me/x", existing=once) == once


def test_a_card_without_metadata_gets_some() -> None:
    text = make_card(MEASURED, "me/x", "# Just words\n")
    assert ModelCard(text).data.base_model == "someone/model"
    assert "# Just words" in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(END, ""),
        lambda text: text.replace(BEGIN, ""),
        lambda text: text + BEGIN,
        lambda text: text.replace(END, "") + text[text.index(BEGIN) :],
        lambda text: text.replace(BEGIN, "?!").replace(END, BEGIN).replace("?!", END),
    ],
)
def test_a_card_whose_section_has_lost_an_end_is_refused(damage: Callable[[str], str]) -> None:
    card = make_card(MEASURED, "me/x")
    with pytest.raises(UserError, match=f"README.md of me/x must hold '{BEGIN}' and then '{END}', each once"):
        make_card(MEASURED, "me/x", existing=damage(card))


def test_a_path_of_this_machine_is_in_no_card() -> None:
    assert "/home/me" not in make_card(Policy(base_model="/home/me/model"), "name")


BENCH = {
    "about": {"model": {"name": "tiny"}, "dtype": "bfloat16", "device": "cuda", "device_name": "GPU X"},
    "conditions": {
        "generate": {"config": SparseAttentionConfig().to_dict()},
        "decode": {"config": SparseAttentionConfig(dense_below=0, dense_layers=()).to_dict()},
    },
    "break_even": {"generate": {"against": "dynamic-cache"}, "decode": {"against": "sdpa"}},
    "results": [
        {
            "kind": kind,
            "quantity": quantity,
            "length": 4096,
            "method": method,
            "median": time,
            "low": 0.9 * time,
            "high": 1.1 * time,
            "ratio": None if method == "hf_sparse" else {"median": time / 2, "low": time / 3, "high": time},
        }
        for kind, quantity, dense in (("generate", "token", "dynamic-cache"), ("decode", "seconds", "sdpa"))
        for method, time in ((dense, 3.0), ("hf_sparse", 2.0), ("flex", 9.0))
    ],
}


def test_times_of_a_benchmark(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(BENCH))
    rows = Results.read(tmp_path).records(SparseAttentionConfig())
    assert [(row.metric, row.method, row.value) for row in rows] == [
        ("generate-token", "dense", 3.0),
        ("generate-token-speedup", "grouped", 1.5),
        ("generate-token", "grouped", 2.0),
        ("decode-seconds", "dense", 3.0),
        ("decode-seconds-speedup", "grouped", 1.5),
        ("decode-seconds", "grouped", 2.0),
    ]
    text = make_card(Policy(quality=tuple(rows)), "name")
    assert "median seconds in the same run on GPU X" in text
    assert "| 4,096 | 3 | 2 | 1.50 | 1.00 to 3.00 |" in text


def test_results_of_another_configuration_are_refused() -> None:
    with pytest.raises(UserError, match="holds no measurement of this configuration"):
        quality(results_beside(PUBLISHED[0]), SparseAttentionConfig(alpha=99.0))


def test_a_damaged_summary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"slopes": [], "configs": {"grouped": {}}}')
    with pytest.raises(UserError, match="was not written by this release: it lacks 'about'"):
        Results.read(tmp_path).records(SparseAttentionConfig())
