"""Private names of other packages: the page `model_cards/versions` lists those that the code uses, and they exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import cache_utils, configuration_utils, masking_utils, modeling_utils
from transformers.generation import utils as generation_utils

import hf_sparse

ROOT = Path(hf_sparse.__file__).parent
PAGE = ROOT.parent / "model_cards/versions/README.md"
TABLE = PAGE.read_text(encoding="utf-8").partition("## Private names")[2]
LISTED = sorted(set(re.findall(r"`((?:transformers|torch|lm_eval)\.[\w.<>]+)`", TABLE)))

# Looked for with a default.
OPTIONAL = {"transformers.cache_utils.DummyLayer"}

# What a private name that the code uses may be one of, though something of ours has the same name.
MODULES = (cache_utils, configuration_utils, generation_utils, masking_utils, modeling_utils)
THEIRS = {word for module in MODULES for word in re.findall(r"\b_[a-z]\w+", inspect.getsource(module))}
THEIRS |= {name for name in dir(torch.Tensor) if re.match(r"_[a-z]", name)}


def borrowed(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """What a file uses of other packages that is private or undocumented: full names, or the last part of one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and re.match(r"_[A-Za-z]", node.attr):
            receiver = node.value.id if isinstance(node.value, ast.Name) else ""
            ours = node.attr in own and (receiver in ("self", "cls") or node.attr not in THEIRS)
            if not ours and receiver not in sys.stdlib_module_names:
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_name_of_theirs(node.value):
            yield node.value


def is_private(name: str) -> bool:
    """Whether an imported name is a module or lies below the root of transformers, or has a part that begins with _."""
    package, *parts = name.split(".")
    if package == "transformers":
        return len(parts) != 1 or isinstance(getattr(transformers, parts[0]), ModuleType)
    return package != "__future__" and any(part.startswith("_") for part in parts) and package != "hf_sparse"


def is_name_of_theirs(text: str) -> bool:
    """Whether a string names something of transformers, to be looked up or looked for in its sources."""
    if re.fullmatch(r"transformers(\.\w+)+|\w+\.<locals>\.\w+", text) or text in THEIRS:
        return True
    theirs = (getattr(getattr(module, text, None), "__module__", None) == module.__name__ for module in MODULES)
    return any(theirs) and not hasattr(transformers, text)


def defined(node: ast.AST) -> Iterator[str]:
    """The name that a piece of code gives to something."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id


def used() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")]
    own = {name for tree in trees for node in ast.walk(tree) for name in defined(node)}
    return {name for tree in trees for name in borrowed(tree, own)}


def stands_for(name: str, listed: str) -> bool:
    return f".{name}." in f".{listed}."


def test_the_page_lists_all_that_the_code_uses_and_nothing_else() -> None:
    names = used()
    assert len(names) > 30
    assert {name for name in names if not any(stands_for(name, listed) for listed in LISTED)} == set()
    assert {listed for listed in LISTED if not any(stands_for(name, listed) for name in names)} == set()


@pytest.mark.parametrize(
    "code",
    [
        "import transformers.cache_utils",
        "from transformers import masking_utils",
        "from transformers.masking_utils import causal_mask_function",
        "from torch._dynamo import explain",
        "model._prefill(ids)",
        "torch.x._never_heard_of",
        "getattr(model, '_supports_default_dynamic_cache')",
        "NAMES = ('create_causal_mask',)",
        "NAME = 'and_masks.<locals>.and_mask'",
    ],
)
def test_what_is_borrowed_is_found(code: str) -> None:
    assert list(borrowed(ast.parse(code), own={"_prefill"}))


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import Cache",
        "from hf_sparse._x import y",
        "self._prefill()",
        "ours._own()",
        "hashlib._Hash",
        "NAME = '_own'",
        "NAME = 'Cache'",
    ],
)
def test_what_is_not_borrowed_is_left_alone(code: str) -> None:
    assert not list(borrowed(ast.parse(code), own={"_prefill", "_own"}))


@pytest.mark.parametrize("name", LISTED)
def test_listed_names_are_there(name: str) -> None:
    package = pytest.importorskip(name.split(".")[0])
    assert name in OPTIONAL or is_there(package, name.split(".")[1:])


def is_there(thing: Any, parts: list[str]) -> bool:
    """Whether attributes lead from one to the other; the last one may also be given to instances alone."""
    for i, part in enumerate(parts):
        if part == "<locals>":
            return any(isinstance(it, CodeType) and it.co_name == parts[i + 1] for it in thing.__code__.co_consts)
        if isinstance(thing, ModuleType) and not hasattr(thing, part):
            importlib.import_module(f"{thing.__name__}.{part}")
        if not hasattr(thing, part):
            return i + 1 == len(parts) and part in re.findall(r"\w+", inspect.getsource(inspect.getmodule(thing)))
        thing = getattr(thing, part)
    return True
