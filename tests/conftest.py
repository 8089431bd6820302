"""Settings for every test: one thread each, repeatable property tests, quiet libraries."""

from __future__ import annotations

import os
from pathlib import Path

# No test may depend on what the network says. huggingface_hub reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
import transformers

# Without a GPU, Triton interprets its kernels. It reads this when it is imported, which hf_sparse's imports do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests run side by side, one process a core: more threads would only fight over the same cores.
torch.set_num_threads(1)

from tests import small  # noqa: E402 - imports Triton

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

transformers.logging.set_verbosity_error()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real: needs pretrained weights that are installed as a package")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `tiny-llama` of a small model with its tokenizer; not to be changed."""
    return small.save_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
