"""One whole run by the real command line, shared by the tests that only look at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from whole_run import Run, start


@pytest.fixture(scope="session")
def finished(small: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of every stage; tests leave it as it is."""
    return start(tmp_path_factory.mktemp("finished"), small("sd15"))
