"""`sparse_config.json` on disk and on the Hub: read strictly, within bounds, and written readably."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import hf_hub_download

from hf_sparse.config.config import SparseAttentionConfig
from hf_sparse.config.hub_io import hub_errors
from hf_sparse.config.origin import Origin, is_hub_id
from hf_sparse.config.policy import Policy
from hf_sparse.engines import AUTO, ENGINES
from hf_sparse.errors import UserError
from hf_sparse.laws import LAWS
from hf_sparse.results import write_whole
from hf_sparse.schema import describe, shown
from hf_sparse.selectors import SELECTORS

NAME = "sparse_config.json"
"""The name of the file in a folder or repository."""

MAX_BYTES = 4 << 20
"""A larger file is not read: a law for each of 100,000 heads takes less."""

MAX_DEPTH = 20
"""Lists and objects inside one another."""

_BUILT_IN = {"law": LAWS, "selector": SELECTORS, "engine": (AUTO, *ENGINES)}
_INNERMOST = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s*\]")
_BETWEEN = re.compile(r",\n\s+")
# An error is one line, whatever a hostile file holds.
_LONGEST_ERROR = 400


def load(name_or_path: str | os.PathLike[str], *, revision: str | None = None, **hub_options: Any) -> Policy:
    """Read the policy of a folder, a file, or a repository on the Hub.

    Args:
        name_or_path: A folder that holds a `sparse_config.json`, such a file, or a Hub id. What exists here goes
            before the Hub.
        revision: Commit, branch or tag on the Hub.
        **hub_options: `token`, `cache_dir`, `force_download` and `local_files_only`, as in `huggingface_hub`.

    Raises:
        UserError: (a `ValueError`) if there is none, it is out of reach, something in it is wrong, or a `revision` is
            asked of a file.
        TypeError: if `name_or_path` is not a name.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"a policy is named by a Hub id, a folder or a file; got {shown(name_or_path)}")
    name = os.fspath(name_or_path)
    if not name:
        raise UserError("'' is not a policy: pass a Hub id, a folder or a file")
    path = Path(name).expanduser()
    try:
        is_here = path.exists()
    except OSError as error:
        raise UserError(f"cannot read {shown(name)}: {error.strerror}") from error
    if revision is not None and is_here:
        raise UserError(f"{name} is here, not on the Hub: it has no revision {revision!r}")
    if path.is_dir():
        path = path / NAME
        if not path.is_file():
            raise UserError(f"{name} holds no {NAME}")
    if path.is_file():
        return replace(read(path), origin=Origin(str(path.parent.absolute())))
    if is_here or not is_hub_id(name) or name.endswith(".json"):
        raise UserError(f"{shown(name)} is not a policy: pass a Hub id, a folder that holds a {NAME}, or such a file")
    with hub_errors(f"cannot read {NAME} of {name}" + (f" at {revision}" if revision else "")):
        found = hf_hub_download(name, NAME, revision=revision, dry_run=True, **hub_options)
        if found.file_size is None:
            raise UserError(f"cannot read {NAME} of {name}: the Hub does not say how large it is")
        _check_size(f"{name}/{NAME}", found.file_size)
        # By the revision as it was given, so that the cache learns what it stands for.
        downloaded = Path(hf_hub_download(name, NAME, revision=revision, **hub_options))
    return replace(read(downloaded, f"{name}/{NAME}"), origin=Origin(name, downloaded.parent.name))


def read(path: Path, name: str | None = None) -> Policy:
    """The policy in a file.

    Args:
        path: The file.
        name: What to call it in errors; its path if `None`.

    Raises:
        UserError: (a `ValueError`) that names the file and what is wrong in it.
    """
    name = name or str(path)
    try:
        _check_size(name, path.stat().st_size)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error
    _check_size(name, len(data))
    try:
        return Policy.from_dict(_policy_in(_parse(data)))
    except ValueError as error:
        said = str(error)
        raise UserError(f"{name}: {said if len(said) <= _LONGEST_ERROR else said[:_LONGEST_ERROR] + '...'}") from error


def write(policy: Policy, path: Path) -> None:
    """Write a policy, all or nothing: indented JSON with lists of numbers and names on one line.

    Raises:
        UserError: if the policy holds code, which no file can, or the file cannot be written.
    """
    check_no_code(policy.config)
    text = json.dumps(policy.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
    text = _INNERMOST.sub(lambda found: "[" + _BETWEEN.sub(", ", found[1]) + "]", text)
    write_whole(path, f"{text}\n".encode())


def check_no_code(config: SparseAttentionConfig) -> None:
    """Refuse a configuration with a selector, an engine or a law of the user's own.

    Raises:
        UserError: naming the field and what may be published instead.
    """
    for field, part in config.code.items():
        raise UserError(_is_code(field, describe(part)["name"]))


def _is_code(field: str, name: str) -> str:
    allowed = ", ".join(_BUILT_IN[field])
    return f"{field} {shown(name)} is code of your own and cannot be published in {NAME}: publish one of {allowed}"


def _check_size(name: str, size: int) -> None:
    if size > MAX_BYTES:
        raise UserError(f"{name} must be at most {MAX_BYTES:,} bytes; it has {size:,} or more")


def _parse(data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"it must be nested at most {MAX_DEPTH} deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it must be UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it must be JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"it must hold a JSON object; got {type(parsed).__name__}")
    level: list[Any] = [parsed]
    for _ in range(MAX_DEPTH):
        children = [child for outer in level for child in (outer.values() if isinstance(outer, dict) else outer)]
        level = [child for child in children if isinstance(child, dict | list)]
    if level:
        raise ValueError(f"it must be nested at most {MAX_DEPTH} deep")
    for field in _BUILT_IN:
        # As results name what they measured.
        if isinstance(parsed.get(field), dict) and isinstance(parsed[field].get("name"), str):
            raise ValueError(_is_code(field, parsed[field]["name"]))
    return parsed


def _policy_in(parsed: dict[str, Any]) -> dict[str, Any]:
    """`parsed`, unless all of it is unknown: it describes something else then, and no default is to stand for it."""
    known = {"calibration", *Policy().to_dict()}  # A policy without a calibration leaves it out.
    if parsed and not parsed.keys() & known:
        raise ValueError(f"it must be a policy; none of its fields is one of a {NAME}")
    return parsed


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"numbers must be finite; got {constant}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"each key must stand once; got {name!r} {count} times")
    return out
