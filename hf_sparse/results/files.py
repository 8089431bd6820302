"""Files that are written whole, where they can be written, and read only where they seem to be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hf_sparse.errors import UserError, first_line


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, all or nothing; a link that is there is replaced, not followed.

    Raises:
        UserError: naming the file, if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        part = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            part.chmod(0o644)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or first_line(error)}") from error


def check_writable(folder: Path, files: Iterable[str] = ()) -> None:
    """Refuse a folder that cannot be made or written to, by trying it; nothing of that is left.

    Args:
        folder: Made and removed again if it is not there.
        files: Names that files in it will have.

    Raises:
        UserError: naming the folder or file, and what is in the way.
    """
    missing: list[Path] = []
    try:
        missing += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        taken = next((folder / name for name in files if (folder / name).is_dir()), None)
    except OSError as error:
        why = error.strerror or first_line(error)
        with suppress(OSError):
            why = next((f"{path} is a file" for path in (folder, *folder.parents) if path.is_file()), why)
        raise UserError(f"cannot write to the folder {folder}: {why}; name another one") from error
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
    if taken is not None:
        raise UserError(f"cannot write {taken}: it is a folder; remove it, or name another place")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, which seems to lie in `folder`, is a link to somewhere else.

    In the cache of huggingface_hub, the files of a snapshot are links to blobs beside it: they do lie there.
    """
    found, root = path.resolve(), folder.resolve()
    if found.is_relative_to(root):
        return False
    blobs = next((parent.parent / "blobs" for parent in (root, *root.parents) if parent.name == "snapshots"), None)
    return blobs is None or not found.is_relative_to(blobs)


def inside(path: Path, folder: Path) -> Path:
    """`path`, refused if it is a link that leads out of `folder`: what is published must not come from elsewhere.

    Raises:
        UserError: naming both.
    """
    if leads_out(path, folder):
        raise UserError(f"{path} is a link that leads out of {folder}: put the file itself there")
    return path
