"""Sweeps of the embedded model, real stages; launchers that are heavy to start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.config import ROOT

pytestmark = pytest.mark.slow
FAST = ["prompt=a lighthouse", "width=512", "height=512", "lowres.num_inference_steps=2"]
FAST += ["denoise.num_inference_steps=5", "progress=false"]


def start(output_dir: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "runner.py"), f"output_dir={output_dir}", "-m", *FAST, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=output_dir, env=environment)


def results(output_dir: Path, stage: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in output_dir.glob(f".store/{stage}/*/manifest.json")}


def jobs(output_dir: Path) -> list[dict]:
    (file,) = output_dir.glob(".sweeps/*/sweep.json")
    return json.loads(file.read_text())["jobs"]


def test_shared_stages_are_computed_once_also_after_a_kill(tmp_path):
    words = ["denoise.strength=0.5,1", "seed=1,2,3", "stage=[text_encode,lowres,guide,denoise]"]
    stages = ("text_encode", "lowres", "guide", "denoise")
    killed = start(tmp_path, *words)
    while len(results(tmp_path, "denoise")) < 2:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {stage: results(tmp_path, stage) for stage in stages}
    again = start(tmp_path, *words)
    _, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    after = {stage: results(tmp_path, stage) for stage in stages}
    assert [len(found) for found in after.values()] == [1, 3, 3, 6]
    assert all(after[stage].items() >= found.items() for stage, found in before.items())


def test_four_jobs_of_joblib_within_1600_megabytes(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install -e '.[joblib]'")
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=4", "launch.total_budget=1600MB", "seed=1,2,3,4"]
    process = start(tmp_path, *words)
    highest, together = 0, 0
    while process.poll() is None:
        sizes, stages = [], 0
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                sizes.append(one.memory_info().rss)
                stages += "stages" in one.cmdline()
            except psutil.Error:
                continue
        highest, together = max(highest, sum(sizes)), max(together, stages)
        time.sleep(0.02)
    _, err = process.communicate()
    assert process.returncode == 0, err
    print(f"four jobs, {together} at once: {highest / 1e6:.0f} MB")
    assert highest < 1600e6 and together >= 2


def test_a_worker_of_ray_is_killed_and_the_sweep_completes(tmp_path):
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    words = ["hydra/launcher=ray", "+hydra.launcher.init.num_cpus=2", "seed=1,2,3", "memory.budget=1GB"]
    process = start(tmp_path, *words, "denoise.num_inference_steps=30", "width=1024")
    while not list(tmp_path.glob(".store/denoise/*/checkpoint/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    for file in tmp_path.glob(".sweeps/*/jobs/*.json"):
        found = json.loads(file.read_text())
        if found["status"] == "running":
            os.kill(found["process"], signal.SIGKILL)  # with its stage, which dies with it
            break
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    assert [one["status"] for one in jobs(tmp_path)] == ["done"] * 3
    summaries = [json.loads((tmp_path / one["run"] / "run.json").read_text()) for one in jobs(tmp_path)]
    assert all((tmp_path / one["run"] / "image.png").exists() for one in summaries)
