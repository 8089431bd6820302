"""Parts that users write themselves, a selector, an engine or a law: how results name them, and how files name them."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from hf_sparse.errors import UserError, first_line
from hf_sparse.schema.checks import shown

T = TypeVar("T")


def describe(part: Any) -> dict[str, Any]:
    """What a JSON record says of a part that is code: its name, class, fields, and the SHA-256 of its source.

    Args:
        part: An instance of a class, or a function.

    Returns:
        `name`, `class`, `fields` (of a dataclass, values as text), and `source_sha256` (`None` without source).
    """
    kind = part if inspect.isroutine(part) else type(part)
    try:
        source = hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):
        source = None
    return {
        "name": str(getattr(part, "name", None) or getattr(part, "__name__", kind.__name__)),
        "class": kind.__qualname__,
        "fields": {f.name: repr(getattr(part, f.name)) for f in fields(part)} if is_dataclass(part) else {},
        "source_sha256": source,
    }


def load(text: str, kind: type[T], what: str) -> T:
    """An instance of the class that `"path/to/file.py:ClassName"` names.

    Args:
        text: The file and the class in it, which is called without arguments.
        kind: What the instance must be.
        what: What it is for, for errors: `"selector"`.

    Raises:
        UserError: If there is no such file or class, running the file fails, or the instance is something else.
    """
    path, _, name = text.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{what} {text!r}: there is no file {path!r}")
    try:
        made: Any = getattr(_module(file), name)
        part = made() if isinstance(made, type) else made
    except AttributeError:
        raise UserError(f"{what} {text!r}: {path} defines no {name!r}") from None
    except Exception as error:  # whatever a user's file raises
        raise UserError(f"{what} {text!r}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(part, kind):
        raise UserError(f"{what} {text!r} must be a {kind.__module__.split('.')[0]}.{kind.__name__}; got {shown(part)}")
    return part


def _module(file: Path) -> ModuleType:
    """A file as a module, run once for each content that it has."""
    digest = hashlib.sha256(str(file.resolve()).encode() + file.read_bytes()).hexdigest()[:16]
    name = f"hf_sparse_custom_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module that defines them.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
