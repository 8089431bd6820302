"""Selectors, engines and laws of a user's own, in files of their own, as the examples beside the package have them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import AlwaysKept, AttentionCall, Selection
from hf_sparse.engines import ENGINES
from hf_sparse.errors import UserError
from hf_sparse.selectors import SELECTORS, Selector, parse_selector
from tests import calls, tiny
from tests.sparse import SPARSE, assert_same, generated

EXAMPLES = Path(__file__).parents[1] / "scripts" / "selectors"
NAMES = {
    "key_norm.py:KeyNorm": "key-norm",
    "block_bounds.py:BlockBounds": "block-bounds",
    "strided.py:Strided": "strided",
}


def example(name: str) -> Selector:
    selector = parse_selector(f"{EXAMPLES}/{name}")
    assert isinstance(selector, Selector)
    return selector


every_example = pytest.mark.parametrize("name", NAMES)


@every_example
@pytest.mark.parametrize("heads", [1, 4])
def test_budgets_are_spent_exactly_on_visible_keys(name: str, heads: int) -> None:
    intervals = calls.causal_intervals(50, 120, window=90, left=(0, 37), right=(3, 0))
    call = calls.inputs(intervals, 120)
    for most in (1, 7, 40, 120):
        budgets = call.visible[:, None].clamp(max=most).expand(-1, heads, -1)
        mask = example(name).select(call, budgets, AlwaysKept(4, 8)).mask(4, 120)
        assert torch.equal(mask.sum(-1), budgets.expand(-1, 4, -1))
        assert not (mask & ~calls.visible_mask(call)).any()
        sinks, recent = AlwaysKept(4, 8).split(budgets[..., None])
        position = torch.arange(120)
        first, stop = intervals.long().unsqueeze(-1).unbind(-2)
        always = (position >= stop - recent) & (position < stop) | (position >= first) & (position < first + sinks)
        assert not (always & ~mask).any()


def test_what_the_examples_keep() -> None:
    call = calls.inputs(calls.causal_intervals(1, 64), 64, heads=2, kv_heads=1)
    budgets = torch.full((2, 1, 1), 16)
    keep = {name: example(name).select(call, budgets, AlwaysKept(0, 0)).mask(2, 64)[0, 0, 0] for name in NAMES}
    norms = call.key[0, 0].norm(dim=-1)
    assert keep["key_norm.py:KeyNorm"].nonzero().flatten().tolist() == sorted(norms.argsort()[:16].tolist())
    blocks = call.key[0, 0].view(4, 16, -1)
    bounds = torch.maximum(call.query[0, 0, 0] * blocks.amax(1), call.query[0, 0, 0] * blocks.amin(1)).sum(-1)
    assert keep["block_bounds.py:BlockBounds"].view(4, 16).all(1).tolist() == (bounds == bounds.max()).tolist()
    assert keep["strided.py:Strided"].nonzero().flatten().diff().unique().tolist() == [4]


@every_example
def test_padding_changes_nothing(name: str) -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE, selector=example(name))
    ids, mask, alone = tiny.padded([60, 41], "left")
    together = tiny.logits(model, ids, mask)
    assert 0 < hf_sparse.report(model).density < 0.75
    for row, text in enumerate(alone):
        assert_same(together[row, mask[row].bool()], tiny.logits(model, text[None])[0])
    assert generated(model)


@pytest.mark.parametrize("name", ["key_norm.py:KeyNorm", "strided.py:Strided"])
def test_decoding_gives_what_one_pass_gives(name: str) -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE, selector=example(name))
    ids = tiny.tokens(1, 60)
    cache = hf_sparse.SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(50, 60)]
    assert_same(torch.cat(steps, dim=1), tiny.logits(model, ids)[:, 50:])


@dataclass(frozen=True)
class Bad(hf_sparse.ScoreSelector):
    """Gives what `made` makes of a call."""

    made: Callable[[AttentionCall], object] = lambda call: None
    name: str = "bad"

    def score(self, query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
        return self.made(call)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda call: None, "selector 'bad': score must return a floating-point tensor; got NoneType"),
        (lambda call: torch.ones(3, dtype=torch.int64), "selector 'bad': .* got torch.int64"),
        (lambda call: torch.ones(5), r"must be broadcastable to .* = \(1, 4, 40, 40\); got \(5,\)"),
    ],
)
def test_scores_that_are_none_are_named(made: Callable[[AttentionCall], object], said: str) -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE, selector=Bad(made))
    with pytest.raises(UserError, match=said):
        tiny.logits(model, tiny.tokens(1, 40))


def test_scores_without_order_still_spend_the_budget() -> None:
    call = calls.inputs(calls.causal_intervals(8, 30), 30)
    for value in (torch.nan, torch.inf, -torch.inf):
        selector = Bad(lambda call, value=value: torch.full((), value))
        mask = selector.select(call, torch.full((2, 1, 8), 9), AlwaysKept(2, 3)).mask(4, 30)
        assert (mask.sum(-1) == 9).all()
        assert mask[..., :2].all()


def test_a_selector_without_its_method_is_told() -> None:
    call = calls.inputs(calls.causal_intervals(1, 4), 4)
    with pytest.raises(NotImplementedError, match=r"ScoreSelector must define score"):
        hf_sparse.ScoreSelector().select(call, torch.ones(2, 1, 1, dtype=torch.int64), AlwaysKept())
    with pytest.raises(NotImplementedError, match=r"Selector must define select"):
        hf_sparse.Selector().select(call, torch.ones(2, 1, 1, dtype=torch.int64), AlwaysKept())


@dataclass(frozen=True)
class Changed(Selector):
    """The window selector, with its selection changed."""

    change: Callable[[Selection], object]
    name: str = "changed"

    def select(self, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
        return self.change(SELECTORS["window"].select(call, budgets, always))  # type: ignore[return-value]


def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x], dim=-1)


@pytest.mark.parametrize("engine", ["auto", "reference", "gather"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: None, "select must return a hf_sparse.Selection; got NoneType"),
        (lambda s: replace(s, positions=s.positions + 1000), r"key positions must be in 0 \.\.\. 39; got 1000 "),
        (lambda s: replace(s, positions=s.positions - 1), r"key positions must be in 0 \.\.\. 39; got -1 "),
        (lambda s: replace(s, positions=s.positions.int()), r"Selection.positions must be int64 .*; got int32 \(1, 2,"),
        (lambda s: replace(s, positions=s.positions[..., 1:]), "Selection.allowed must be bool"),
        (lambda s: replace(s, allowed=s.allowed.int()), "Selection.allowed must be bool .*; got int32"),
        (lambda s: replace(s, allowed=s.allowed | True), "a query keeps the key at position 1, which it does not see"),
        (lambda s: replace(s, allowed=s.allowed & False), "must keep its budget .* keeps 0 with a budget of 1"),
        (lambda s: replace(s, positions=twice(s.positions), allowed=twice(s.allowed)), "a key that is named twice"),
        (lambda s: replace(s, queries_per_group=39), "queries_per_group must divide the block's 40 queries; got 39"),
        (lambda s: replace(s, per_head=True), r"Selection.positions must be int64 \(1, 2, 2, "),
    ],
)
def test_selections_that_are_none_are_named(change: Callable[[Selection], object], said: str, engine: str) -> None:
    """Kernels would read beyond the keys, or a query would attend to what comes after it."""
    model = hf_sparse.patch(tiny.model("llama"), SPARSE, selector=Changed(change), engine=engine)
    with pytest.raises(UserError, match=f"selector 'changed': .*{said}"):
        tiny.logits(model, tiny.tokens(1, 40))


def test_a_whole_selector_that_keeps_what_it_should_is_taken() -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE, selector=Changed(lambda selection: selection))
    window = hf_sparse.patch(tiny.model("llama"), SPARSE, selector="window")
    ids, mask, _ = tiny.padded([60, 41], "left")
    assert torch.equal(tiny.logits(model, ids, mask), tiny.logits(window, ids, mask))


class Counting(hf_sparse.Engine):
    """The reference, counting its calls."""

    name = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def attend(self, call: AttentionCall, selection: Selection) -> Tensor:
        self.calls += 1
        return ENGINES["reference"].attend(call, selection)

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        return "it is too long" if call.key.shape[2] > 100 else None


def test_an_engine_of_ones_own_attends() -> None:
    engine, ids = Counting(), tiny.tokens(1, 60)
    model = hf_sparse.patch(tiny.model("llama"), SPARSE, engine=engine)
    ours = tiny.logits(model, ids)
    assert engine.calls > 0
    assert_same(ours, tiny.logits(hf_sparse.patch(model, SPARSE, engine="reference"), ids))
    hf_sparse.patch(model, SPARSE, engine=engine)
    with pytest.raises(UserError, match="engine 'counting' cannot attend here: it is too long"):
        tiny.logits(model, tiny.tokens(1, 120))


@dataclass(frozen=True, eq=False)
class Bent(hf_sparse.Engine):
    """The reference, with its output changed."""

    change: Callable[[Tensor], object]
    name: str = "bent"

    def attend(self, call: AttentionCall, selection: Selection) -> Tensor:
        return self.change(ENGINES["reference"].attend(call, selection))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: None, "NoneType"),
        (lambda out: out.double(), r"torch.float64 \(1, 4, 40, 16\)"),
        (lambda out: out.transpose(1, 2), r"torch.float32 \(1, 40, 4, 16\)"),
    ],
)
def test_outputs_that_are_none_are_named(change: Callable[[Tensor], object], said: str) -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE, engine=Bent(change))
    with pytest.raises(
        UserError, match=rf"engine 'bent': attend must return torch.float32 \(1, 4, 40, 16\); got {said}"
    ):
        tiny.logits(model, tiny.tokens(1, 40))


def root(n: Tensor) -> Tensor:
    return 3 * n.sqrt()


def test_a_law_of_ones_own_decides_budgets() -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE, law=root)
    tiny.logits(model, tiny.tokens(1, 60))
    power = hf_sparse.patch(tiny.model("llama"), SPARSE, alpha=3.0, exponent=0.5)
    tiny.logits(power, tiny.tokens(1, 60))
    assert hf_sparse.report(model).rows == hf_sparse.report(power).rows


def test_a_law_is_not_asked_about_queries_that_see_nothing() -> None:
    """A logarithm of none is no number. And what it is asked about is its own to write to."""
    config = hf_sparse.SparseAttentionConfig(min_keys=1, dense_below=0, law=lambda n: n.log_().mul_(8))
    assert config.budget().table(10).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert config.budget().table(100)[100] == math.ceil(8 * math.log(100))


@dataclass
class Steps:
    """A law without a hash."""

    sizes: list[int]

    def __call__(self, n: Tensor) -> Tensor:
        return torch.full_like(n, self.sizes[0])


def test_laws_and_selectors_need_no_hash() -> None:
    model = tiny.model("llama")
    for _ in range(2):
        hf_sparse.patch(model, SPARSE, law=Steps([7]), selector=Changed(Steps([1])))
    hf_sparse.patch(model, SPARSE, law=Steps([7]))
    tiny.logits(model, tiny.tokens(1, 60))
    with hf_sparse.patched(model, SPARSE, law=Steps([9])):
        tiny.logits(model, tiny.tokens(1, 60))
        assert {row["kept"] for row in hf_sparse.report(model).rows} == {9 * 60 - 36}
    hf_sparse.patch(model, SPARSE, law=Steps([7]))
    assert {row["kept"] for row in hf_sparse.report(model).rows} == {7 * 60 - 21}


@pytest.mark.parametrize(
    ("law", "said"),
    [
        (lambda n: 3, "must map a float64 tensor .* same shape, .*; got int"),
        (lambda n: n[:1], r".* same shape, \(65,\); got \(1,\)"),
        (lambda n: n / 0, "must give finite numbers of keys; got"),
    ],
)
def test_laws_that_give_no_budgets_are_named(law: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(UserError, match=f"law '<lambda>' {said}"):
        hf_sparse.SparseAttentionConfig(law=law).budget().table(64)


def test_records_name_code_and_files_cannot_hold_it() -> None:
    config = hf_sparse.SparseAttentionConfig(selector=example("key_norm.py:KeyNorm"), engine=Counting(), law=root)
    said = json.loads(json.dumps(config.to_dict()))
    assert said["selector"]["name"] == "key-norm"
    assert said["selector"]["fields"] == {"name": "'key-norm'"}
    assert len(said["selector"]["source_sha256"]) == 64
    assert said["engine"]["name"] == "counting"
    assert said["law"]["name"] == "root"
    assert set(config.code) == {"law", "selector", "engine"}
    with pytest.raises(ValueError, match="law must be one of power, fixed, fraction, log"):
        hf_sparse.SparseAttentionConfig.from_dict(said)
    with pytest.raises(ValueError, match="selector must be one of grouped, topk, window, or a Selector of your own"):
        hf_sparse.SparseAttentionConfig.from_dict({**said, "law": "power", "engine": "auto"})


def test_the_same_selector_twice_is_one_configuration() -> None:
    model = tiny.model("llama")
    hf_sparse.patch(model, selector=example("key_norm.py:KeyNorm"))
    tiny.logits(model, tiny.tokens(1, 20))
    hf_sparse.patch(model, selector=example("key_norm.py:KeyNorm"))
    assert hf_sparse.report(model).rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("best", "selector must be one of grouped, topk, window, or path/to/file.py:ClassName; got 'best'"),
        ("nowhere.py:KeyNorm", "there is no file 'nowhere.py'"),
        (f"{EXAMPLES}/key_norm.py:Nothing", "defines no 'Nothing'"),
        (f"{EXAMPLES}/key_norm.py:Tensor", "must be a hf_sparse.Selector; got"),
        (f"{EXAMPLES}/key_norm.py:", "defines no ''"),
    ],
)
def test_selectors_that_cannot_be_found_are_named(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_selector(text)


def test_a_file_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match=r"broken\.py:X': ZeroDivisionError"):
        parse_selector(f"{tmp_path}/broken.py:X")


@pytest.mark.parametrize("name", ["", "topk", 3])
def test_a_name_that_is_none_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"selector: Bad.name must be a name that no built-in selector has; got"):
        hf_sparse.SparseAttentionConfig(selector=Bad(name=name))  # type: ignore[arg-type]
