"""Files that are written whole, and read only where they seem to be."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hf_sparse.errors import UserError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, all or nothing; a link that is there is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        part.write(data)
    Path(part.name).chmod(0o644)
    Path(part.name).replace(path)


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
