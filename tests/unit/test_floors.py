"""Imports point downward only, and what has to stay light imports no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.config import ROOT, STAGES

# floors from the ground up; a module may import its own floor, where it is one package, and those below
FLOORS = (
    ("stages", "stages.config", "stages.files", "stages.context", "stages.events"),
    ("stages.memory",),
    ("stages.canvas",),
    ("stages.models",),  # a denoiser answers the canvas' questions (``TileBatch``)
    ("stages.workflow",),
    (*(f"stages.{name}" for name in STAGES), "stages.profile", "stages.sampling", "stages.__main__"),
    ("runner",),
)


def house(module: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    entries = [one for floor in FLOORS for one in floor if one != "stages"]
    return next((one for one in entries if module == one or module.startswith(f"{one}.")), "stages")


def level(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if house(module) in floor)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "stages").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path
    yield "runner", ROOT / "runner.py"


def imported(path: Path) -> set[str]:
    """Modules of this project that a file names in an import, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {one for one in below if (ROOT / Path(*one.split("."))).with_suffix(".py").is_file()}
            found |= inside or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {one for one in found if one.split(".")[0] in ("stages", "runner", "tests", "benchmarks", "training")}


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_imports_point_downward(module: str, path: Path) -> None:
    for other in imported(path):
        assert other.split(".")[0] == "stages", f"{module} imports {other}"
        assert level(other) <= level(module), f"{module} imports {other}, which lies above it"


def test_every_module_has_a_floor() -> None:
    known = {one for floor in FLOORS for one in floor}
    assert {house(name) for name, _ in modules()} <= known
    assert level("stages.tiles") == 2 and level("stages.memory.disk") == 1 and level("stages.decode") == 5
