"""Fixtures around `hub_client`, as a plugin: one world for all modules that name it, as it takes seconds to start."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.hub_client import BASE, Client, World
from tests.hub_server import Hub


@pytest.fixture(scope="session")
def world(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """All of it, started; what it writes is in the folder beside the base model."""
    folder = tmp_path_factory.mktemp("hub")
    base = Path(shutil.copytree(tiny_llama, folder / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [theirs]\n---\n# The base model\n")
    with closing(Hub()) as hub:
        writer, reader = Client(hub.url, folder / "writer"), Client(hub.url, folder / "reader")
        with writer.pool, reader.pool:
            commit = hub.add(BASE, {file.name: file.read_bytes() for file in base.iterdir()})
            yield World(hub, writer, reader, commit, base)


@pytest.fixture
def untouched(world: World) -> Iterator[None]:
    """The test adds no file but to caches, and changes nothing on the Hub by a request."""
    before = _files(world)
    with world.hub.recording() as requests:
        yield
    assert _files(world) == before
    assert not [request for request in requests if request.startswith(("POST", "PUT"))]


def _files(world: World) -> dict[str, int]:
    found = [path for path in world.folder.parent.rglob("*") if "cache" not in path.parts]
    return {str(path): path.lstat().st_size for path in found}
