"""Checks of single values, for the dataclasses that come out of files: every error names field, value and allowed."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

_PATH = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|(.*[/\\])?\.\.([/\\]|$)")
_MOST_NAMED = 10
_MOST_SHOWN = 80
# What fits into a tensor's index everywhere.
_LARGEST = 2**31 - 1
# Control characters, and halves of surrogate pairs, which no file can hold.
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]")


def shown(value: Any) -> str:
    """`repr(value)`, cut where an error would no longer be one line."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    optional: bool = False,
) -> None:
    """Refuse anything but a finite number within the bounds, or `None` where the value is optional."""
    if value is None and optional:
        return
    bounds = [f"above {above:g}"] if above is not None else []
    bounds += [f"at least {least:g}"] if least is not None else []
    bounds += [f"at most {most:g}"] if most is not None else []
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and _is_finite(value)
        and (above is None or value > above)
        and (least is None or value >= least)
        and (most is None or value <= most)
    )
    if not inside:
        raise ValueError(f"{name} must be a finite number {' and '.join(bounds)}".rstrip() + f"; got {shown(value)}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def check_integer(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    """Refuse anything but a whole number from `least` to 2^31 - 1, or `None` where the value is optional."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        limit = f" and at most {_LARGEST:,}" if isinstance(value, int) and value > _LARGEST else ""
        raise ValueError(f"{name} must be a whole number, at least {least}{limit}; got {shown(value)}")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse anything but one of the names in `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}")


def check_text(name: str, value: Any, *, longest: int = 500) -> None:
    """Refuse anything but one line of at most `longest` characters; the empty one is allowed."""
    if not isinstance(value, str) or len(value) > longest or _CONTROL.search(value):
        raise ValueError(f"{name} must be one line of text, at most {longest} characters; got {shown(value)}")


def check_name(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse a path of a machine, absolute or relative to a folder above, and anything but one line of text.

    Args:
        name: The field.
        value: Its value.
        optional: Whether `None` is how the field is left out; the empty name, otherwise, is refused then.
    """
    if value is None and optional:
        return
    check_text(name, value)
    if not value and optional:
        raise ValueError(f"{name} must be a name, or left out; got ''")
    if _PATH.match(value):
        raise ValueError(f"{name} must be a name, not a path of a machine; got {shown(value)}")


def check_mapping(name: str, value: Any) -> None:
    """Refuse anything but a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping; got {shown(value)}")


def check_names(name: str, value: Any) -> tuple[str, ...]:
    """`value` as a tuple, refused unless it is a sequence of names."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of names; got {shown(value)}")
    out = tuple(value)
    for i, item in enumerate(out):
        check_name(f"{name}[{i}]", item)
    return out


def check_versions(name: str, value: Any) -> dict[str, str]:
    """`value` as a dictionary, refused unless it maps names of packages to versions."""
    check_mapping(name, value)
    for package, version in value.items():
        check_name(f"{name} package", package)
        check_text(f"{name}[{package!r}]", version)
    return dict(value)


def check_extra(name: str, value: Any, known: Iterable[str]) -> dict[str, Any]:
    """`value` as a dictionary, refused unless it is JSON without the keys in `known`."""
    check_mapping(name, value)
    taken = sorted(set(value) & set(known))
    if taken:
        raise ValueError(f"{name} must not hold the names of fields; got {', '.join(taken)}")
    try:
        encoded = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be what JSON can hold; got {shown(value)}: {error}") from None
    return dict(encoded)


def split_unknown(what: str, data: Mapping[str, Any], known: Iterable[str], version: int) -> dict[str, Any]:
    """What of `data` this release does not know, with a warning: keys of a newer release, and its schema version.

    Args:
        what: What `data` describes, for the warning.
        data: From a file.
        known: The keys that this release knows, besides `"schema_version"`.
        version: The schema that this release writes.

    Raises:
        ValueError: if the schema version is not a whole number.
    """
    check_mapping(what, data)
    theirs = data.get("schema_version", version)
    check_integer(f"{what} schema_version", theirs, least=1)
    unknown = {name: data[name] for name in sorted(set(data) - set(known) - {"schema_version"})}
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
    return unknown | ({"schema_version": theirs} if theirs > version else {})
