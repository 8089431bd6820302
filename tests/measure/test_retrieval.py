"""Retrieval on a tiny random model: prompts, what is read in which mode, scores, and the command."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.errors import UserError
from hf_sparse.measure import retrieval
from hf_sparse.measure.data import Document
from hf_sparse.measure.perplexity import decoded_nll, prefill, token_nll
from hf_sparse.measure.retrieval import answered, evaluate, measure, read
from hf_sparse.measure.retrieval_methods import retrieval_methods
from hf_sparse.measure.retrieval_prompts import MODES, Prompt, make_prompts
from hf_sparse.measure.retrieval_summary import summarise
from hf_sparse.measure.retrieval_tasks import TASKS
from hf_sparse.measure.windows import Window, cut_windows
from hf_sparse.patching import inspect
from hf_sparse.results import Record, ResultFile, provenance
from hf_sparse.share.source import describe
from tests import small, tiny
from tests.measure import retrieval_texts as texts
from tests.small import run_command

LENGTHS = [340, 420]
COUNT = 3
METHODS = {"dense": None, "window": dataclasses.replace(small.CONFIG, selector="window")}
TOKENIZER = texts.tokenizer()


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    documents = [Document(f"d{i}", texts.text(450, i)) for i in range(2)]
    return cut_windows(documents, TOKENIZER, LENGTHS, targets=1)


@pytest.fixture(scope="module")
def prompts(windows: list[Window]) -> list[Prompt]:
    return make_prompts(windows, TOKENIZER, list(TASKS), COUNT, seed=0)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return texts.model()


@pytest.fixture(scope="module")
def about(model: PreTrainedModel) -> Record:
    return provenance(describe("tiny", "abc", model.config), model, seed=0)


def decode(ids: torch.Tensor) -> str:
    return str(TOKENIZER.decode(ids))


def one(prompts: list[Prompt], task: str) -> Prompt:
    return next(prompt for prompt in prompts if prompt.task == task)


def test_prompts_are_as_long_as_their_window(prompts: list[Prompt]) -> None:
    assert [(prompt.task, prompt.length) for prompt in prompts] == 2 * [
        (task, length) for length in LENGTHS for task in TASKS
    ]
    for prompt in prompts:
        assert "#" not in decode(prompt.input_ids)
        longest = max(len(asked.input_ids) + max(map(len, asked.candidates)) for asked in prompt.questions)
        assert len(prompt.input_ids) + longest == prompt.length


def test_needles_stand_between_sentences_near_their_depth(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        if prompt.task != "needle-multikey":
            continue
        whole = decode(prompt.input_ids)
        facts = [line for line in whole.splitlines() if line.startswith("The code for")]
        assert len(facts) == COUNT
        rest = whole
        for fact in facts:
            rest = rest.replace(f"\n{fact}\n", "|")
        assert decode(prompt.window.input_ids).endswith(rest.replace("|", ""))
        pieces = rest.split("|")
        assert pieces[0] == pieces[-1] == ""  # depths 0 and 1
        assert pieces[1].endswith(".")
        share = len(pieces[1]) / len(rest)
        assert 0.4 < share <= 0.5


def test_lists_of_words_take_the_place_of_the_text(prompts: list[Prompt]) -> None:
    prompt = one(prompts, "common-words")
    found = decode(prompt.input_ids).split()
    times = {word: found.count(word) for word in found}
    for asked in prompt.questions:
        word, *others = (decode(ids).strip() for ids in asked.candidates)
        assert times[word] >= 2 * max(times.get(other, 0) for other in others)


def test_a_base_model_completes_a_sentence(prompts: list[Prompt]) -> None:
    for asked in one(prompts, "needle-multikey").questions:
        question, begun = decode(asked.input_ids).rsplit("\n\n", 1)
        name = question.removeprefix("\n\nWhat is the code for ").removesuffix("?")
        assert begun == f"The code for {name} is the number"
        assert decode(asked.candidates[0]) == f" {asked.parts[0]}"


def test_a_chat_model_is_asked_in_its_template(windows: list[Window]) -> None:
    [prompt] = make_prompts(windows[:1], texts.tokenizer(texts.TEMPLATE), ["needle-multikey"], 1, seed=0)
    [asked] = prompt.questions
    assert decode(prompt.input_ids).startswith("<user>")
    assert "?<assistant>The code for" in decode(asked.input_ids)
    assert len(prompt.input_ids) + len(asked.input_ids) + len(asked.candidates[0]) == windows[0].length


def test_an_answer_begins_where_the_tokens_of_the_question_end(windows: list[Window]) -> None:
    """A tokenizer may join the end of a question and the beginning of its answer in one token."""
    first = [f"r {digit}" for digit in range(1, 10)]
    vocab = texts.VOCAB | {token: len(texts.VOCAB) + i for i, token in enumerate(first)}
    joining = texts.tokenizer(vocab=vocab, pattern=r"r \d|[\s\S]")
    [prompt] = make_prompts(windows[:1], joining, ["needle-multikey"], 1, seed=0)
    [asked] = prompt.questions
    assert str(joining.decode(asked.input_ids)).endswith("is the numbe")
    for ids in asked.candidates:
        assert ids[0] >= len(texts.VOCAB)
    assert str(joining.decode(asked.candidates[0])) == f"r {asked.parts[0]}"


def test_prompts_are_those_of_the_document_the_seed_and_the_mode(windows: list[Window], prompts: list[Prompt]) -> None:
    def answers(prompt: Prompt) -> list[tuple[str, ...]]:
        return [asked.parts for asked in prompt.questions]

    first, longer, other = (prompts[i] for i in (0, len(TASKS), 2 * len(TASKS)))
    assert answers(first) == answers(longer) != answers(other)
    same, new, decoded = (
        make_prompts(windows[:1], TOKENIZER, list(TASKS), COUNT, seed, modes)[0]
        for seed, modes in ((0, MODES), (1, MODES), (0, ("decode",)))
    )
    assert same.sha256 == first.sha256
    assert len({first.sha256, new.sha256, decoded.sha256}) == 3
    assert first.about()["prompt_sha256"] == decoded.about()["prompt_sha256"] != new.about()["prompt_sha256"]
    assert len({prompt.sha256 for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["needle"]}, "tasks must be among needle-single, .*; got 'needle'"),
        ({"tasks": ["copying", "copying"]}, "each given once; got 'copying'"),
        ({"modes": ["all"]}, "modes must be among prefill, decode, each given once; got 'all'"),
        ({"questions": 0}, "questions must be between 1 and 8; got 0"),
        ({"questions": 9}, "got 9"),
        ({"tasks": ["copying"], "questions": 8, "length": 100}, "length 100 is too short for copying: facts and the"),
        ({"tasks": ["common-words"], "length": 60}, "d has .* words that common-words can use .*; it takes 68, of 4"),
    ],
)
def test_prompts_that_cannot_be_made_are_refused(change: Record, message: str) -> None:
    length = change.get("length", 420)
    [window] = cut_windows([Document("d", texts.text(450))], TOKENIZER, [length], targets=1)
    with pytest.raises(UserError, match=message):
        make_prompts(
            [window],
            TOKENIZER,
            tasks=change.get("tasks", ["needle-single"]),
            questions=change.get("questions", 1),
            seed=0,
            modes=change.get("modes", MODES),
        )


@pytest.mark.parametrize(("name", "task"), [("llama", "needle-single"), ("gemma3", "needle-multikey")])
@pytest.mark.parametrize("selector", [None, "topk", "grouped"])
def test_sharing_a_pass_over_the_text_changes_nothing(
    name: str, selector: str | None, task: str, prompts: list[Prompt]
) -> None:
    """In prefill mode a question is read as if text and question were one pass, in decode mode token by token.

    In float64, for keys that are almost equally important may be ranked otherwise beside other sequences. Two wrong
    answers are enough.
    """
    model, prompt = texts.model(name).double(), one(prompts, task)
    asked_for = [dataclasses.replace(asked, candidates=asked.candidates[:3]) for asked in prompt.questions]
    prompt = dataclasses.replace(prompt, questions=asked_for)
    # Sliding-window layers are dense by default, too: what their cache holds does not say where groups begin.
    layers = inspect(model).sliding_layers
    config = None if selector is None else dataclasses.replace(small.CONFIG, selector=selector, dense_layers=layers)
    found = measure(model, TOKENIZER, prompt, config)["answers"]
    if config is not None:
        hf_sparse.patch(model, config)
    for asked, whole, stepwise in zip(prompt.questions, found[:COUNT], found[COUNT:], strict=True):
        assert (whole["mode"], stepwise["mode"]) == ("prefill", "decode")
        count = len(asked.candidates[0]) + 1
        ids = torch.cat([prompt.input_ids, asked.input_ids])
        options: Record = {"max_new_tokens": count, "do_sample": False, "pad_token_id": tiny.PAD}
        written = model.generate(ids[None], **options)  # type: ignore[operator]
        assert whole["written"] == decode(written[0, -count:])
        if selector != "grouped":  # which reads an answer as a group of its own
            nll = [token_nll(model, torch.cat([ids, answer])[:-1], answer).sum() for answer in asked.candidates]
            assert whole["nll"] == pytest.approx(nll[0].item(), rel=1e-4)
            assert whole["margin"] == pytest.approx((min(nll[1:]) - nll[0]).item(), abs=1e-3)
        cache = prefill(model, prompt.input_ids)
        for token in asked.input_ids[:-1]:
            cache, _ = read(model, cache, token[None, None])
        last = asked.input_ids[-1:]
        nll = [decoded_nll(model, copy.deepcopy(cache), last, answer).sum() for answer in asked.candidates]
        assert stepwise["nll"] == pytest.approx(nll[0].item(), rel=1e-4)
        assert stepwise["margin"] == pytest.approx((min(nll[1:]) - nll[0]).item(), abs=1e-3)
        after, logits = read(model, cache, last[None])
        assert stepwise["written"] == decode(retrieval.written(model, after, logits, count))
    same = [a["nll"] == pytest.approx(b["nll"], rel=1e-4) for a, b in zip(found[:COUNT], found[COUNT:], strict=True)]
    assert all(same) == (selector != "grouped")  # whose queries choose together only where they are read together


@pytest.mark.parametrize(
    ("says", "exact", "found"),
    [
        (" {0}, {1}.", True, 1.0),
        (" {0}, {1}7", False, 0.5),
        (" {1} and {0}", False, 1.0),
        (" 7{0}, 5", False, 0.0),
        (": {0}, {1}", True, 1.0),
    ],
)
def test_what_is_written_is_compared_with_the_parts_of_the_answer(
    model: PreTrainedModel,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    exact: bool,
    found: float,
) -> None:
    prompt = one(prompts, "needle-multiquery")
    asked = prompt.questions[0]
    ids = torch.tensor(TOKENIZER(says.format(*asked.parts))["input_ids"])
    monkeypatch.setattr(retrieval, "written", lambda *_: ids)
    cache, logits = read(model, None, asked.input_ids[None])
    answer = answered(model, TOKENIZER, asked, cache, logits, "decode")
    assert (answer["exact"], answer["found"]) == (exact, found)


def test_counts_are_of_the_text_and_of_the_answers_apart(prompts: list[Prompt]) -> None:
    config = METHODS["window"]
    assert config is not None
    prompt = one(prompts, "needle-single")
    found = measure(texts.model(), TOKENIZER, prompt, config)
    length = len(prompt.input_ids) // 64 * 64
    visible = torch.arange(1, length + 1)
    assert found["rows"] == tiny.LAYERS * length
    assert found["density"] == pytest.approx(config.budget()(visible).sum().item() / visible.sum().item())
    for mode in MODES:
        assert 0 < found["answer_density"][mode] < found["density"]
    dense = measure(texts.model(), TOKENIZER, prompt, None)
    assert dense["density"] == dense["answer_density"]["decode"] == 1.0
    assert dense["mode_seconds"].keys() == set(MODES)


def test_likelihoods_that_are_not_finite_are_refused(prompts: list[Prompt]) -> None:
    model = texts.model()
    head: torch.nn.Linear = model.lm_head
    head.weight.data[5] = float("nan")
    with pytest.raises(UserError, match=r"d0 are not finite in torch\.float32"):
        measure(model, TOKENIZER, prompts[0], None)


def test_interrupted_runs_resume(model: PreTrainedModel, windows: list[Window], about: Record, tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")

    def run(*tasks: str) -> list[Record]:
        prompts = make_prompts(windows, TOKENIZER, tasks, 1, 0, ("prefill",))
        return evaluate(model, TOKENIZER, prompts, METHODS, results, about)

    first = run("copying")
    lines = results.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(first) == 2 * 2 * 2
    # A run that was killed while it wrote its last record goes on there, also with one task more.
    results.path.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    both = run("copying", "needle-single")
    places = [(r["document"], r["length"], r["task"], r["method"]) for r in both]
    tasks = ("copying", "needle-single")
    assert places == [(f"d{i}", n, task, m) for i in range(2) for n in LENGTHS for task in tasks for m in METHODS]
    again = [record for record in both if record["task"] == "copying"]
    after = results.path.read_bytes().splitlines(keepends=True)
    assert after[: len(lines) - 1] == lines[:-1]
    assert len(after) == len(both), "one record again, and those of the other task"
    assert [record["answers"] for record in again] == [record["answers"] for record in first]
    json.dumps(summarise(both, seed=0), allow_nan=False)


def test_methods_are_laws_of_the_policy_and_of_the_options_and_a_ladder() -> None:
    support = inspect(tiny.config("llama"))
    plain = small.CONFIG
    policy = dataclasses.replace(plain, per_head={0: ((8.0, 0.5),) * 4}, selector="topk")

    def methods(names: list[str] | None, config: hf_sparse.SparseAttentionConfig = policy) -> Record:
        return dict(retrieval_methods(names, [0.5, 0.25], config, plain, LENGTHS, support))

    made = methods(None)
    assert list(made) == ["dense", "default", "calibrated", "fraction-0.5", "fraction-0.25"]
    assert made["default"] == plain
    assert made["calibrated"] == policy
    assert made["fraction-0.25"] == dataclasses.replace(plain, law="fraction", fraction=0.25, selector="topk")
    assert methods(["window"])["window"] == dataclasses.replace(policy, selector="window")
    assert list(methods(None, plain))[:2] == ["dense", "default"]
    for names, config, message in (
        (["calibrated"], plain, "takes a policy with laws for each head"),
        (["decode"], policy, "leave out 'decode'"),
        (["magic"], policy, "got 'magic'"),
    ):
        with pytest.raises(UserError, match=message):
            methods(names, config)
    with pytest.raises(UserError, match=r"budgets must be above 0 and at most 1; got 1\.5"):
        retrieval_methods(None, [1.5], plain, plain, LENGTHS, support)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts.model().save_pretrained("tiny-llama")
    texts.tokenizer(texts.TEMPLATE).save_pretrained("tiny-llama")
    Path("a.txt").write_text(texts.text(450))
    options = ["--text", "a.txt", "--lengths", "200,256", "--questions", "2", "--device", "cpu", "--budgets", "0.5"]
    options += ["--tasks", "needle-single,frequent-words", "--dense-below", "8", "--min-keys", "4", "--output", "out"]
    command = ["retrieval", "tiny-llama", *options]
    assert run_command(*command, "--mode", "both") == 0
    printed = capsys.readouterr().out
    assert "default, decode: by likelihood" in printed
    assert "of 4 tasks and lengths counted" in printed
    assert "bootstrap over questions of the one document" in printed
    assert {path.name for path in Path("out").iterdir()} == {"rows.jsonl", "summary.json", "tables.md", "retrieval.png"}
    summary = Path("out/summary.json").read_text()
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == 2 * 2 * 3
    # Another run in the same folder: each report is about the last one.
    assert run_command(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out)["modes"] == ["prefill"]
    assert run_command(*command, "--mode", "both", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(summary)
    tables = Path("out/tables.md").read_text()
    Path("out/tables.md").unlink()
    assert run_command("report", "out", "--write") == 0
    assert Path("out/tables.md").read_text() == tables
    assert "default, decode: by likelihood" in capsys.readouterr().out
    for option, wrong, message in (("--mode", "all", "got 'all'"), ("--budgets", "half", "got 'half'")):
        assert run_command(*command, option, wrong) == 2
        assert message in capsys.readouterr().err
