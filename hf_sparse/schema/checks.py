"""Checks of single values, for the dataclasses that come out of files: every error names field, value and allowed."""

from __future__ import annotations

import json
import math
import operator
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache, partial
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

_PATH = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|(.*[/\\])?\.\.([/\\]|$)")
_MOST_NAMED = 10
_MOST_SHOWN = 80
# What fits into a tensor's index everywhere.
_LARGEST = 2**31 - 1
# Control characters, and halves of surrogate pairs, which no file can hold.
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]")

Check = Callable[[str, Any], Any]
"""Gives the value to keep for a field's name and value, or raises a `ValueError` that says what is allowed."""


def fields(record: Any) -> None:
    """Check the fields of a frozen dataclass whose types are annotated with a `Check`.

    Each is replaced by what its check gives. `None` is left as it is where the type allows it.
    """
    for name, (check, optional) in _checks_of(record.__class__).items():
        value = getattr(record, name)
        if value is not None or not optional:
            object.__setattr__(record, name, check(name, value))


@cache
def _checks_of(kind: Any) -> dict[str, tuple[Check, bool]]:
    """Field -> its check, and whether `None` is allowed."""
    return {
        name: (option.__metadata__[0], NoneType in get_args(hint))
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for option in (hint, *get_args(hint))
        if get_origin(option) is Annotated
    }


def require(holds: Any, field: str, value: Any, allowed: str) -> Any:
    """`value`, refused unless it `holds`.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if not holds:
        raise ValueError(f"{field} must be {allowed}; got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """`repr(value)`, cut where an error would no longer be one line."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def number(
    field: str, value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> Any:
    """Refuse anything but a finite number within the bounds."""
    bounds = [("above", operator.gt, above), ("at least", operator.ge, least), ("at most", operator.le, most)]
    given = [(word, inside, bound) for word, inside, bound in bounds if bound is not None]
    allowed = " and ".join(f"{word} {bound:g}" for word, _, bound in given)
    holds = _is_finite(value) and all(inside(value, bound) for _, inside, bound in given)
    return require(holds, field, value, f"a finite number {allowed}".rstrip())


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def integer(field: str, value: Any, *, least: int) -> Any:
    """Refuse anything but a whole number from `least` to 2^31 - 1."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    limit = f" and at most {_LARGEST:,}" if whole and value > _LARGEST else ""
    return require(whole and least <= value <= _LARGEST, field, value, f"a whole number, at least {least}{limit}")


def flag(field: str, value: Any) -> Any:
    """Refuse anything but a bool."""
    return require(isinstance(value, bool), field, value, "true or false")


def choice(field: str, value: Any, *, allowed: Collection[str]) -> Any:
    """Refuse anything but one of the names in `allowed`."""
    return require(value in tuple(allowed), field, value, f"one of {', '.join(allowed)}")


def text(field: str, value: Any, *, longest: int = 500) -> Any:
    """Refuse anything but one line of at most `longest` characters; the empty one is allowed."""
    holds = isinstance(value, str) and len(value) <= longest and not _CONTROL.search(value)
    return require(holds, field, value, f"one line of text, at most {longest} characters")


def name(field: str, value: Any) -> Any:
    """Refuse a path of a machine, absolute or relative to a folder above, and anything but one line of text."""
    return require(not _PATH.match(text(field, value)), field, value, "a name, not a path of a machine")


def given_name(field: str, value: Any) -> Any:
    """The same for a field that `None` leaves out: an empty name does not."""
    return name(field, require(value != "", field, value, "a name, or left out"))


def mapping(field: str, value: Any) -> Any:
    """Refuse anything but a mapping."""
    return require(isinstance(value, Mapping), field, value, "a mapping")


def sequence(field: str, value: Any, *, of: str, length: int | None = None) -> tuple[Any, ...]:
    """`value` as a tuple, refused unless it is an iterable, of `length` items if given; `of` is what is allowed."""
    out = None
    if not isinstance(value, str | bytes | Mapping):
        with suppress(TypeError):
            out = tuple(value)
    require(out is not None and length in (None, len(out)), field, value, of)
    return out or ()


def names(field: str, value: Any) -> tuple[str, ...]:
    """`value` as a tuple, refused unless it is a sequence of names."""
    items = sequence(field, value, of="a list of names")
    return tuple(name(f"{field}[{i}]", item) for i, item in enumerate(items))


def layers(field: str, value: Any, *, check: Check) -> dict[int, Any]:
    """`value` by layer index, which JSON makes a string; each item goes through `check`."""
    out: dict[int, Any] = {}
    for key, item in mapping(field, value).items():
        layer = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        integer(f"{field} layer", layer, least=0)
        if layer in out:
            raise ValueError(f"{field} must name each layer once; got layer {layer} twice")
        out[layer] = check(f"{field}[{layer}]", item)
    return out


def versions(field: str, value: Any) -> dict[str, str]:
    """`value` as a dictionary, refused unless it maps names of packages to versions."""
    return {
        name(f"{field} package", package): text(f"{field}[{package!r}]", version)
        for package, version in mapping(field, value).items()
    }


def extra(field: str, value: Any, known: Collection[str]) -> dict[str, Any]:
    """`value` as a dictionary, refused unless it is JSON without the keys in `known`."""
    taken = sorted(set(mapping(field, value)) & set(known))
    if taken:
        raise ValueError(f"{field} must not hold the names of fields; got {', '.join(taken)}")
    try:
        return dict(json.loads(json.dumps(dict(value), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{field} must be what JSON can hold; got {shown(value)}: {error}") from None


# Types of fields with their checks, for `fields`.
Count = Annotated[int, partial(integer, least=0)]
PositiveCount = Annotated[int, partial(integer, least=1)]
Number = Annotated[float, number]
PositiveNumber = Annotated[float, partial(number, above=0.0)]
Share = Annotated[float, partial(number, least=0.0, most=1.0)]
Flag = Annotated[bool, flag]
ShortText = Annotated[str, partial(text, longest=100)]
Name = Annotated[str, name]
GivenName = Annotated[str, given_name]
Names = Annotated[tuple[str, ...], names]
Versions = Annotated[Mapping[str, str], versions]


def as_json(value: Any) -> Any:
    """`value` with lists for tuples and strings for the keys of mappings, as JSON gives them back."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, tuple | list) else value


def split_unknown(
    what: str, data: Mapping[str, Any], known: Collection[str], version: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of `data` this release knows, and what it does not: keys of a newer release, and its schema version.

    The latter comes with a warning.

    Args:
        what: What `data` describes, for the warning.
        data: From a file.
        known: The keys that this release knows, besides `"schema_version"`.
        version: The schema that this release writes.

    Raises:
        ValueError: if the schema version is not a whole number.
    """
    theirs = integer(f"{what} schema_version", mapping(what, data).get("schema_version", version), least=1)
    given = {name: value for name, value in data.items() if name in known}
    unknown = {name: data[name] for name in sorted(set(data) - set(given) - {"schema_version"})}
    if unknown:
        names = [name if name.isidentifier() and len(name) <= _MOST_SHOWN else shown(name) for name in unknown]
        named = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        warnings.warn(
            f"{what} has fields this release does not know and keeps as they are: {named} "
            f"(schema {theirs}, this release reads {version})",
            UserWarning,
            stacklevel=4,
        )
    # A newer file stays one when it is written again.
    return given, unknown | ({"schema_version": theirs} if theirs > version else {})
