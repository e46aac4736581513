"""SIGKILL at any moment, of a stage or of the runner: the same command goes on, to the same bytes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from command import Command
from whole_run import Run, arguments

from stages.config import ROOT, STAGES
from stages.memory.monitor import usage

KILL = ROOT / "tests" / "helpers" / "kill"

# (stage, moment, which), and whether something of that stage is left that it can go on from
STAGE_KILLS = [
    ("text_encode:replace:1", False),
    ("lowres:advance:2", True),
    ("guide:replace:1", False),
    ("denoise:replace:2", True),
    ("decode:advance:2", True),
    ("stitch:advance:1", False),
]
RUNNER_KILLS = [
    ("text_encode:advance:1", False),
    ("lowres:replace:3", True),
    ("guide:advance:1", False),
    ("denoise:advance:3", True),
    ("decode:advance:2", True),
    ("stitch:replace:1", False),
]


class Deadly(Command):
    """The command line in an environment where a stage kills."""

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        found = super().environment(more)
        if "HIGHRES_KILL" in more:
            found["PYTHONPATH"] = os.pathsep.join([str(KILL), found["PYTHONPATH"]])
        return found


@pytest.mark.parametrize("victim", ["stage", pytest.param("runner", marks=pytest.mark.slow)])
def test_killed_in_every_stage_one_after_the_other(finished: Run, tmp_path: Path, victim: str) -> None:
    checkpoint = Path(finished.command.common[-1].partition("=")[2])
    run = Run(Deadly(ROOT / "runner.py", tmp_path, checkpoint), tmp_path / "x", "")
    # one look for both: its measured speed decides between plans whose float32 may differ in the last bit
    shutil.copytree(finished.folder.parent / ".store" / "profile", tmp_path / ".store" / "profile")
    kills = STAGE_KILLS if victim == "stage" else RUNNER_KILLS
    goes_on = dict.fromkeys(STAGES, False)
    for index, (moment, kept) in enumerate(kills):
        died = run.command("run=x", *arguments(), HIGHRES_KILL=f"{moment}:{victim}")
        stage = moment.split(":")[0]
        assert not (run.folder / "image.png").exists()
        if victim == "runner":
            assert died.returncode == -9
        else:
            assert died.returncode == 1
            assert "SIGKILL" in died.stderr and "run=x" in died.stderr
            expected = ["resumed" if goes_on[name] else "ran" for name in STAGES[max(0, index - 1) : index]]
            assert [one["status"] for one in run.summary["stages"]] == ["reused"] * max(0, index - 1) + expected
            assert run.summary["error"].startswith(stage)
        assert not (run.folder / stage / "manifest.json").exists()
        goes_on[stage] = kept
    done = run.command("run=x", *arguments())
    assert done.returncode == 0, done.stderr
    assert run.image == finished.image
    assert [stage["status"] for stage in run.summary["stages"]] == ["reused"] * 5 + ["ran"]
    for stage in STAGES:  # nothing of the killed tries is left
        assert sorted(p.name for p in (run.folder / stage).rglob("*")) == sorted(
            p.name for p in (finished.folder / stage).rglob("*")
        )
        for path in (run.folder / stage).rglob("*.safetensors"):
            whole = finished.folder / stage / path.relative_to(run.folder / stage)
            assert path.read_bytes() == whole.read_bytes(), path


def test_the_stage_does_not_outlive_its_runner(finished: Run, tmp_path: Path) -> None:
    checkpoint = Path(finished.command.common[-1].partition("=")[2])
    command = Command(ROOT / "runner.py", tmp_path, checkpoint)
    process = command.start("run=x", *arguments())
    end = time.monotonic() + 60
    children: list[int] = []
    while not children:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = [int(child) for child in tasks.read_text().split()]
    process.kill()
    process.communicate()
    while any(usage(child).rss for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)
