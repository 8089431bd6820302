"""The methods that evaluations compare: selectors with the law of a configuration, and other laws at equal cost.

Functions that make methods take their names, the configuration that they are made from, the lengths of the inputs in
tokens, over which costs are made equal, and the model's `SupportReport`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, get_args

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.laws import Budget, LawName, match_cost
from hf_sparse.measure.equal_cost import matched, with_dense_layers
from hf_sparse.patching import SupportReport
from hf_sparse.results import DENSE
from hf_sparse.selectors import SELECTORS, parse_selector, selector_name

ConfigT = TypeVar("ConfigT", SparseAttentionConfig, SparseAttentionConfig | None)

Methods = Mapping[str, SparseAttentionConfig | None]
"""Configurations by name; `None` is the model as it is."""

PERPLEXITY_METHODS = ("topk", "grouped", "window", "fixed", "fixed-grouped")
"""What `perplexity` compares with dense attention by default."""

OTHER_METHODS = ("uniform", "decode", "decode-topk", "8-bit", "dense-8-bit")
"""Methods that `perplexity` compares on request."""

DECODED = ("decode", "decode-topk")
"""Methods under which the predicted tokens go through the model one at a time, after the text before them."""

IN_8_BITS = ("8-bit", "dense-8-bit")
"""Methods under which the model attends to what a `SparseCache` with `nbits=8` holds, in one pass over the text."""

FIXED_OF = {"topk": "fixed", "grouped": "fixed-grouped"}
"""Adaptive methods, and the method with the same selector that keeps a fixed number of keys at the same total cost."""

EXACT = "topk"
"""The selector under which laws are compared, and the method that `attention-error` compares others with."""

CALIBRATED = "calibrated"
"""The method that others are compared with where each head has its own law."""


def perplexity_methods(
    names: Iterable[str], config: SparseAttentionConfig, lengths: Sequence[int], support: SupportReport
) -> Methods:
    """`"dense"`, and each of `names` with its configuration.

    - a selector (`topk`, `grouped`, `window` or `path/to/file.py:ClassName`): `config` with that selector;
    - `fixed` and `fixed-grouped`: the same number of keys for every query, such that prefills of all `lengths`
      together attend to as many keys as under `config`, over all heads and layers;
    - `uniform`: one power law with the default exponent in all heads, at the same cost, with the selector of `config`;
    - `decode`: `config` itself, and `decode-topk` the same with the selector `topk`: the predicted tokens are read one
      at a time from the cache, as in generation;
    - `8-bit`: `config` itself, and `dense-8-bit` dense attention, to keys and values that a cache holds in 8 bits.

    Raises:
        UserError: for an unknown name, or if a law cannot match the cost.
    """
    methods: dict[str, SparseAttentionConfig | None] = {DENSE: None}
    for name in names:
        if name == DENSE:
            continue
        own: str = name
        made: SparseAttentionConfig | None = config
        match name:
            case "fixed":
                made = replace(_fixed(config, lengths, support), selector="topk")
            case "fixed-grouped":
                made = replace(_fixed(config, lengths, support), selector="grouped")
            case "uniform":
                made = matched(config, support, lengths, "power")
            case "decode-topk":
                made = replace(config, selector="topk")
            case "dense-8-bit":
                made = None
            case _ if name not in (*DECODED, *IN_8_BITS):
                own, made = _with_selector(config, name, (DENSE, *PERPLEXITY_METHODS, *OTHER_METHODS))
        _add(methods, own, made)
    return methods


def error_methods(
    names: Iterable[str] | None,
    config: SparseAttentionConfig,
    lengths: Sequence[int],
    support: SupportReport,
) -> dict[str, SparseAttentionConfig]:
    """Configurations by name for `attention-error`, which always measures dense attention beside them.

    - a selector: `config` with that selector;
    - a law (`power`, `fixed`, `fraction` or `log`): that law with the exact selector, and the parameter with which
      prefills of all `lengths` together attend to as many keys as under `config`;
    - `calibrated`: `config` itself, if it has laws per head. Laws are then matched over all heads and layers, and keep
      the selector of `config`, for which it was calibrated.

    No names, `None`, are all laws and built-in selectors, `topk` first; with laws per head, `calibrated` and all laws.

    Raises:
        UserError: for an unknown name, none besides `dense`, or if a law cannot match the cost.
    """
    laws: tuple[LawName, ...] = get_args(LawName)
    per_head = config.per_head is not None
    if per_head:
        config = with_dense_layers(config, support)
    if names is None:
        others = [law for law in laws if law != config.law]
        names = [CALIBRATED, *laws] if per_head else [EXACT, *others, "grouped", "window"]
    methods: dict[str, SparseAttentionConfig] = {}
    for name in names:
        if name == DENSE:
            continue
        if name == CALIBRATED and per_head:
            _add(methods, name, config)
        elif name in laws:
            law = laws[laws.index(name)]
            made = matched(config, support, lengths, law) if per_head else _with_law(config, lengths, law)
            _add(methods, name, made)
        else:
            known = (DENSE, *SELECTORS, *laws, *([CALIBRATED] if per_head else []))
            _add(methods, *_with_selector(config, name, known))
    if not methods:
        raise UserError(f"methods must name one besides {DENSE}, whose errors are 0; got {DENSE!r}")
    return methods


def split_names(text: str) -> list[str]:
    """The names in a list separated by commas."""
    return [name.strip() for name in text.split(",")]


def _add(methods: dict[str, ConfigT], name: str, config: ConfigT) -> None:
    if methods.setdefault(name, config) != config:
        raise UserError(f"two different methods are called {name!r}: give the selectors names of their own")


def _with_selector(config: SparseAttentionConfig, text: str, known: Sequence[str]) -> tuple[str, SparseAttentionConfig]:
    """`config` with the selector that `text` names, and the name of that selector."""
    if text not in SELECTORS and ":" not in text:
        raise UserError(f"methods must be among {', '.join(known)}, or path/to/file.py:ClassName; got {text!r}")
    selector = parse_selector(text)
    try:
        return selector_name(selector), replace(config, selector=selector)
    except ValueError as error:
        raise UserError(str(error)) from error


def _fixed(config: SparseAttentionConfig, lengths: Sequence[int], support: SupportReport) -> SparseAttentionConfig:
    if config.law == "fixed":
        raise UserError("the fixed methods are matched to an adaptive law: leave them out with --methods")
    if config.per_head is not None:
        return matched(config, support, lengths, "fixed")
    return replace(config, law="fixed", keys=_match(config, lengths, "fixed").keys, fraction=None)


def _with_law(config: SparseAttentionConfig, lengths: Sequence[int], law: LawName) -> SparseAttentionConfig:
    """The exact selector with one `law` for all heads, which costs as much as that of `config`."""
    exact = replace(config, selector=EXACT)
    if law == config.law:
        return exact
    budget = _match(config, lengths, law)
    assert isinstance(budget.alpha, float)
    return replace(
        exact,
        law=law,
        alpha=budget.alpha,
        keys=budget.keys if law == "fixed" else None,
        fraction=budget.fraction if law == "fraction" else None,
    )


def _match(config: SparseAttentionConfig, lengths: Sequence[int], law: LawName) -> Budget:
    try:
        return match_cost(config.budget(), law, lengths, exponent=config.exponent)
    except ValueError as error:
        raise UserError(str(error)) from error
