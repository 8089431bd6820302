"""The methods that `retrieval` compares: a configuration, its selectors, and a ladder of fixed shares of the keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.methods import CALIBRATED, DECODED, Methods, perplexity_methods
from hf_sparse.patching import SupportReport

DEFAULT = "default"
"""The method whose law is that of the options, even where there is a policy."""


def retrieval_methods(
    names: Iterable[str] | None,
    budgets: Iterable[float],
    config: SparseAttentionConfig,
    plain: SparseAttentionConfig,
    lengths: Sequence[int],
    support: SupportReport,
) -> Methods:
    """`"dense"`, each of `names` with its configuration, and `fraction-B` for each budget B.

    - `default`: `plain`;
    - `calibrated`: `config`, if it has laws per head;
    - other names: what they are for `perplexity_methods`;
    - `fraction-B`: `plain`, but that queries keep the share B of the keys they see, found by the selector of `config`.

    Args:
        names: Methods; `None` for `default`, and for `calibrated` where there is such a policy.
        budgets: Shares of the visible keys, above 0 and at most 1.
        config: The policy, with the options that go before it.
        plain: The options without the policy.
        lengths: Tokens of the prompts.
        support: The model.

    Raises:
        UserError: for an unknown name, or a budget that is not allowed.
    """
    own = {DEFAULT: plain} | ({} if config.per_head is None else {CALIBRATED: config})
    names = list(own) if names is None else list(names)
    if decoded := sorted(set(names) & set(DECODED)):
        raise UserError(f"retrieval decodes with --mode decode: leave out {decoded[0]!r}")
    if CALIBRATED in names and CALIBRATED not in own:
        raise UserError("method 'calibrated' takes a policy with laws for each head: pass one with --policy")
    others = perplexity_methods([name for name in names if name not in own], config, lengths, support)
    methods = {**others, **{name: own[name] for name in names if name in own}}
    for budget in budgets:
        if not 0 < budget <= 1:
            raise UserError(f"budgets must be above 0 and at most 1; got {budget:g}")
        methods[f"fraction-{budget:g}"] = replace(plain, law="fraction", fraction=budget, selector=config.selector)
    return methods
