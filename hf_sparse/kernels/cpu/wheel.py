"""Wheels with compiled kernels, where there is a C++ compiler: `pyproject.toml` names this command of setuptools.

setuptools loads this file by itself, where the package cannot be imported yet.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel

KERNELS = "hf_sparse/kernels/cpu"
compiler = runpy.run_path(str(Path(__file__).parent / "compiler.py"))


class Wheel(bdist_wheel):  # type: ignore[misc]
    """A wheel for this platform, with one library for all its CPUs; or for any, to be compiled on first use."""

    def run(self) -> None:
        """Compile beside the copied sources, then pack."""
        self.run_command("build")
        folder = Path(self.get_finalized_command("build").build_lib) / KERNELS
        for old in folder.glob("*.so"):
            old.unlink()
        try:
            command = compiler["find_compiler"]()
            every = compiler["targets"]().items()
            known = {name: flags for name, flags in every if compiler["knows"](command, flags)}
            compiler["compile_library"](command, folder, known, folder / compiler["library_name"](folder))
            self.announce(f"compiled kernels for {', '.join(known)}", level=2)
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # installs at the wheel's root
        except compiler["UnavailableError"] as reason:
            self.announce(f"kernels will be compiled on first use: {reason}", level=3)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3: the library knows nothing of Python."""
        return "py3", "none", super().get_tag()[2]
