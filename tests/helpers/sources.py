"""What Python files import, from their text: nothing is imported to find out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PLACES = (ROOT, ROOT / "tests" / "helpers")
_TORCH = ("torch", "diffusers", "transformers", "accelerate", "safetensors.torch")


def _file(module: str) -> Path | None:
    """Where a module of this project lies; None for others."""
    path = Path(*module.split("."))
    found = (one for place in _PLACES for one in (place / path.with_suffix(".py"), place / path / "__init__.py"))
    return next((one for one in found if one.is_file()), None)


def _nodes(node: ast.AST, functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not functions:
            continue
        if functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _nodes(child, functions)


@cache
def imported(path: Path, *, functions: bool = True) -> frozenset[str]:
    """Modules that a file names in an import; without ``functions`` only those that importing it imports."""
    found = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), functions):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one for one in below if _file(one)} or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


def way_to_torch(path: Path) -> str:
    """The imports by which importing the file ``path`` imports torch (``a > b > torch``); "" if it does not."""
    ways: dict[Path, str] = {path: ""}
    todo = [path]
    for file in todo:
        for name in sorted(imported(file, functions=False)):
            way = f"{ways[file]}{name}"
            if any(name == one or name.startswith(f"{one}.") for one in _TORCH):
                return way
            parents = [".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 2)]
            for found in filter(None, map(_file, parents)):  # packages above a module are imported as well
                if found not in ways:
                    ways[found] = f"{way} > "
                    todo.append(found)
    return ""
