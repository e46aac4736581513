"""The marker ``fast``: who gets it, and that a test which has it cannot import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sources import ROOT

TESTS = """
import pytest

def test_light():
    pass

def test_hidden():
    import torch

@pytest.mark.torch
def test_known():
    import torch

def test_whole(toy):
    pass
"""


def test_fast_tests_are_found_and_cannot_import_torch(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_heavy.py").write_text("import torch\ndef test_other():\n    pass\n")
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "fast",
        "-m",
        "fast",
        "-v",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "test_light PASSED" in done.stdout and "test_hidden FAILED" in done.stdout, done.stdout + done.stderr
    assert "a test marked fast imports torch" in done.stdout
    assert not any(name in done.stdout for name in ("test_known", "test_whole", "test_other"))
