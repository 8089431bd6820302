"""Model cards: what they say is what was measured, huggingface_hub reads them, and other people's words stay."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_sparse import CalibrationRecord, SparseAttentionConfig
from hf_sparse.config import Policy
from hf_sparse.config.files import NAME, read, write
from hf_sparse.schema import QualityRecord
from tests import small

MODEL_CARDS = Path(__file__).parents[1] / "model_cards"
PUBLISHED = sorted(path.parent for path in MODEL_CARDS.glob(f"*/{NAME}"))
HERE = pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
BEGIN, END = "<!-- hf-sparse: begin -->", "<!-- hf-sparse: end -->"
TAGS = ["sparse-attention", "long-context", "transformers"]


def make_card(folder: Path, policy: Policy, existing: str | None = None, *options: str) -> str:
    """The card that `hf-sparse card` writes into the folder of a policy: a new one, or `existing` edited."""
    write(policy, folder / NAME)
    (folder / "README.md").unlink(missing_ok=True)
    if existing is not None:
        (folder / "README.md").write_text(existing)
    assert small.run_command("card", str(folder), *options) == 0
    return (folder / "README.md").read_text()


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
def test_a_published_card_is_made_of_its_results(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    # Its figures are drawn from the same results in test_cli_report.py: here their names are enough.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: path.touch())
    made = shutil.copytree(folder, tmp_path / folder.name)
    (made / "README.md").unlink()
    text = (folder / "README.md").read_text(encoding="utf-8")
    write(replace(read(folder / NAME), quality=()), made / NAME)
    assert small.run_command("card", str(made), "--license", str(ModelCard(text).data.license)) == 0
    assert (made / "README.md").read_text(encoding="utf-8") == text
    policy = read(made / NAME)
    assert replace(policy, versions={}) == replace(read(folder / NAME), versions={})
    assert policy.quality
    assert policy.base.is_on_hub
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert links
    assert all((folder / link).is_file() for link in links)


@HERE
def test_figures_of_a_published_card_are_those_of_the_summary(folder: Path) -> None:
    """Without the code that makes cards: the text against the JSON that `hf-sparse perplexity` wrote."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    policy = json.loads((folder / NAME).read_text(encoding="utf-8"))
    quoted = []  # in the card's order: of tokens one at a time, which are in a folder of their own, then in one pass
    for place, prefix, decoded in (("perplexity-decode", "decoded_", True), ("perplexity", "", False)):
        if not decoded or (folder / place).exists():
            summary = json.loads((folder / place / "summary.json").read_text(encoding="utf-8"))
            quoted += [(prefix, found, dense) for found, dense in of_this_policy(summary, policy, decoded)]
    assert sum(prefix == "" for prefix, _, _ in quoted) >= 1
    lines = re.findall(r"\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| ([\d.]+) \|", text)
    for (_, ours, dense), line in zip(quoted, lines, strict=True):
        length, *figures = line
        assert int(length.replace(",", "")) == ours["length"]
        wanted = (
            dense["perplexity"],
            ours["perplexity"],
            *(ours[name] for name in ("ratio", "low", "high", "density")),
        )
        for shown, value, error in zip(figures, wanted, (5e-3, 5e-3, 5.1e-5, 5.1e-5, 5.1e-5, 5.1e-4), strict=True):
            assert float(shown) == pytest.approx(value, abs=error)
    results = ModelCard(text).data.eval_results
    assert results is not None
    said = {
        (result.metric_type, result.metric_args["method"] == "dense", result.metric_args["context_length"]): (
            result.metric_value
        )
        for result in results
    }
    expected = {}
    for prefix, ours, dense in quoted:
        expected[f"{prefix}perplexity", True, ours["length"]] = dense["perplexity"]
        expected[f"{prefix}perplexity", False, ours["length"]] = ours["perplexity"]
        expected[f"{prefix}perplexity_ratio", False, ours["length"]] = ours["ratio"]
    assert len(results) == len(expected)
    assert said == pytest.approx(expected, abs=1e-6)


def of_this_policy(
    summary: dict[str, Any], policy: dict[str, Any], decoded: bool
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What a summary has of the policy at each length, in decoding or in one pass, with dense attention beside it."""
    decisive = set(policy) & set(next(filter(None, summary["configs"].values()))) - {"engine", "calibration"}
    methods = [
        name
        for name, config in summary["configs"].items()
        if config is not None and all(config[field] == policy[field] for field in decisive)
    ]
    [method] = [name for name in methods if (name == "decode") == decoded]
    found = {(result["method"], result["length"]): result for result in summary["results"]}
    return [(found[method, length], found["dense", length]) for length in summary["lengths"]]


def test_the_metadata_is_what_the_hub_expects(tmp_path: Path) -> None:
    data = ModelCard(make_card(tmp_path, MEASURED, None, "--license", "mit")).data.to_dict()
    assert data["base_model"] == "someone/model"
    assert "base_model_relation" not in data
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == ("hf-sparse", "mit", "text-generation")
    assert data["tags"] == TAGS
    assert data["model-index"][0]["name"] == tmp_path.name


def test_a_name_with_quotes_is_python_in_the_card(tmp_path: Path) -> None:
    folder = tmp_path / 'a "b"'
    folder.mkdir()
    assert r'model = hf_sparse.from_pretrained("a \"b\"")' in make_card(folder, MEASURED)


def test_what_was_not_measured_is_not_there(tmp_path: Path) -> None:
    text = make_card(tmp_path, Policy(base_model="/home/me/model"))
    assert "Nothing was measured with this configuration yet." in text
    assert not {"model-index", "license", "base_model", "eval_results"} & set(ModelCard(text).data.to_dict())
    assert "![" not in text
    assert "/home/me" not in text, "a path of this machine is in no card"


def test_what_was_measured_and_where_it_loses(tmp_path: Path) -> None:
    text = make_card(tmp_path, MEASURED)
    for line in (
        "| 512 | 20.00 | 20.25 | 1.0123 | 1.0010 to 1.0200 | 0.250 |",
        "| 4,096 | - | - | 0.9987 | 0.9900 to 1.0100 | 0.250 |",
        "Perplexity: weights `m.gguf`, dequantised, float32 on cpu; texts: a.txt and b.txt.",
        "- Perplexity against dense is worst at 512 tokens, with a ratio of 1.0123 (1.0010 to 1.0200).",
        "- Dense is better, beyond what resampling explains, at 512 tokens.",
        "- Perplexity was measured up to 4,096 tokens, and not beyond.",
        *(
            f"- {what} was not measured."
            for what in ("Perplexity in decoding", "Attention error", "Retrieval", "Speed")
        ),
    ):
        assert f"{line}\n" in text
    for heading in ("**Perplexity in decoding**", "**Attention error**", "**Retrieval**", "**Speed**"):
        assert heading not in text


def test_of_several_runs_of_a_command_the_first_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it lacks comes from the others; all of them are kept beside the policy, and found there again."""
    own = MODEL_CARDS / "SmolLM2-135M-Instruct"
    given = shutil.copytree(own / "perplexity-decode", tmp_path / "results" / "perplexity-again")
    folder, config = tmp_path / "card", read(own / NAME).config
    folder.mkdir()
    both = ["--results", str(given), "--results", str(own / "perplexity")]
    text = make_card(folder, Policy(config), None, *both)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"perplexity", "perplexity-again"}
    assert text.index("| 4,096 | 14.17 | 14.20 | 1.0023 |") < text.index("| 4,096 | 10.72 | 10.76 | 1.0038 |")
    assert "| 1.0063 |" not in text, "in one pass, the other run measured what a card shows"
    assert text.count("These are not the tokens of the table above.") == 1
    assert text.count("![Perplexity") == text.count("](perplexity/") + text.count("](perplexity-again/") == 2
    assert make_card(folder, Policy(config), text) == text
    capsys.readouterr()
    said = small.refusal(capsys, "card", str(folder), "--results", str(given), *both)
    assert "both hold results of perplexity, which a policy keeps in perplexity-again: name the folder" in said


def test_decoding_fixed_budgets_and_times(tmp_path: Path) -> None:
    records = (
        row(512, 0.99, 0.98, 1.0),
        QualityRecord(metric="decoded_perplexity", method="dense", length=512, value=20.0),
        QualityRecord(metric="decoded_perplexity", method="grouped", length=512, value=20.1),
        row(512, 1.005, 1.002, 1.01, metric="decoded_perplexity_ratio"),
        row(512, 1.2, 1.1, 1.3, metric="ratio_to_fixed"),
        row(2048, 0.7, 0.6, 0.8, metric="generate-token-speedup"),
        row(4096, 1.4, 1.3, 1.5, metric="generate-token-speedup"),
        QualityRecord(metric="generate-token", method="dense", length=2048, value=0.5),
        QualityRecord(metric="generate-token", method="grouped", length=2048, value=0.7),
    )
    text = make_card(tmp_path, replace(MEASURED, quality=records))
    for line in (
        "- Dense is better, beyond what resampling explains, at no length that was measured.",
        "| 512 | 20.00 | 20.10 | 1.0050 | 1.0020 to 1.0100 | 0.250 |",
        "- Dense is better in decoding, beyond what resampling explains, at 512 tokens.",
        "- A fixed number of keys at equal cost is better, beyond what resampling explains, at 512 tokens.",
        "| 2,048 | 0.5 | 0.7 | 0.70 | 0.60 to 0.80 |",
        "| 4,096 | - | - | 1.40 | 1.30 to 1.50 |",
        "- Slower than dense (a further token of the whole model, after a prompt of n) at 2,048 tokens.",
    ):
        assert f"{line}\n" in text


def test_retrieval_and_where_it_is_below_dense(tmp_path: Path) -> None:
    documents = ("a.txt",)
    records = tuple(
        QualityRecord(metric=metric, method=method, length=4096, value=value, density=0.3, documents=documents)
        for metric, method, value in (
            ("retrieval_picked", "dense", 0.9),
            ("retrieval_picked", "grouped", 0.85),
            ("decoded_retrieval_found", "grouped", 0.5),
        )
    )
    records += (
        row(8192, -0.05, -0.1, -0.01, metric="retrieval_picked_above_dense"),
        row(8192, -0.02, -0.1, 0.01, metric="retrieval_found_above_dense"),
        row(8192, 0.02, -0.1, 0.1, metric="decoded_retrieval_found_above_dense"),
    )
    text = make_card(tmp_path, replace(MEASURED, quality=records))
    together = "read in one pass with the text"
    for line in (
        f"| {together} | likelier than three wrong answers | 4,096 | 90 | 85 | 0.300 |",
        "| read token by token | written | 4,096 | - | 50 | 0.300 |",
        f"| {together} | likelier than three wrong answers | -5.0 | -10.0 to -1.0 |",
        "| read token by token | written | +2.0 | -10.0 to +10.0 |",
        "- Retrieval is 5.0 points below dense (-10.0 to -1.0), beyond what resampling explains: questions "
        f"{together}, answers likelier than three wrong answers.",
        f"- Retrieval is 2.0 points below dense (-10.0 to +1.0): questions {together}, answers written.",
    ):
        assert f"{line}\n" in text
    assert text.count("- Retrieval is") == 2
    text = make_card(tmp_path, replace(MEASURED, quality=records[-1:]))
    assert "- Retrieval is below dense in nothing that was measured.\n" in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SparseAttentionConfig(law="fixed", keys=700), "`k(n) = 700`"),
        (SparseAttentionConfig(law="fraction", fraction=0.1), "`k(n) = ceil(0.1 · n)`"),
        (SparseAttentionConfig(law="log", alpha=50), "`k(n) = ceil(50 · ln n)`"),
        (SparseAttentionConfig(max_keys=4096), "at least 128, at most 4,096 and never"),
        (SparseAttentionConfig(dense_layers=(0, 3)), "Layers that stay dense: 0, 3."),
        (SparseAttentionConfig(dense_layers=(), dense_below=0), "Layers that stay dense: none.\n"),
        (
            SparseAttentionConfig(calibration=CalibrationRecord(target="perplexity_ratio", target_value=1.01)),
            "The calibration aimed at a perplexity ratio to dense of 1.01.\n",
        ),
    ],
)
def test_the_law_in_words(config: SparseAttentionConfig, said: str, tmp_path: Path) -> None:
    assert said in make_card(tmp_path, Policy(config))


def test_only_our_part_of_a_card_changes(tmp_path: Path) -> None:
    others = (
        "---\nlanguage: de\nlicense: mit\nlibrary_name: transformers\ntags:\n- mine\nmodel-index:\n- name: theirs\n"
        "  results:\n  - task:\n      type: text-generation\n"
        "    dataset:\n      name: HellaSwag\n      type: hellaswag\n"
        "    metrics:\n    - type: accuracy\n      value: 0.5\n---\n\n# Theirs\n\nBefore.\n"
    )
    once = make_card(tmp_path, MEASURED, others)
    again = make_card(tmp_path, Policy(base_model="someone/model"), once.replace(END, END + "\n\nAfter."))
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
    assert make_card(tmp_path, MEASURED, once) == once
    assert "# Just words" in ModelCard(make_card(tmp_path, MEASURED, "# Just words\n")).text, (
        "a card without metadata gets some"
    )


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
def test_a_card_whose_section_has_lost_an_end_is_refused(
    damage: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = damage(make_card(tmp_path, MEASURED))
    (tmp_path / "README.md").write_text(damaged)
    capsys.readouterr()
    said = small.refusal(capsys, "card", str(tmp_path))
    assert f"README.md of {tmp_path.name} must hold '{BEGIN}' and then '{END}', each once" in said
    assert (tmp_path / "README.md").read_text() == damaged


@pytest.mark.parametrize(("bench", "layers"), [("one-layer", None), ("two-layers", ())])
def test_times_of_a_benchmark(bench: str, layers: tuple[int, ...] | None, tmp_path: Path) -> None:
    """A layer alone is measured with no dense queries, and is the same policy all the same."""
    summary = json.loads((MODEL_CARDS / "bench" / bench / "summary.json").read_text(encoding="utf-8"))
    shutil.copytree(MODEL_CARDS / "bench" / bench, tmp_path / "bench")
    text = make_card(tmp_path, Policy(SparseAttentionConfig(dense_layers=layers)))
    expected = {}
    for result in summary["results"]:
        metric, length = f"{result['kind']}-{result['quantity']}", result["length"]
        if result["method"] == "hf_sparse":
            expected[metric, "grouped", length] = result["median"]
        elif result["method"] == summary["break_even"][result["kind"]]["against"]:
            expected[metric, "dense", length] = result["median"]
            expected[f"{metric}-speedup", "grouped", length] = result["ratio"]["median"]
    quality = read(tmp_path / NAME).quality
    assert {(record.metric, record.method, record.length): record.value for record in quality} == expected
    assert f"median seconds in the same run on {summary['about']['device_name']}" in text


def test_a_damaged_summary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_card(tmp_path, Policy())
    (tmp_path / "summary.json").write_text('{"slopes": [], "configs": {"grouped": {}}}')
    capsys.readouterr()
    said = small.refusal(capsys, "card", str(tmp_path), "--results", str(tmp_path))
    assert "was not written by this release: it lacks 'about'" in said
