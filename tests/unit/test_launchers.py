"""Sweeps through Hydra's launchers, each on its real engine, over the toy pipeline; and the memory that they share."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.config import ConfigError
from stages.files import write_json
from stages.plans import StagePlan
from stages.workflow import shares
from stages.workflow.overrides import prepare
from stages.workflow.shares import Share


def jobs(toy) -> list[dict]:
    (folder,) = (toy.output_dir / ".sweeps").glob("*/sweep.json")
    return json.loads(folder.read_text())["jobs"]


def job_process(toy, number: int = 0) -> int:
    """The process of a job that has begun its tiles."""
    end = time.monotonic() + 40
    while not list(toy.output_dir.glob(".store/tiles/*/tiles/1.txt")):
        assert time.monotonic() < end
        time.sleep(0.05)
    (file,) = toy.output_dir.glob(f".sweeps/*/jobs/{number:04d}.json")
    return json.loads(file.read_text())["process"]


def test_joblib_keeps_to_the_sum_that_all_jobs_have(toy):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install -e '.[joblib]'")
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3", "prompt=a", "seed=1,2,3"]
    process = toy.start(*words, "memory.budget=300MB", "launch.total_budget=590MB", TOY_SLOW="0.1")
    highest, together = 0, 0
    while process.poll() is None:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        sizes, stages = 0, 0
        for one in tree:
            try:
                sizes += one.memory_info().rss
                stages += "stages" in one.cmdline()
            except psutil.Error:
                continue
        highest, together = max(highest, sizes), max(together, stages)
        time.sleep(0.02)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert [one["status"] for one in jobs(toy)] == ["done"] * 3
    assert 100e6 < highest < 590e6
    assert together == 1  # 300 MB beside those that wait and the command: not twice
    assert "waits for memory: needs 300 MB" in out and "[1] " in out


def test_a_requeued_job_of_submitit_goes_on(toy):
    pytest.importorskip("submitit", reason="pip install -e '.[slurm]'")
    words = ["-m", "hydra/launcher=submitit_local", "prompt=a", "seed=1"]
    process = toy.start(*words, TOY_SLOW="0.3")
    os.kill(job_process(toy), signal.SIGUSR2)  # as Slurm does before it takes the machine away
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    (done,) = jobs(toy)
    summary = json.loads((toy.output_dir / done["run"] / "run.json").read_text())
    assert [one["status"] for one in summary["stages"]] == ["reused", "resumed", "ran"]


@pytest.mark.slow
def test_a_job_that_is_killed_is_named(toy):
    pytest.importorskip("submitit", reason="pip install -e '.[slurm]'")
    words = ["-m", "hydra/launcher=submitit_local", "prompt=a", "seed=1,2"]
    process = toy.start(*words, TOY_SLOW="0.3")
    os.kill(job_process(toy), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "1 of 2 jobs have no result:\n  job 1 (seed=1): killed" in err


def test_a_batch_script_asks_for_what_is_planned(toy, tmp_path):
    """``sbatch`` is a file that keeps the script and says no."""
    pytest.importorskip("submitit", reason="pip install -e '.[slurm]'")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(f'#!/bin/sh\ncp "$1" "{tmp_path}/script.sh"\necho no cluster here >&2\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    words = ["-m", "hydra/launcher=submitit_slurm", "prompt=a", "seed=1,2", "run=x"]
    toy(*words, "stage=plan", "hydra/launcher=basic")  # gives the runs their folders
    for run, peak in zip(sorted(toy.output_dir.glob("x-*")), (400e6, 630e6), strict=True):
        write_json(run / "plan.json", {"tiles": StagePlan(predicted_peak_rss_bytes=int(peak)).as_json()})
    search = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = toy(*words, PATH=search)
    script = (tmp_path / "script.sh").read_text()
    assert "#SBATCH --mem=631M\n" in script and "#SBATCH --array=0-1" in script  # 630 MB and 5%
    assert done.returncode == 1 and "no cluster here" in done.stderr
    toy(*words, "hydra.launcher.mem_gb=2", PATH=search)
    assert "#SBATCH --mem=2GB\n" in (tmp_path / "script.sh").read_text()


def test_a_launcher_that_is_not_installed_says_how_it_is(tmp_path, monkeypatch):
    words = ["-m", "prompt=a", f"output_dir={tmp_path}"]
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_joblib_launcher", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"hydra/launcher: got 'joblib'.*pip install .*\[joblib\]"):
        prepare([*words, "hydra/launcher=joblib"])


def test_shares_of_a_sum(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(shares, "usage", lambda pid: type("Usage", (), {"rss": 50_000_000})())
    monkeypatch.setattr(shares, "GROWTH", 0)
    began = psutil.Process().create_time()

    def others(**sizes: int) -> None:
        parent, more = os.getppid(), {"bytes": sizes["parent"], "working": bool(sizes["works"]), "name": "other"}
        gone = {"bytes": 10**12, "working": True, "name": "gone", "began": began - 10**6}
        listed = {str(parent): {**more, "began": psutil.Process(parent).create_time()}, str(os.getpid() + 1): gone}
        write_json(file, listed)

    share = Share(tmp_path, 1_000_000_000, "mine", said.append)
    (file,) = tmp_path.glob(".sweeps/memory-*.json")
    others(parent=200_000_000, works=0)
    share.take(800_000_000)  # fits to the byte; a process that is gone takes nothing
    taken = json.loads(file.read_text())
    assert sorted(one["bytes"] for one in taken.values()) == [200_000_000, 800_000_000] and not said
    share.settle(300_000_000)
    assert json.loads(file.read_text())[str(os.getpid())]["bytes"] == 300_000_000
    with pytest.raises(ConfigError, match=r"launch\.total_budget: got '1000MB', expected at least 1001MB"):
        share.take(801_000_000)
    others(parent=300_000_000, works=1)
    monkeypatch.setattr(time, "sleep", lambda seconds: others(parent=100_000_000, works=0))
    share.take(800_000_000)
    assert said == ["mine: waits for memory: needs 800 MB, 700 are free; other work"]
    share.leave()
    assert json.loads(file.read_text())[str(os.getpid())] == {
        "bytes": 50_000_000,
        "working": False,
        "name": "mine",
        "began": pytest.approx(began, abs=1),
    }
    assert Path(file).with_suffix(".lock").exists()
