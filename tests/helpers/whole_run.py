"""The whole pipeline by the real command line over a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from command import Command
from in_process import SMALL

from stages.config import ROOT

# an ancestral scheduler: it draws noise at every step, so a generator that is not kept shows
VALUES = {
    **{f"model.{key}": SMALL["model"][key] for key in ("native_size", "size_multiple")},
    **{f"{node}.{key}": value for node in ("decode", "guide") for key, value in SMALL[node].items()},
    "technique.dtype": "fp32",
    "launch.threads": 1,
    "width": 128,
    "height": 96,
    "lowres.num_inference_steps": 3,
    "denoise.num_inference_steps": 4,
    "denoise.strength": 0.75,
    "seed": 5,
}
ARGUMENTS = ("prompt=a cat, (sea:1.2)", "model=sd15", "scheduler=euler_ancestral", "negative_prompt=dog")


def arguments(**values: Any) -> list[str]:
    return [*ARGUMENTS, *(f"{key}={value}" for key, value in {**VALUES, **values}.items())]


class Run(NamedTuple):
    """A command on its output folder, the run's folder, and what the command printed."""

    command: Command
    folder: Path
    stdout: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return {stage["name"]: stage for stage in self.summary["stages"]}

    @property
    def image(self) -> bytes:
        return (self.folder / "image.png").read_bytes()


def start(output_dir: Path, checkpoint: Path, **values: Any) -> Run:
    """Run the whole pipeline on a fresh output folder."""
    output_dir.mkdir(parents=True, exist_ok=True)
    command = Command(ROOT / "runner.py", output_dir, checkpoint)
    done = command("run=x", *arguments(**values))
    assert done.returncode == 0, done.stderr
    return Run(command, output_dir / "x", done.stdout)
