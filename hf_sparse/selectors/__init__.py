"""Selectors: which keys a block of queries keeps, given how many each query may keep."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.call import AlwaysKept, AttentionCall, Selection
from hf_sparse.errors import UserError
from hf_sparse.schema import custom
from hf_sparse.selectors.base import ScoreSelector, Selector
from hf_sparse.selectors.checked import check_selection
from hf_sparse.selectors.grouped import Grouped
from hf_sparse.selectors.topk import TopK
from hf_sparse.selectors.window import Window

__all__ = ["SELECTORS", "ScoreSelector", "Selector", "find_selector", "parse_selector", "select", "selector_name"]

SELECTORS: dict[str, Selector] = {selector.name: selector for selector in (Grouped(), TopK(), Window())}
"""The built-in selectors by name."""

_OWN = {kind.select for kind in (Grouped, ScoreSelector, Window)}


def find_selector(selector: str | Selector) -> Selector:
    """The selector that a configuration names, or holds.

    Raises:
        KeyError: For a name that is not built in.
    """
    return SELECTORS[selector] if isinstance(selector, str) else selector


def select(selector: Selector, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
    """What a selector keeps: see `Selector.select`. What a `select` of a user's own gives is checked.

    Raises:
        UserError: If it gives anything but its budget of visible keys for each query.
    """
    selection = selector.select(call, budgets, always)
    if type(selector).select not in _OWN:
        check_selection(selector.name, selection, call, budgets)
    return selection


def selector_name(selector: str | Selector) -> str:
    """What records, tables and plots call a selector."""
    return selector if isinstance(selector, str) else selector.name


def parse_selector(text: str) -> str | Selector:
    """The selector that a command line names: a built-in one, or `"path/to/file.py:ClassName"`.

    Raises:
        UserError: If there is none of that name, or the file or the class in it cannot be used.
    """
    if text in SELECTORS:
        return text
    if ":" in text:
        return custom.load(text, Selector, "selector")
    raise UserError(f"selector must be one of {', '.join(SELECTORS)}, or path/to/file.py:ClassName; got {text!r}")
