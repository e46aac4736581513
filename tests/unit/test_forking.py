"""Stages that are forked from a warm process: the same process to all who look, memory that counts, every end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from stages import PIPELINE
from stages.config import ROOT, ConfigError
from stages.job import Job
from stages.memory.monitor import Monitor, descendants, usage
from stages.plans import StagePlan
from stages.workflow import cgroup, enforce, forking
from stages.workflow.launch.local import environment
from stages.workflow.launch.zygote import Forked, Zygote
from stages.workflow.validate import validate

FORKED = ("run=x", "prompt=a", "launch.fork=on")
MB = 1_000_000


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def picture(toy, run: str = "x") -> bytes:
    return (toy.output_dir / run / "image.png").read_bytes()


def summary(toy, run: str = "x") -> dict:
    return json.loads((toy.output_dir / run / "run.json").read_text())


def tiles(toy) -> list[Path]:
    return list(toy.output_dir.glob(".store/tiles/*/tiles/*.txt"))


def alive(pid: int) -> bool:
    return usage(pid).rss > 0


def parts(runner: int) -> tuple[int, int]:
    """(zygote, stage) of a runner: the one that it started, and the one that came to it."""
    found = [pid for pid in descendants(runner) if alive(pid)]
    (stage,) = [pid for pid in found if os.path.realpath(f"/proc/{pid}/fd/1").endswith("tiles.log")]
    (zygote,) = [pid for pid in found if os.path.realpath(f"/proc/{pid}/fd/1").endswith("zygote.log")]
    return zygote, stage


def working(toy, **more: str) -> tuple[subprocess.Popen, int, int]:
    """A run in the middle of its tiles."""
    runner = toy.start(*FORKED, TOY_SLOW="0.3", **more)
    wait_for(lambda: len(tiles(toy)) >= 2)
    return runner, *parts(runner.pid)


def test_the_same_bytes_log_and_result_as_fresh(toy):
    fresh = toy("run=fresh", "prompt=a", "launch.fork=off")
    for entry in (toy.output_dir / ".store").glob("*/*"):
        entry.rename(entry.with_name("0" * 64))  # out of the way: the run below has to compute
    forked = toy(*FORKED)
    assert (fresh.returncode, forked.returncode) == (0, 0), forked.stderr
    assert not (toy.output_dir / "fresh" / "logs" / "zygote.log").exists()
    assert (toy.output_dir / "x" / "logs" / "zygote.log").read_text() == ""
    assert picture(toy, "fresh") == picture(toy)
    one, other = ([dict(stage) for stage in summary(toy, run)["stages"]] for run in ("fresh", "x"))
    for key in ("name", "status", "fingerprint"):
        assert [stage[key] for stage in one] == [stage[key] for stage in other]
    assert "joins 5 tiles" in forked.stdout
    logs = [(toy.output_dir / run / "logs" / "tiles.log").read_text() for run in ("fresh", "x")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("enforced", ["watchdog", "cgroup"])
def test_a_forked_process_has_what_a_fresh_one_has(toy, enforced):
    if enforced == "cgroup":
        try:
            cgroup.Cgroup.create(100 * MB, "probe").remove()
        except OSError:
            pytest.skip("this process cannot make a memory cgroup")
    told = []
    for way in ("off", "on"):
        folder = toy.output_dir / way
        folder.mkdir()
        values = [f"seed={len(way)}", f"launch.fork={way}", f"memory.enforce={enforced}"]
        done = toy("run=x", "prompt=a", *values, TOY_TELL=str(folder))
        assert done.returncode == 0, done.stderr
        told.append({path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")})
    assert set(told[1]) == {"draw", "tiles", "join"}
    for stage, forked in told[1].items():
        fresh = told[0][stage]
        for key in ("signals", "files", "folder"):
            assert forked[key] == fresh[key], (stage, key)
        for one in (fresh, forked):
            for name in ("TOY_TELL", "HIGHRES_RUNNER", "PWD"):  # of this test, of the runner, of a cgroup's shell
                one["environment"].pop(name, None)
            assert (f"highres-{one['parent']}-{stage}" in one["cgroup"]) == (enforced == "cgroup")
        assert forked["environment"] == fresh["environment"]
    assert len({forked["parent"] for forked in told[1].values()}) == 1  # the runner itself


def test_a_stage_that_is_killed_goes_on_to_the_same_picture(toy):
    toy("run=whole", "prompt=a", "launch.fork=off")
    for entry in (toy.output_dir / ".store").glob("*/*"):
        entry.rename(entry.with_name("0" * 64))
    died = toy(*FORKED, TOY_DIE="tiles:3")
    assert died.returncode == 1
    assert "tiles: ended by signal SIGKILL" in died.stderr and "Go on with: python runner.py run=x" in died.stderr
    assert summary(toy)["error"].startswith("tiles")
    done = toy("run=x")
    assert done.returncode == 0, done.stderr
    assert [stage["status"] for stage in summary(toy)["stages"]] == ["reused", "resumed", "ran"]
    assert picture(toy) == picture(toy, "whole")


def test_the_process_they_come_from_may_be_killed_at_any_time(toy):
    runner, zygote, stage = working(toy)
    os.kill(zygote, signal.SIGKILL)
    out, err = runner.communicate(timeout=60)
    assert runner.returncode == 0, err
    assert "stages start fresh: the process that they are forked from cannot be used" in out
    assert f"(Broken pipe, process {zygote})" in out
    assert [one["status"] for one in summary(toy)["stages"]] == ["ran"] * 3
    assert not alive(stage)


def test_the_runner_killed_takes_both_along_and_the_run_goes_on(toy):
    runner, zygote, stage = working(toy)
    runner.kill()
    runner.communicate()
    wait_for(lambda: not alive(zygote) and not alive(stage))
    done = toy("run=x")
    assert done.returncode == 0, done.stderr
    assert [one["status"] for one in summary(toy)["stages"]][:2] == ["reused", "resumed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_of_them_ends_cleanly(toy, number):
    runner, zygote, stage = working(toy)
    for pid in (zygote, runner.pid, stage) if number == signal.SIGINT else (runner.pid,):
        with contextlib.suppress(ProcessLookupError):  # the runner may have ended the stage by then
            os.kill(pid, number)
    _, err = runner.communicate(timeout=20)
    assert runner.returncode == 128 + number
    assert err.count("Go on with: python runner.py run=x") == 1 and "Traceback" not in err
    assert not alive(zygote) and not alive(stage)
    assert summary(toy)["error"] == "interrupted"


def test_a_stage_that_fails_says_what_a_fresh_one_says(toy):
    said = []
    for way in ("off", "on"):
        failed = toy("run=x", "prompt=a", f"launch.fork={way}", TOY_FAIL="join")
        assert failed.returncode == 1
        said.append(re.sub(r'File ".*?"', "", failed.stderr))
    assert said[0] == said[1] and "join: ValueError: the toy broke" in said[1] and "  | " in said[1]


def test_over_the_budget_it_is_stopped_and_what_it_came_from_is_in_the_sum(toy):
    over = toy(*FORKED, "memory.budget=400MB", "memory.enforce=watchdog", TOY_EAT="tiles")
    assert over.returncode == 1
    found = re.search(r"while toy.tile0 ran: runner, stage and what it was forked from \((\d+) MB\)", over.stderr)
    assert found and 10 < int(found[1]) < 100, over.stderr
    assert [one["status"] for one in summary(toy)["stages"]] == ["ran"]


def test_every_sum_has_it(toy):
    peaks, watched = {}, {}
    for way in ("off", "on"):
        toy(f"run={way}", "prompt=a", f"launch.fork={way}", "force=true", TOY_SLOW="0.2")
        peaks[way] = [stage["peak_rss_bytes"] for stage in summary(toy, way)["stages"]]
        (measured,) = toy.output_dir.glob(".store/.stats/tiles-*.json")
        watched[way] = [sample[1] for sample in json.loads(measured.read_text())["timeline"]]
    for fresh, forked in zip(peaks["off"], peaks["on"], strict=True):
        assert 15 * MB < forked - fresh < 80 * MB  # Python and this program's modules, without torch
    assert 15 * MB < median(watched["on"]) - median(watched["off"]) < 80 * MB  # what the watchdog is shown


def test_the_monitor_counts_what_is_beside():
    code = "x = bytearray(90_000_000); import sys, time; print(flush=True); time.sleep(30)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as beside:
        assert beside.stdout is not None
        beside.stdout.readline()
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as stage:
            sums = []
            for other in (0, beside.pid):
                monitor = Monitor(stage.pid, 0.01, lambda: "", lambda sample: None, beside=other).start()
                wait_for(lambda m=monitor: len(m.timeline) > 20)
                monitor.stop()
                sums.append(monitor.timeline[-1].rss)
            stage.kill()
        beside.kill()
    assert 85 * MB < sums[1] - sums[0] < 130 * MB


def test_a_cgroup_has_what_the_others_leave():
    try:
        whole, rest = (enforce.start("cgroup", 9000 * MB, beside=size) for size in (0, 200 * MB))
    except ConfigError:
        pytest.skip("this process cannot make a memory cgroup")
    assert whole.cgroup and rest.cgroup
    assert abs(whole.cgroup.limit - rest.cgroup.limit - 200 * MB) < 5 * MB
    for one in (whole, rest):
        one.stop()


@pytest.fixture
def run_dir(make_config, tmp_path) -> Path:
    from stages.documents import save_text

    (tmp_path / "config.yaml").write_text(save_text(make_config()))
    return tmp_path


def made(
    make_config, run_dir: Path, said: list[str], planned: int = 200 * MB, pipeline: str = "toy_pipeline"
) -> Zygote:
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    surroundings = {**environment(make_config()), "PYTHONPATH": search}
    return Zygote(run_dir, ["draw"], pipeline=pipeline, environment=surroundings, planned=planned, say=said.append)


def test_exit_codes_are_those_of_the_kernel(make_config, run_dir):
    said: list[str] = []
    zygote = made(make_config, run_dir, said)
    assert zygote.ready() and zygote.rss > 10 * MB
    with (run_dir / "log").open("wb") as log, open(os.devnull, "r+b") as other:
        files = (log.fileno(), other.fileno(), other.fileno())
        wrong = zygote.fork(["--no-such-option"], {}, files, None)
        assert wrong is not None and wrong.wait(20) == 2  # argparse's
        assert "usage" in (run_dir / "log").read_text()
    zygote.end()
    assert zygote.pid == 0 and not said
    sleeping = os.fork()
    if not sleeping:
        time.sleep(60)
        os._exit(0)
    forked = Forked(sleeping)
    assert forked.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.05)
    os.kill(sleeping, signal.SIGTERM)
    assert forked.wait() == -signal.SIGTERM == forked.poll()


def test_one_that_cannot_be_used_is_ended_and_said_once(make_config, run_dir):
    for values, reason in (
        ({"planned": 5 * MB}, "MB instead of 5, which are not in the plan"),
        ({"pipeline": "no_such_pipeline"}, "ModuleNotFoundError: No module named 'no_such_pipeline'"),
    ):
        said: list[str] = []
        zygote = made(make_config, run_dir, said, **values)
        assert not zygote.ready() and not zygote.ready()
        assert zygote.pid == 0 and zygote.fork(["draw"], {}, (0, 1, 2), None) is None
        assert len(said) == 1 and "stages start fresh" in said[0] and reason in said[0], said


def test_a_request_that_nobody_hears_the_answer_to_starts_nothing(make_config, run_dir, monkeypatch):
    said: list[str] = []
    zygote = made(make_config, run_dir, said)
    assert zygote.ready()
    pid, answer = zygote.pid, zygote._answer
    monkeypatch.setattr(zygote, "_answer", lambda seconds: answer(seconds) and {"error": "no answer in 1 s"})
    with (run_dir / "log").open("wb") as log:
        assert zygote.fork(["--help"], {}, (log.fileno(), log.fileno(), log.fileno()), None) is None
    assert not alive(pid) and "no answer in 1 s" in said[0]
    wait_for(lambda: not [one for one in descendants(os.getpid()) if alive(one)])
    assert (run_dir / "log").read_text() == ""  # it did not get to its arguments


@pytest.mark.parametrize(
    ("value", "needs"),
    [
        ({"launch.fork": "yes"}, "one of auto, on, off"),
        ({"launch.fork": "on", "launch.nproc": 2}, "launch.nproc=1, not 2"),
        ({"launch.fork": "on", "device": "cuda"}, "device=cpu, not cuda"),
    ],
)
def test_on_is_refused_where_it_cannot_act(make_config, value, needs):
    config = make_config(value)
    with pytest.raises(ConfigError, match=r"expected") as caught:
        validate(config)
    assert caught.value.key == "launch.fork" and needs in str(caught.value)
    validate(make_config({**value, "launch.fork": "auto"}))


def states(*running: str) -> list:
    return [SimpleNamespace(name=s.name, stage=s, status="run" if s.name in running else "reuse") for s in PIPELINE]


PEAKS = {"text_encode": 300, "denoise": 400, "decode": 500, "stitch": 120}


def plans(**other: int) -> dict[str, StagePlan]:
    found = {name: StagePlan(predicted_peak_rss_bytes=peak * MB, predicted_seconds=9.0) for name, peak in PEAKS.items()}
    return found | {name: StagePlan(predicted_peak_rss_bytes=peak * MB) for name, peak in other.items()}


def forked(make_config, running=tuple(PEAKS), of=None, **values) -> dict[str, StagePlan]:
    job = Job.of(make_config({key.replace("__", "."): value for key, value in values.items()}))
    return forking.planned(of or plans(), states(*running), job, 200 * MB)


def test_auto_spends_what_the_budget_has_over(make_config):
    with_it = forked(make_config)
    assert all(plan.zygote_bytes == 200 * MB for plan in with_it.values())
    assert with_it["decode"].predicted_peak_rss_bytes == 700 * MB and with_it["decode"].predicted_seconds < 9
    assert (
        with_it["stitch"].predicted_peak_rss_bytes == (120 + 200 + 200) * MB - forking.BARE
    )  # imports no torch itself
    assert with_it["text_encode"].predicted_peak_rss_bytes == 500 * MB + forking.TEXT  # it imports transformers itself
    assert forked(make_config, of=with_it) == with_it
    assert forked(make_config, of=with_it, launch__fork="off") == plans()
    for values in (
        {"memory__budget": "730MB"},  # 700 and its margin do not fit
        {"running": ("decode",)},  # one start less is none less
        {"launch__total_budget": "2GB"},
        {"launch__nproc": 2},
        {"of": plans(guide=700), "running": (*PEAKS, "guide")},
        {"running": (*PEAKS, "lowres")},  # whose peak nobody knows
    ):
        assert forked(make_config, **values) == values.get("of", plans()), values


def test_results_that_are_there_keep_the_plan_that_they_were_made_by(make_config):
    with_it = forked(make_config)
    later = forked(make_config, running=("decode",), of=with_it)
    assert later == {**with_it, "decode": plans()["decode"]}
    anew = forking.planned(plans(), states("decode"), Job.of(make_config()), 200 * MB, before=with_it)
    assert anew == later


def test_on_takes_what_fits_and_is_refused_where_nothing_does(make_config):
    found = forked(make_config, launch__fork="on", memory__budget="650MB")
    assert {name for name, plan in found.items() if plan.zygote_bytes} == {"text_encode", "denoise", "stitch"}
    assert found["decode"] == plans()["decode"]
    with pytest.raises(ConfigError, match=r"takes 200 MB beside each\. memory\.budget=740MB"):
        forked(make_config, running=("decode",), launch__fork="on", memory__budget="650MB")


def test_it_is_ended_before_a_stage_without_room_for_it():
    ended = []
    zygote = SimpleNamespace(end=lambda: ended.append(True))
    assert forking.of_stage(zygote, StagePlan(zygote_bytes=1)) is zygote and not ended  # type: ignore[arg-type]
    assert forking.of_stage(zygote, StagePlan()) is None and ended  # type: ignore[arg-type]
    assert forking.of_stage(None, StagePlan(zygote_bytes=1)) is None


def test_no_fingerprint_knows_of_it(toy):
    assert toy("run=x", "prompt=a", "launch.fork=off").returncode == 0
    again = toy("run=x", "launch.fork=on")
    assert [stage["status"] for stage in summary(toy)["stages"]] == ["reused"] * 3, again.stderr
