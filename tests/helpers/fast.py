"""pytest plugin: the marker ``fast``, given by itself to tests that need no torch and run no whole command line.

``pytest -m fast`` leaves out what it can tell from the text of a test file, so torch is never imported; a test that
does it all the same fails and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

import pytest
from sources import way_to_torch

SLOW_MARKS = {"slow", "torch"}
SLOW_FIXTURES = {"small", "work", "finished", "cli", "toy"}  # they make models or run whole command lines


class _NoTorch(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] == "torch":
            raise ImportError(
                "a test marked fast imports torch: import it at the top of its module, or mark the test with "
                "pytest.mark.torch"
            )


def _only_fast(config: pytest.Config) -> bool:
    return config.option.markexpr == "fast"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fast: needs no torch; given by itself (make test-fast)")
    config.addinivalue_line(
        "markers", "torch: needs torch, or a process with it, where its module's imports do not show it"
    )
    if _only_fast(config):
        sys.meta_path.insert(0, _NoTorch())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    file = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    return True if _only_fast(config) and file.suffix == ".py" and file.is_file() and way_to_torch(file) else None


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        fixtures = set(getattr(item, "fixturenames", ()))
        if not marks & SLOW_MARKS and not fixtures & SLOW_FIXTURES and not way_to_torch(item.path):
            item.add_marker("fast")
