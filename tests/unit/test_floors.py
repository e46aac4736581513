"""Imports point downward only, and what has to stay light imports no torch: as ``docs/architecture.md`` says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from sources import ROOT, imported, way_to_torch

STATEMENT = ROOT / "docs" / "architecture.md"
PACKAGES = ("stages", "runner", "tests", "benchmarks", "training")
_LINE = re.compile(r"(?P<names>\S+(?: \S+)*) {2,}(?P<text>\S.*)")
MODULES = sorted([*(ROOT / "stages").rglob("*.py"), ROOT / "runner.py"])


class Line(NamedTuple):
    """One line of the statement: the files and folders that it stands for, and what it says of them."""

    paths: tuple[Path, ...]
    text: str


def _path(name: str) -> Path:
    return ROOT / name if name == "runner.py" else ROOT / "stages" / name


def statement() -> list[Line]:
    """The lines from the ground up."""
    block = STATEMENT.read_text(encoding="utf-8").split("```")[1].strip()
    found = [_LINE.fullmatch(line) for line in block.splitlines()]
    assert all(found), f"{STATEMENT}: a line of the house is not 'NAMES  what they do'"
    return [Line(tuple(map(_path, one["names"].split())), one["text"]) for one in reversed(found) if one]


LINES = statement()


def floor(module: Path) -> int | None:
    """The number of the line that a file stands in: its own, else its folder's."""
    for path in (module, *module.parents):
        for number, line in enumerate(LINES):
            if path in line.paths:
                return number
    return None


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module(name: str) -> Path:
    path = ROOT / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_every_module_has_a_floor_and_imports_point_downward(path: Path) -> None:
    own = floor(path)
    assert own is not None, f"{_name(path)} has no line in {_name(STATEMENT)}: put it above what it imports"
    ours = {one for one in imported(path) if one.split(".")[0] in PACKAGES}
    for other in map(_module, ours):
        above = floor(other)
        assert above is not None, f"{_name(path)} imports {_name(other)}, which is no part of the house"
        assert above <= own, f"{_name(path)} imports {_name(other)}, which lies above it"


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.paths[0].name)
def test_every_line_is_true(line: Line) -> None:
    for path in line.paths:
        assert path.exists(), f"{_name(STATEMENT)} has a line for {_name(path)}, which is not there"
        if "(no torch)" in line.text:
            files = [path] if path.is_file() else sorted(path.rglob("*.py"))
            assert {_name(file): way for file in files if (way := way_to_torch(file))} == {}


def test_the_statement_is_whole() -> None:
    paths = [path for line in LINES for path in line.paths]
    assert len(paths) == len(set(paths))
    folders = {path.parent for path in MODULES if path.parent.parent == ROOT / "stages"}
    assert folders <= set(paths)
    floors = [
        floor(_path(name)) for name in ("__init__.py", "memory/disk.py", "memory/rows.py", "decode.py", "runner.py")
    ]
    assert None not in floors and floors == sorted(floors, key=int) and floors.count(floors[1]) == 2


def test_the_way_to_torch_is_found(tmp_path: Path) -> None:
    file = tmp_path / "heavy.py"
    file.write_text("import json\nfrom stages import sampling\n")
    assert way_to_torch(file).startswith("stages.sampling > ")
    file = tmp_path / "light.py"
    file.write_text("import json\ndef later():\n    import torch\nclass A:\n    from stages import config\n")
    assert way_to_torch(file) == "" and imported(file) == {"json", "torch", "stages.config"}


def test_the_readme_shows_the_rooms_that_there_are() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    shown = [line.split()[0] for line in tree.splitlines() if line.startswith("  ") and line.split()[0].endswith("/")]
    lines = [f"{path.name}/" for line in reversed(LINES) for path in line.paths if path.is_dir()]
    assert shown == lines
