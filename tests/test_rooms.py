"""Imports between the modules and packages of `hf_sparse` run one way."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import hf_sparse

ROOT = Path(hf_sparse.__file__).parent
ROOMS = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}


def imported(path: Path) -> set[str]:
    """The full names of what a file imports from the package, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "hf_sparse"}


def arrows() -> dict[str, set[str]]:
    """For each module and package of the root, those that it imports; the root itself imports what it offers."""
    graph: dict[str, set[str]] = {room: set() for room in ROOMS - {"__init__"}}
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room != "__init__":
            # `import hf_sparse` and `from hf_sparse import patch` stand for what patches.
            parts = [[*name.split("."), "patching"][1] for name in imported(path)]
            graph[room] |= {part if part in graph else "patching" for part in parts} - {room}
    return graph


def test_no_room_imports_what_imports_it() -> None:
    order = list(TopologicalSorter(arrows()).static_order())
    assert order.index("config") < order.index("patching") < order.index("share")


def test_patching_needs_nothing_that_sits_on_top() -> None:
    graph, needed, waiting = arrows(), set(), ["patching"]
    while waiting:
        new = graph[waiting.pop()] - needed
        needed |= new
        waiting += new
    assert {"config", "attention", "engines", "selectors"} <= needed
    assert needed.isdisjoint({"calibration", "measure", "lab", "bench", "share", "cli"})


def test_no_engine_imports_another() -> None:
    shared = {"hf_sparse.engines.base", "hf_sparse.engines.common"}
    engines = [path for path in (ROOT / "engines").glob("*.py") if path.stem not in {"__init__", "base", "common"}]
    assert len(engines) >= 5
    for path in engines:
        own = {name.rsplit(".", 1)[0] for name in imported(path) if name.startswith("hf_sparse.engines")}
        assert own <= shared, path.name
