from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

import hf_sparse
from hf_sparse.laws import LawName
from hf_sparse.measure.equal_cost import density, kept_keys, matched, with_dense_layers
from tests import small, tiny

LENGTH = 200
LAWS = ((2.0, 0.5), (6.0, 0.2), (1.0, 0.9), (3.0, 0.6))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("llama", {"dense_layers": None}),
        ("mistral", {}),
        ("gemma3", {"per_head": {1: LAWS}}),
        ("gemma3", {"dense_layers": None, "dense_below": 50}),
        ("gpt2", {"per_head": {0: LAWS}, "min_keys": 9}),
    ],
)
def test_costs_are_what_a_patched_model_counts(name: str, fields: dict[str, object]) -> None:
    model = tiny.model(name)
    support = hf_sparse.inspect(model)
    config = replace(small.CONFIG, **fields)  # type: ignore[arg-type]
    hf_sparse.patch(model, config)
    for length in (50, LENGTH):
        tiny.logits(model, tiny.tokens(1, length))
    report = hf_sparse.report(model)
    whole = with_dense_layers(config, support)
    assert kept_keys(whole, support.layers, [50, LENGTH]) == pytest.approx(sum(row["kept"] for row in report.rows))
    assert density(whole, support.layers, [50, LENGTH]) == pytest.approx(report.density)


@pytest.mark.parametrize("law", get_args(LawName))
def test_one_law_costs_as_much_as_laws_per_head(law: LawName) -> None:
    support = hf_sparse.inspect(tiny.model("llama"))
    config = replace(small.CONFIG, per_head={0: LAWS, 1: LAWS})
    made = matched(config, support, [100, LENGTH], law)
    assert (made.law, made.per_head, made.selector) == (law, None, config.selector)
    costs = [kept_keys(c, support.layers, [100, LENGTH]) for c in (config, made)]
    assert costs[1] <= 1.001 * costs[0]
    if law == "fixed":
        assert made.keys is not None
        more = replace(made, keys=made.keys + 1)
        assert kept_keys(more, support.layers, [100, LENGTH]) > costs[0]
    else:
        assert costs[1] == pytest.approx(costs[0], rel=0.01)


def test_the_first_layer_is_dense_where_that_leaves_anything_to_the_others() -> None:
    support = hf_sparse.inspect(tiny.model("llama"))
    generous = replace(small.CONFIG, per_head={1: ((20.0, 0.8),) * 4}, dense_layers=(0,))
    frugal = replace(small.CONFIG, per_head=dict.fromkeys((0, 1), ((2.0, 0.2),) * 4))
    assert matched(generous, support, [LENGTH], "power").dense_layers == (0,)
    assert matched(frugal, support, [LENGTH], "power").dense_layers == ()
