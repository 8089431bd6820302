"""Budget laws: the formulas, their clamps, monotonicity, and cost matching."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.laws import LAWS, Budget, BudgetTable, bisect, match_cost, total_cost, warn_if_too_slow

ALPHA = st.floats(1e-3, 1e3)
EXPONENT = st.floats(0.0, 1.0)
VISIBLE = st.integers(0, 200_000)


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    least = draw(st.integers(1, 300))
    return Budget(
        law=draw(st.sampled_from(LAWS)),
        alpha=draw(ALPHA),
        exponent=draw(EXPONENT),
        keys=draw(st.integers(1, 5000)),
        fraction=draw(st.floats(1e-3, 1.0)),
        min_keys=least,
        max_keys=draw(st.none() | st.integers(least, 5000)),
        dense_below=draw(st.integers(0, 2000)),
    )


def kept(budget: Budget, n: int) -> int:
    return int(budget(torch.tensor(n)))


@pytest.mark.parametrize(
    ("budget", "n", "expected"),
    [
        (Budget("power", alpha=8.0, exponent=0.5), 4096, 512),
        (Budget("power", alpha=8.0, exponent=0.5), 4097, 513),
        (Budget("power", alpha=2.0, exponent=1.0), 10, 10),
        (Budget("power", alpha=0.1, exponent=1.0), 1000, 100),  # 0.1 * 1000 is a whole number: no rounding up
        (Budget("power", alpha=3.0, exponent=0.0), 1000, 3),
        (Budget("fixed", keys=512), 100_000, 512),
        (Budget("fixed", keys=512), 511, 511),
        (Budget("fraction", fraction=0.2), 1000, 200),
        (Budget("fraction", fraction=0.2), 1001, 201),
        (Budget("fraction", fraction=1.0), 123_457, 123_457),
        (Budget("log", alpha=10.0), 1000, math.ceil(10 * math.log(1000))),
        (Budget("log", alpha=10.0), 1, 1),
        (Budget("power", alpha=1.0, exponent=0.5, min_keys=128), 400, 128),
        (Budget("power", alpha=1.0, exponent=0.5, min_keys=128), 100, 100),
        (Budget("power", alpha=8.0, exponent=1.0, max_keys=300), 1000, 300),
        (Budget("power", alpha=1.0, exponent=0.5, dense_below=256), 255, 255),
        (Budget("power", alpha=1.0, exponent=0.5, dense_below=256), 256, 16),
    ],
)
def test_law_by_hand(budget: Budget, n: int, expected: int) -> None:
    assert kept(budget, n) == expected


@given(budgets(), VISIBLE)
def test_clamps_hold(budget: Budget, n: int) -> None:
    k = kept(budget, n)
    assert 0 <= k <= n
    if n < budget.dense_below:
        assert k == n
    else:
        assert k >= min(n, budget.min_keys)
        if budget.max_keys is not None:
            assert k <= budget.max_keys


@given(budgets(), VISIBLE)
def test_formula_holds_to_one_key(budget: Budget, n: int) -> None:
    """Between the clamps, k is the smallest whole number that is not below the law."""
    if n < 2 or n < budget.dense_below:
        return
    assert isinstance(budget.alpha, float)
    assert isinstance(budget.exponent, float)
    exact = {
        "power": budget.alpha * n**budget.exponent,
        "fixed": budget.keys,
        "fraction": budget.fraction * n,
        "log": budget.alpha * math.log(n),
    }[budget.law]
    k = kept(budget, n)
    if budget.min_keys < k < (budget.max_keys or n) and k < n:
        assert exact * (1 - 1e-8) <= k < exact * (1 + 1e-8) + 1


@given(budgets(), st.lists(VISIBLE, min_size=2, max_size=30))
def test_more_visible_never_means_fewer_kept(budget: Budget, lengths: list[int]) -> None:
    budget = replace(budget, dense_below=0)
    k = budget(torch.tensor(sorted(lengths)))
    assert (k.diff() >= 0).all()


@given(st.sampled_from(["power", "log"]), ALPHA, ALPHA, EXPONENT, VISIBLE)
def test_more_alpha_never_means_fewer_kept(law: str, one: float, other: float, exponent: float, n: int) -> None:
    low, high = sorted([one, other])
    assert kept(Budget(law, low, exponent), n) <= kept(Budget(law, high, exponent), n)


def test_shape_and_dtype_follow_the_rows() -> None:
    visible = torch.tensor([[1, 50, 100], [7, 0, 2000]], dtype=torch.int32)
    k = Budget(alpha=2.0)(visible)
    assert k.dtype == torch.int64
    assert k.shape == visible.shape
    assert k.tolist() == [[kept(Budget(alpha=2.0), n) for n in row] for row in visible.tolist()]


@given(st.lists(st.tuples(ALPHA, EXPONENT), min_size=1, max_size=5), st.lists(VISIBLE, min_size=1, max_size=6))
def test_each_head_follows_its_own_law(laws: list[tuple[float, float]], lengths: list[int]) -> None:
    visible = torch.tensor(lengths)
    k = Budget(alpha=tuple(a for a, _ in laws), exponent=tuple(c for _, c in laws))(visible)
    assert k.shape == (len(laws), len(lengths))
    for head, (alpha, exponent) in enumerate(laws):
        assert torch.equal(k[head], Budget(alpha=alpha, exponent=exponent)(visible))


def test_table_is_the_law() -> None:
    budget = Budget(alpha=3.0, exponent=0.6, min_keys=5, dense_below=20)
    assert budget.table(300).tolist() == [kept(budget, n) for n in range(301)]
    assert Budget(alpha=(1.0, 2.0)).table(10).shape == (2, 11)


def test_total_cost_by_hand() -> None:
    budget = Budget("fixed", keys=3)
    assert total_cost(budget, [2]) == 1 + 2
    assert total_cost(budget, [5]) == 1 + 2 + 3 + 3 + 3
    assert total_cost(budget, [2, 5, 5]) == 3 + 12 + 12


@pytest.mark.parametrize("lengths", [[], [0], [10, -1]])
def test_total_cost_refuses_lengths_without_tokens(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths"):
        total_cost(Budget(), lengths)


@pytest.mark.parametrize("law", LAWS)
@given(
    alpha=st.floats(0.5, 20),
    exponent=st.floats(0.1, 0.9),
    lengths=st.lists(st.integers(100, 3000), min_size=1, max_size=4),
)
def test_matched_law_costs_the_same(law: str, alpha: float, exponent: float, lengths: list[int]) -> None:
    budget = Budget("power", alpha=alpha, exponent=exponent)
    matched = match_cost(budget, law, lengths)
    assert matched.law == law
    target, cost = total_cost(budget, lengths), total_cost(matched, lengths)
    if law == "fixed":
        # Whole keys: one key more or less changes the cost by at most one a row; the nearest is half of that.
        assert isinstance(matched.keys, int)
        steps = [total_cost(replace(matched, keys=k), lengths) for k in (matched.keys - 1, matched.keys + 1) if k > 0]
        assert all(abs(cost - target) <= abs(other - target) for other in steps)
    else:
        # One step of the law is at most one key in a few rows, as rows reach their next whole key one after another.
        assert abs(cost - target) <= 1e-3 * target + len(lengths)


def test_matching_a_law_with_itself_gives_it_back() -> None:
    budget = Budget("power", alpha=6.0, exponent=0.5, min_keys=16)
    assert match_cost(budget, "power", [2000]).alpha == pytest.approx(6.0, rel=1e-3)
    assert match_cost(Budget("fixed", keys=123), "fixed", [2000]).keys == 123
    assert match_cost(Budget("fraction", fraction=0.25), "fraction", [2000]).fraction == pytest.approx(0.25, rel=1e-3)


def test_matching_keeps_the_clamps() -> None:
    budget = Budget("power", alpha=6.0, min_keys=16, max_keys=400, dense_below=64)
    matched = match_cost(budget, "fraction", [1500])
    assert (matched.min_keys, matched.max_keys, matched.dense_below) == (16, 400, 64)


def test_matching_uses_the_exponent_that_is_asked_for() -> None:
    matched = match_cost(Budget("fixed", keys=100), "power", [1000], exponent=0.7)
    assert matched.exponent == 0.7
    assert total_cost(matched, [1000]) == pytest.approx(total_cost(Budget("fixed", keys=100), [1000]), rel=2e-3)


@given(budgets(), st.sampled_from(LAWS), st.lists(st.integers(1, 600), min_size=1, max_size=3))
def test_every_law_can_match_every_other(budget: Budget, law: str, lengths: list[int]) -> None:
    """The clamps are shared, so that no cost is out of reach."""
    matched = match_cost(budget, law, lengths)
    assert matched.law == law


@pytest.mark.parametrize(
    ("budget", "slow"),
    [
        (Budget("power", exponent=0.5), False),
        (Budget("fraction"), False),
        (Budget("power", exponent=0.0), True),
        (Budget("power", exponent=(0.5, 0.0)), True),
        (Budget("fixed"), True),
        (Budget("log"), True),
        (Budget("power", max_keys=1000), True),
    ],
)
def test_warns_of_laws_that_grow_too_slowly(budget: Budget, slow: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_too_slow(budget)
    assert len(caught) == slow
    if slow:
        assert "log(n)" in str(caught[0].message)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_bisection_ends_where_a_condition_turns_false(logarithmic: bool) -> None:
    low, high = bisect(lambda value: value <= 7, 1e-3, 1e3, logarithmic=logarithmic)
    assert low == pytest.approx(7, rel=1e-12)
    assert high == pytest.approx(7, rel=1e-12)
    assert bisect(lambda value: value <= 7, 4.0, 16.0, steps=1, logarithmic=logarithmic) == (
        pytest.approx((4.0, 8.0)) if logarithmic else (4.0, 10.0)
    )
    assert bisect(lambda _: False, 2.0, 1e3, logarithmic=logarithmic)[0] == pytest.approx(2, rel=1e-12)
    assert bisect(lambda _: True, 1e-3, 50.0, logarithmic=logarithmic)[1] == pytest.approx(50, rel=1e-12)


def test_a_table_grows_by_a_little_and_works_nothing_out_twice() -> None:
    asked: list[int] = []

    def law(n: torch.Tensor) -> torch.Tensor:
        asked.append(n.numel())
        return 3 * n.sqrt()

    table, budget = BudgetTable(Budget(law)), Budget("power", alpha=3.0)
    for longest in (10, 5, 3000, 3500, 80_000, 80_001):
        found = table.up_to(longest)
        assert longest < found.shape[-1] <= longest + max(3500, longest // 8) + 2
        assert torch.equal(found[0].long(), budget.table(found.shape[-1] - 1))
    assert sum(asked) == found.shape[-1]
    heads = BudgetTable(replace(budget, alpha=(3.0, 5.0)))
    for longest in (10, 5000):
        assert torch.equal(heads.up_to(longest).long(), heads.law.table(heads.up_to(longest).shape[-1] - 1))
