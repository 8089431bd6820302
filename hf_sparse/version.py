"""The release: what packages, policies and results say, and pyproject.toml reads."""

__version__ = "0.2.0"
