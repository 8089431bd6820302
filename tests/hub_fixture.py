"""The world of `hub_world` as a fixture: one for all modules that name this plugin, as it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import small
from tests.hub_client import Client
from tests.hub_server import Hub
from tests.hub_world import BASE, CARD, World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """All of it, started; what it writes is in the folder beside the base model."""
    folder = tmp_path_factory.mktemp("hub")
    base = small.save_model(folder / "base")
    (base / "README.md").write_bytes(CARD)
    with Hub() as hub, Client(hub.url, folder / "writer") as writer, Client(hub.url, folder / "reader") as reader:
        commit = hub.add(BASE, {file.name: file.read_bytes() for file in base.iterdir()})
        yield World(hub, writer, reader, commit, base)
