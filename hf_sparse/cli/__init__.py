"""The command `hf-sparse`, one module for each command that is more than a few lines."""

from hf_sparse.cli.app import main

__all__ = ["main"]
