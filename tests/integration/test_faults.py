"""A few of each kind of fault: kills, damaged files, settings, checkpoints, pictures; ``benchmarks faults`` has all."""

from __future__ import annotations

import subprocess
import sys

from stages.config import ROOT


def test_a_few_faults_of_each_kind() -> None:
    command = [sys.executable, "-m", "benchmarks", "faults", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("pass: ") == 5 and "FAIL" not in done.stdout
