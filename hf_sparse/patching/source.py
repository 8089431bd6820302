"""What the source of a model says: how its attention calls transformers' interface, and which functions it names."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Its fifth argument is the mask: after the module, queries, keys and values.
_MASK = 4

# Modules of other names hold no modelling code.
_MODELLING = ("transformers.models", "transformers_modules")


@dataclass(frozen=True)
class InterfaceCall:
    """How a `forward` calls the attention interface.

    Attributes:
        arguments: Keyword arguments that it passes.
        changes_mask: Whether it passes another mask than the one that it was given.
    """

    arguments: frozenset[str]
    changes_mask: bool


@functools.cache
def interface_call(kind: Any) -> InterfaceCall | None:
    """How `kind.forward` calls the attention interface; `None` if it does not call it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    assigned = list(_assignments(tree))
    functions = {name for name, value in assigned if _INTERFACE in ast.dump(value)}
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions
    ]
    if not calls:
        return None
    masks = [mask for call in calls for mask in call.args[_MASK : _MASK + 1]]
    masks += [word.value for call in calls for word in call.keywords if word.arg == "attention_mask"]
    for mask in masks:  # and what they are made of, from the call backwards
        named = {node.id for node in ast.walk(mask) if isinstance(node, ast.Name)}
        masks += [value for name, value in assigned if name in named and value not in masks]
    changed = any(_makes(mask) for mask in masks)
    arguments = frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None)
    return InterfaceCall(arguments, changed)


def _makes(value: ast.expr) -> bool:
    """Whether an expression computes something; `x`, `x or y` and `x.get("a")` choose among what is there."""
    return any(
        isinstance(node, ast.BinOp | ast.Slice)
        or (isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr == "get"))
        for node in ast.walk(value)
    )


def _assignments(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Each name that a value is given to, with the value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        yield name.id, node.value


def names_in(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether one of these functions is named where the classes of a model are written."""
    # A class may only inherit the forward that builds the masks, and wrappers leave it to the model inside.
    classes = {
        base for module in model.modules() if isinstance(module, PreTrainedModel) for base in type(module).__mro__
    }
    sources = {base.__module__ for base in classes if base.__module__.startswith(_MODELLING)}
    texts = [source_of(sys.modules.get(source)) for source in sources | {type(model).__module__}]
    return any(name in text for text in texts for name in names)


@functools.cache
def source_of(thing: Any) -> str:
    """The source of a class or module; empty if it is not to be had."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
