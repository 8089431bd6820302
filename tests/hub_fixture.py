"""Fixtures around `hub_client`, as a plugin: one world for all modules that name it, as it takes seconds to start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_client import BASE, CARD, Client, World
from tests.hub_server import Hub


@pytest.fixture(scope="session")
def world(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """All of it, started; what it writes is in the folder beside the base model."""
    folder = tmp_path_factory.mktemp("hub")
    base = Path(shutil.copytree(tiny_llama, folder / "base"))
    (base / "README.md").write_bytes(CARD)
    with Hub() as hub, Client(hub.url, folder / "writer") as writer, Client(hub.url, folder / "reader") as reader:
        commit = hub.add(BASE, {file.name: file.read_bytes() for file in base.iterdir()})
        yield World(hub, writer, reader, commit, base)


@pytest.fixture
def untouched(world: World) -> Iterator[None]:
    """The test adds no file but to caches, and changes nothing on the Hub by a request."""
    before = _files(world)
    start = len(world.hub.requests)
    yield
    assert _files(world) == before
    assert not [request for request in world.hub.requests[start:] if request.split()[0] in ("POST", "PUT")]


def _files(world: World) -> dict[str, int]:
    out: dict[str, int] = {}
    for folder, folders, files in os.walk(world.folder.parent):
        folders[:] = [name for name in folders if name != "cache"]
        found = [Path(folder, name) for name in files + folders]
        out |= {str(path): path.lstat().st_size for path in found}
    return out
