"""Commands in real processes, on an output folder of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from stages.config import ROOT

HELPERS = ROOT / "tests" / "helpers"


def _hears_signals() -> None:
    """Tests that were started in the background (nohup, ``&``) ignore some, and what they start would as well."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Command:
    """Runs ``runner.py`` (or the same over the toy pipeline) in a process, on an output folder of its own."""

    def __init__(self, script: Path, output_dir: Path, checkpoint: Path) -> None:
        self.output_dir = output_dir
        # no upscaling phases, unless a test asks for them, and a strength that no model's file changes
        self.common = [sys.executable, str(script), f"output_dir={output_dir}"]
        self.common += ["model.phase_growth=1", "model.strength=0.4", f"model.path={checkpoint}"]

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        search = os.pathsep.join([str(ROOT), str(HELPERS)])
        return {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **more}

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command, environment = [*self.common, *arguments], self.environment(more)
        return subprocess.Popen(
            command,
            env=environment,
            cwd=self.output_dir,
            stdout=pipe,
            stderr=pipe,
            text=True,
            preexec_fn=_hears_signals,
        )

    def __call__(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
