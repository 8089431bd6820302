"""Retrieval on a tiny random model with a tokenizer of single characters."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hf_sparse
from hf_sparse.errors import UserError
from hf_sparse.measure import retrieval
from hf_sparse.measure.data import Document
from hf_sparse.measure.perplexity import prefill, token_nll
from hf_sparse.measure.retrieval import Prompt, evaluate, make_prompts, measure, written
from hf_sparse.measure.retrieval_summary import all_tables, summarise
from hf_sparse.measure.windows import Window, cut_windows
from hf_sparse.results import Record, ResultFile, provenance
from hf_sparse.share.source import describe
from tests import small, tiny
from tests.small import run_command

LENGTHS = [220, 250]
CODES = 3
CHARACTERS = [*string.ascii_letters, *string.digits, *" .?<>\n"]
VOCAB = {"#": 0, **{c: i for i, c in enumerate(CHARACTERS, start=1)}}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
METHODS = {"dense": None, "window": dataclasses.replace(small.CONFIG, selector="window")}


def characters(
    template: str | None = None, vocab: dict[str, int] = VOCAB, pattern: str = r"[\s\S]"
) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    inner = Tokenizer(WordLevel(vocab, unk_token="#"))
    inner.pre_tokenizer = Split(Regex(pattern), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="#")  # type: ignore[no-untyped-call]
    tokenizer.chat_template = template
    return tokenizer


def text(count: int, seed: int = 0) -> str:
    letters = np.random.default_rng(seed).choice([*string.ascii_lowercase, " "], size=count)
    return "".join(letters.tolist())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    return cut_windows([Document(f"d{i}", text(300, i)) for i in range(2)], characters(), LENGTHS, targets=1)


@pytest.fixture(scope="module")
def prompts(windows: list[Window]) -> list[Prompt]:
    return make_prompts(windows, characters(), CODES, seed=0)


@pytest.fixture(scope="module")
def about(model: PreTrainedModel) -> Record:
    return provenance(describe("tiny", "abc", model.config), model, seed=0)


def decode(ids: torch.Tensor) -> str:
    return str(characters().decode(ids))


def test_codes_lie_at_even_depths_of_the_text(windows: list[Window], prompts: list[Prompt]) -> None:
    for window, prompt in zip(windows, prompts, strict=True):
        whole = decode(prompt.input_ids)
        facts = [f"\nThe code for {asked.name} is the number {asked.code}.\n" for asked in prompt.questions]
        rest = whole
        for fact in facts:
            assert whole.count(fact) == 1
            rest = rest.replace(fact, "")
        assert decode(window.input_ids).endswith(rest)
        places = [whole.index(fact) - sum(map(len, facts[:i])) for i, fact in enumerate(facts)]
        assert places == [round(len(rest) * depth) for depth in (0, 0.5, 1)]
        assert [asked.depth for asked in prompt.questions] == [0, 0.5, 1]
        longest = max(len(asked.input_ids) + len(asked.answer_ids) for asked in prompt.questions)
        assert len(prompt.input_ids) + longest == window.length


def test_a_base_model_completes_a_sentence(prompts: list[Prompt]) -> None:
    for asked in prompts[0].questions:
        question = f"\n\nWhat is the code for {asked.name}?\n\nThe code for {asked.name} is the number"
        assert decode(asked.input_ids) == question
        assert decode(asked.answer_ids) == f" {asked.code}"
        assert len(asked.code) == 5


def test_a_chat_model_is_asked_in_its_template(windows: list[Window]) -> None:
    [prompt] = make_prompts(windows[:1], characters(TEMPLATE), 1, seed=0)
    [asked] = prompt.questions
    assert decode(prompt.input_ids).startswith("<user>")
    question = f"\n\nWhat is the code for {asked.name}?<assistant>The code for {asked.name} is the number"
    assert decode(asked.input_ids) == question
    assert len(prompt.input_ids) + len(asked.input_ids) + len(asked.answer_ids) == windows[0].length


def test_an_answer_begins_where_the_tokens_of_the_question_end(windows: list[Window]) -> None:
    """A tokenizer may join the end of a question and the beginning of its answer in one token."""
    vocab = VOCAB | {f"r {digit}": len(VOCAB) + i for i, digit in enumerate(string.digits)}
    [prompt] = make_prompts(windows[:1], characters(vocab=vocab, pattern=r"r \d|[\s\S]"), 1, seed=0)
    [asked] = prompt.questions
    assert asked.answer_ids[0] == vocab[f"r {asked.code[0]}"]
    assert decode(asked.input_ids).endswith(f"The code for {asked.name} is the numbe")
    assert decode(asked.answer_ids[1:]) == asked.code[1:]


def test_codes_are_those_of_the_document_and_the_seed(windows: list[Window], prompts: list[Prompt]) -> None:
    def codes(prompt: Prompt) -> list[tuple[str, str]]:
        return [(asked.name, asked.code) for asked in prompt.questions]

    assert codes(prompts[0]) == codes(prompts[1])  # two lengths of one document
    assert codes(prompts[0]) != codes(prompts[2])
    assert len({name for name, _ in codes(prompts[0])}) == CODES
    assert [prompt.sha256 for prompt in make_prompts(windows, characters(), CODES, 0)] == [p.sha256 for p in prompts]
    assert make_prompts(windows, characters(), CODES, 1)[0].sha256 != prompts[0].sha256


@pytest.mark.parametrize(
    ("codes", "message"),
    [(0, "codes must be between 1 and 24; got 0"), (25, "got 25"), (5, "length 220 is too short: 5 codes and a")],
)
def test_codes_that_do_not_fit_are_refused(windows: list[Window], codes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_prompts(windows, characters(), codes, seed=0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("selector", [None, "topk", "window"])
def test_a_copy_of_the_cache_answers_as_the_whole_text_does(
    name: str, selector: str | None, prompts: list[Prompt]
) -> None:
    """Reading the text once and asking from copies of the cache is an economy, not a change."""
    model = tiny.model(name)
    config = None if selector is None else dataclasses.replace(small.CONFIG, selector=selector)
    found = measure(model, characters(), prompts[0], config)
    if config is not None:
        hf_sparse.patch(model, config)
    for asked, answer in zip(prompts[0].questions, found["answers"], strict=True):
        whole = torch.cat([prompts[0].input_ids, asked.input_ids, asked.answer_ids])
        nll = token_nll(model, whole[:-1], asked.answer_ids).sum().item()
        assert answer["nll"] == pytest.approx(nll, rel=1e-4)
        assert answer["tokens"] == len(asked.answer_ids) == 6
        ids = model.generate(
            whole[None, : -len(asked.answer_ids)], max_new_tokens=7, do_sample=False, pad_token_id=tiny.PAD
        )
        assert answer["written"] == decode(ids[0, -7:])


def test_written_continues_a_cache(model: PreTrainedModel) -> None:
    ids = tiny.tokens(1, 30)[0]
    cached = written(model, prefill(model, ids[:20]), ids[20:], 5)
    assert cached.tolist() == written(model, None, ids, 5).tolist()
    assert cached.tolist() == model.generate(ids[None], max_new_tokens=5, do_sample=False)[0, 30:].tolist()


def test_an_answer_is_correct_if_its_first_number_is_the_code(
    model: PreTrainedModel, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [asked.code for asked in prompts[0].questions]
    says = iter([f" {codes[0]}.", f" {codes[1]}7", f" x {codes[2]}"])
    monkeypatch.setattr(retrieval, "written", lambda *_: torch.tensor(characters()(next(says))["input_ids"]))
    found = measure(model, characters(), prompts[0], None)
    assert [answer["correct"] for answer in found["answers"]] == [True, False, True]


def test_counts_are_of_the_text_and_of_the_answers_apart(prompts: list[Prompt]) -> None:
    config = dataclasses.replace(small.CONFIG, selector="window")
    found = measure(tiny.model("llama"), characters(), prompts[0], config)
    length = len(prompts[0].input_ids)
    visible = torch.arange(1, length + 1)
    assert found["rows"] == tiny.LAYERS * length
    assert found["density"] == pytest.approx(config.budget()(visible).sum().item() / visible.sum().item())
    kept = seen = 0
    for asked in prompts[0].questions:
        for steps in (len(asked.answer_ids) - 1, len(asked.answer_ids)):  # its likelihood, and what is written
            visible = torch.arange(length + 1, length + len(asked.input_ids) + steps + 1)
            kept += config.budget()(visible).sum().item()
            seen += visible.sum().item()
    assert found["answer_density"] == pytest.approx(kept / seen)
    assert measure(tiny.model("llama"), characters(), prompts[0], None)["answer_density"] == 1.0


def test_likelihoods_that_are_not_finite_are_refused(prompts: list[Prompt]) -> None:
    model = tiny.model("llama")
    head: torch.nn.Linear = model.lm_head
    head.weight.data[5] = float("nan")
    with pytest.raises(UserError, match=r"d0 are not finite in torch\.float32"):
        measure(model, characters(), prompts[0], None)


def test_interrupted_runs_resume(
    model: PreTrainedModel, prompts: list[Prompt], about: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    first = evaluate(model, characters(), prompts, METHODS, results, about)
    assert [(record["document"], record["length"], record["method"]) for record in first] == [
        (f"d{i}", length, method) for i in range(2) for length in LENGTHS for method in METHODS
    ]
    monkeypatch.setattr(retrieval, "measure", None)
    assert evaluate(model, characters(), prompts, METHODS, results, about) == first


def records(correct: dict[str, list[list[bool]]]) -> list[Record]:
    """Records of one length: by method, whether each question of each document was answered."""
    return [
        {
            "method": method,
            "length": 512,
            "document": f"d{i}",
            "text_sha256": str(i),
            "answers": [
                {"depth": j / 2, "correct": right, "nll": 2.0 + 4.0 * (not right), "tokens": 4}
                for j, right in enumerate(answers)
            ],
            "density": 0.5,
            "answer_density": 0.1,
            "mean_keys": None if method == "dense" else 9.0,
            "seconds": 1.0,
            "config": None,
        }
        | dict.fromkeys(("model", "dtype", "device", "device_name", "versions", "commit"))
        for method, documents in correct.items()
        for i, answers in enumerate(documents)
    ]


def test_a_summary_counts_by_length_depth_and_document() -> None:
    given = {"dense": [[True, True, True], [True, True, False]], "window": [[False, False, True], [False, True, False]]}
    summary = summarise(records(given), seed=0)
    json.dumps(summary, allow_nan=False)
    assert summary["command"] == "retrieval"
    assert summary["resampled"] == "documents and questions"
    dense, window = summary["results"]
    assert (dense["questions"], dense["mean_keys"], window["mean_keys"]) == (6, None, 9.0)
    assert dense["accuracy"]["value"] == pytest.approx(5 / 6)
    assert window["accuracy"]["value"] == pytest.approx(2 / 6)
    assert window["accuracy_above_dense"]["value"] == pytest.approx(-3 / 6)
    assert window["nats"]["value"] == pytest.approx((2 * 0.5 + 4 * 1.5) / 6)
    for row in (dense, window):
        for name in ("accuracy", "nats"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    assert dense["accuracy_above_dense"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    by_depth = {(row["method"], row["depth"]): row["accuracy"] for row in summary["depths"]}
    assert [by_depth["window", depth] for depth in (0.0, 0.5, 1.0)] == [0.0, 0.5, 0.5]
    assert [row["accuracy"] for row in summary["by_document"]] == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    for header, lines in all_tables(summary):
        assert len(lines) == 2
        assert {len(line) for line in lines} == {len(header)}


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.model("llama").save_pretrained("tiny-llama")
    characters(TEMPLATE).save_pretrained("tiny-llama")
    Path("a.txt").write_text(text(300))
    options = ["--text", "a.txt", "--lengths", "220,250", "--codes", "2", "--methods", "window", "--device", "cpu"]
    command = ["retrieval", "tiny-llama", *options, "--dense-below", "8", "--min-keys", "4", "--output", "out"]
    assert run_command(*command) == 0
    printed = capsys.readouterr().out
    assert "found at 250 tokens" in printed
    assert "bootstrap over questions of the one document" in printed
    assert {path.name for path in Path("out").iterdir()} == {"rows.jsonl", "summary.json", "tables.md", "retrieval.png"}
    assert run_command(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("out/summary.json").read_text())
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == 2 * 2
    for wrong, message in (("decode", "leave out 'decode'"), ("magic", "got 'magic'")):
        assert run_command(*command, "--methods", wrong) == 2
        assert message in capsys.readouterr().err
