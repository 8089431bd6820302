"""Settings for every test: one thread, repeatable property tests, quiet libraries; a small model, and a Hub."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from filelock import FileLock

# Without a GPU, Triton interprets its kernels. It reads this when it is imported, which hf_sparse's imports do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

from tests import small  # noqa: E402 - imports Triton
from tests.hub_client import BASE, World  # noqa: E402
from tests.hub_server import Hub  # noqa: E402
from tests.installed import MadeOnce  # noqa: E402
from tests.interpreted import patch_language_once  # noqa: E402

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

transformers.logging.set_verbosity_error()

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    patch_language_once()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `tiny-llama` of a small model with its tokenizer; not to be changed."""
    return small.save_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """A folder that a function fills, for all processes that run tests: what takes long is made once."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            folder = root / name
            if not folder.exists():
                part = root / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                make(part)
                part.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def compiled_at(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for kernels that tests compile, which says by itself what is up to date; kept for the next run."""
    kept = getattr(request.config, "cache", None)  # not there with -p no:cacheprovider
    return tmp_path_factory.getbasetemp() / "compiled" if kept is None else kept.mkdir("compiled")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    with closing(Hub()) as hub:
        yield hub


@pytest.fixture
def world(hub: Hub, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A Hub that holds a base model; the settings of its client point to it until the test ends."""
    base = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    base["README.md"] = b"---\nlicense: apache-2.0\ntags: [theirs]\n---\n# The base model\n"
    base["config.json"] = json.dumps(json.loads(base["config.json"])).encode()  # as transformers would not write it
    commit = hub.repos[BASE].refs["main"] if BASE in hub.repos else hub.add(BASE, base)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
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
