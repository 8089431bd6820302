"""Fixtures around `hub_client`, as a plugin: one Hub for all modules that name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.hub_client import BASE, World
from tests.hub_server import Hub


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    with closing(Hub()) as hub:
        yield hub


@pytest.fixture
def world(hub: Hub, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A Hub that holds a base model; the settings of its client point to it until the test ends."""
    base = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    base["README.md"] = b"---\nlicense: apache-2.0\ntags: [theirs]\n---\n# The base model\n"
    commit = hub.repos[BASE].refs["main"] if BASE in hub.repos else hub.add(BASE, base)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # The client tries again for half a minute before it gives up.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    world = World(hub, base, commit, here, monkeypatch)
    world.log_in("hf_ada")
    world.elsewhere()
    return world


@pytest.fixture
def untouched(world: World) -> Iterator[None]:
    """The test leaves no file where it works, and changes nothing on the Hub by a request."""
    with world.hub.recording() as requests:
        yield
    assert list(world.here.iterdir()) == []
    assert not [request for request in requests if request.startswith(("POST", "PUT"))]
