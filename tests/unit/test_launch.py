"""Stage processes: resume, kills, budget, sweeps, concurrency; real processes over the toy pipeline."""

import io
import itertools
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import __main__ as stage_process
from stages.config import ROOT
from stages.context import MARK_BYTES, Progress, read_device_bytes, read_mark
from stages.events import Advance, Done, Error, Event, Resumed, Start, to_line
from stages.files import write_json
from stages.memory.monitor import Monitor, Sample, descendants, peak_rss, usage
from stages.workflow import enforce, run, signals
from stages.workflow.errors import explain
from stages.workflow.launch.base import failure
from stages.workflow.launch.local import environment, listen

HELPERS = ROOT / "tests" / "helpers"


def summary(toy, run: str) -> dict:
    return json.loads((toy.output_dir / run / "run.json").read_text())


def statuses(toy, run: str) -> list[str]:
    return [stage["status"] for stage in summary(toy, run)["stages"]]


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_run_and_the_same_command_again(toy):
    done = toy("prompt=a b")
    assert done.returncode == 0, done.stderr
    (run,) = [path.parent.name for path in toy.output_dir.glob("*/run.json")]
    assert run.startswith("a-b-")
    folder = toy.output_dir / run
    first = summary(toy, run)
    assert [stage["status"] for stage in first["stages"]] == ["ran"] * 3
    assert done.stdout.splitlines()[-1] == str(folder / "image.png")
    assert (folder / "image.png").read_text().splitlines()[4] == "0 a b 4 0.4"
    assert not os.path.isabs(os.readlink(folder / "draw"))
    assert not list(folder.glob("tiles/checkpoint*"))
    for stage in first["stages"]:
        assert 10e6 < stage["peak_rss_bytes"] < 200e6
        assert stage["seconds"] > 0
        assert len(stage["fingerprint"]) == 64
    heaviest = [one["module"] for one in first["stages"][1]["heaviest_modules"]]
    assert heaviest and all(name.startswith("toy.tile") for name in heaviest)  # the peak itself may lie before them
    assert first["budget_bytes"] == 800_000_000
    assert 10e6 < first["runner_peak_rss_bytes"] < 60e6

    shutil.rmtree(folder / "logs")
    again = toy("prompt=a b")
    assert not (folder / "logs").exists()  # no process of a stage was started
    assert again.returncode == 0
    assert statuses(toy, run) == ["reused"] * 3
    assert summary(toy, run)["peak_rss_bytes"] == first["peak_rss_bytes"]
    assert "draw: reused (nothing changed)" in again.stdout


def test_reasons_when_something_changed(toy):
    toy("run=x", "prompt=a")
    done = toy("run=x", "denoise.strength=0.5")
    assert "tiles: starts (denoise.strength changed (0.4 -> 0.5))" in done.stdout
    assert "join: starts (tiles changed)" in done.stdout
    assert statuses(toy, "x") == ["reused", "ran", "ran"]
    back = toy("run=x", "denoise.strength=0.4")
    assert "tiles: reused (computed before with these values)" in back.stdout
    (toy.output_dir / "x" / "tiles" / "tiles" / "2.txt").write_text("torn")
    torn = toy("run=x")
    assert "tiles: starts (tiles/tiles/2.txt changed on disk)" in torn.stdout
    assert "4 of 5 tiles were done" in torn.stdout
    assert statuses(toy, "x") == ["reused", "resumed", "reused"]
    forced = toy("run=x", "stage=tiles", "force=true")
    assert "tiles: starts (force=true)" in forced.stdout
    assert "goes on" not in forced.stdout


@pytest.mark.parametrize(
    "moment", ["draw:0", "tiles:3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tiles:0", "join:0"))]
)
def test_a_stage_killed_anywhere_goes_on_to_the_same_picture(toy, moment):
    toy("run=whole", "prompt=a", "seed=1")
    expected = (toy.output_dir / "whole" / "image.png").read_bytes()
    for entry in (toy.output_dir / ".store").glob("*/*"):
        entry.rename(entry.with_name("0" * 64))  # out of the way: the run below has to compute
    died = toy("run=x", "prompt=a", "seed=1", TOY_DIE=moment)
    assert died.returncode == 1
    assert "SIGKILL" in died.stderr
    assert f"run=x output_dir={toy.output_dir}" in died.stderr
    assert summary(toy, "x")["error"].startswith(moment.split(":")[0])
    done = toy("run=x")
    assert done.returncode == 0, done.stderr
    assert (toy.output_dir / "x" / "image.png").read_bytes() == expected
    assert statuses(toy, "x").count("resumed") == (moment == "tiles:3")


def test_a_lost_rank_ends_the_others_and_is_named(toy):
    died = toy("run=x", "prompt=a", "launch.nproc=2", TOY_SLOW="0.3", TOY_DIE="rank1:0")
    assert died.returncode == 1
    assert "tiles: rank 1 of 2 ended by signal SIGKILL" in died.stderr and "Go on with:" in died.stderr
    failed = toy("run=x", TOY_FAIL="rank1", TOY_SLOW="0.3")
    assert failed.returncode == 1 and "tiles: rank 1 of 2: ValueError: the toy broke" in failed.stderr
    done = toy("run=x")
    assert done.returncode == 0, done.stderr
    assert [stage["ranks"] for stage in summary(toy, "x")["stages"]] == [1, 2, 1]


def test_another_host_helps_with_what_the_first_one_begins(toy):
    hosts = ["run=x", "prompt=a", "launch.nnodes=2", "launch.rdzv_endpoint=localhost:29500"]
    other = toy.start(*hosts, "launch.node_rank=1", TOY_SLOW="0.3")
    done = toy(*hosts, TOY_SLOW="0.3")
    said, error = other.communicate(timeout=100)
    assert (done.returncode, other.returncode) == (0, 0), done.stderr + error
    assert "tiles: starts (with the first host)" in said and "draw" not in said and "is there" in said, said
    assert [stage["name"] for stage in summary(toy, "x")["stages"]] == ["draw", "tiles", "join"]


def test_the_runner_killed_takes_its_stage_along_and_the_run_goes_on(toy):
    process = toy.start("run=x", "prompt=a", TOY_SLOW="0.3")
    wait_for(lambda: len(list(toy.output_dir.glob(".store/tiles/*/tiles/*.txt"))) >= 2)
    (child,) = [pid for pid in descendants(process.pid) if usage(pid).rss]
    process.kill()
    process.communicate()
    wait_for(lambda: not usage(child).rss)
    done = toy("run=x")
    assert done.returncode == 0, done.stderr
    assert statuses(toy, "x")[:2] == ["reused", "resumed"]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_cleanly_and_says_how_to_go_on(toy, number, times):
    process = toy.start("run=x", "prompt=a", TOY_SLOW="0.5")
    wait_for(lambda: list(toy.output_dir.glob(".store/tiles/*/tiles/0.txt")))
    (child,) = [pid for pid in descendants(process.pid) if usage(pid).rss]
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.05)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err.count("Go on with: python runner.py run=x") == 1
    assert "Traceback" not in err
    assert not usage(child).rss
    assert summary(toy, "x")["error"] == "interrupted"


def listens(pid: int) -> bool:
    """Whether the script itself runs: Python alone does not care about SIGTERM."""
    (caught,) = re.findall(r"SigCgt:\s*(\S+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("after", [0.0, 0.1, 0.3])
def test_ctrl_c_in_the_first_moments_is_one_clear_line(cli, after):
    process = cli.start("run=x", "prompt=a")
    wait_for(lambda: listens(process.pid))
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(err.strip().splitlines()) == 1 and "stopped" in err


def test_nohup_is_honoured(toy):
    command = ["nohup", *toy.common, "run=x", "prompt=a"]
    process = subprocess.Popen(
        command, env=toy.environment({"TOY_SLOW": "0.2"}), cwd=toy.output_dir, stdout=subprocess.DEVNULL
    )
    wait_for(lambda: list(toy.output_dir.glob(".store/tiles/*/tiles/0.txt")))
    for pid in [*descendants(process.pid), process.pid]:  # the terminal closes
        os.kill(pid, signal.SIGHUP)
    assert process.wait(30) == 0
    assert statuses(toy, "x") == ["ran"] * 3


def test_stopped_while_looking_at_the_models(make_config, monkeypatch, tmp_path, capsys):
    def stopped(*args, **options):
        raise signals.Stopped(signal.SIGTERM)

    write_json(tmp_path / "outputs" / "x" / "run.json", {"error": None, "image": "image.png"})  # of an earlier time
    monkeypatch.setattr(run.planning, "plan", stopped)
    with pytest.raises(signals.Stopped) as caught:
        run.execute(make_config({"run": "x"}, derive=False), [])
    assert caught.value.code == 143 and caught.value.said
    assert json.loads((tmp_path / "outputs" / "x" / "run.json").read_text())["error"] == "interrupted"
    assert capsys.readouterr().err.count("Go on with: python runner.py run=x") == 1


def test_a_terminal_that_knows_few_letters(toy):
    done = toy("prompt=Häuser 介绍", "run=x", f"output_dir={toy.output_dir / 'ü介'}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("\\xfc\\u4ecb/x/image.png")


def test_a_failing_stage_shows_its_log_and_keeps_the_rest(toy):
    failed = toy("run=x", "prompt=a", TOY_FAIL="join")
    assert failed.returncode == 1
    assert "join: ValueError: the toy broke" in failed.stderr
    assert str(toy.output_dir / "x" / "logs" / "join.log") in failed.stderr
    assert statuses(toy, "x") == ["ran", "ran"]
    assert not (toy.output_dir / "x" / "image.png").exists()
    assert (toy.output_dir / "x" / "report.html").exists()


def test_over_the_budget_the_stage_is_stopped_with_figures(toy):
    over = toy("run=x", "prompt=a", "memory.budget=400MB", TOY_EAT="tiles")
    assert over.returncode == 1
    assert "tiles: stopped over the memory budget while toy.tile0 ran" in over.stderr
    assert "memory.budget is 400MB" in over.stderr
    assert "memory.enforce=off" in over.stderr
    assert statuses(toy, "x") == ["ran"]


def test_a_single_stage_names_the_command_for_its_inputs(toy):
    missing = toy("run=x", "prompt=a", "stage=join")
    assert missing.returncode == 1
    assert "join needs tiles (tiles: no result yet)" in missing.stderr
    assert f"Make it: python runner.py run=x output_dir={toy.output_dir} stage=[draw,tiles]" in missing.stderr
    assert toy("run=x", "stage=[draw,tiles]").returncode == 0
    assert toy("run=x", "stage=join").returncode == 0
    assert (toy.output_dir / "x" / "image.png").exists()


def test_links_of_other_settings_go(toy):
    toy("run=x", "prompt=a")
    toy("run=x", "seed=7", "stage=draw")
    folder = toy.output_dir / "x"
    assert (folder / "draw" / "drawn.txt").read_text() == "7 a"
    assert not (folder / "tiles").exists()
    assert not os.path.lexists(folder / "image.png")


def test_a_sweep_shares_stages_and_names_runs(toy):
    done = toy("-m", "run=x", "prompt=a", "denoise.strength=0.3,0.5")
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent.name for path in toy.output_dir.glob("*/run.json"))
    assert len(runs) == 2
    assert all(run.startswith("x-") for run in runs)
    assert len(list((toy.output_dir / ".store" / "draw").iterdir())) == 1
    assert sorted(statuses(toy, run)[0] for run in runs) == ["ran", "reused"]


def test_one_failing_job_does_not_stop_a_sweep(toy):
    done = toy("-m", "prompt=a", "width=1000,1001,1008")
    assert done.returncode == 1
    assert done.stderr.startswith("width: got 1001")
    assert len(list(toy.output_dir.glob("*/image.png"))) == 2


def test_two_runs_at_once_compute_a_shared_stage_once(toy):
    first = toy.start("run=one", "prompt=a", TOY_SLOW="1")
    wait_for(lambda: list(toy.output_dir.glob(".store/tiles/*")))
    second = toy("run=two", "prompt=a")
    first.communicate(timeout=60)
    assert first.returncode == second.returncode == 0
    assert "another process computes the same result (run one, process " in second.stdout
    assert statuses(toy, "one")[:2] == ["ran"] * 2
    assert sorted([statuses(toy, "one")[2], statuses(toy, "two")[2]]) == ["ran", "reused"]  # either may be first
    shared = summary(toy, "two")["stages"][1]
    assert (shared["status"], shared["reason"]) == ("reused", "another process computed it meanwhile")


def test_plan_computes_nothing(toy):
    done = toy("run=x", "prompt=a", "stage=plan")
    assert done.returncode == 0
    assert "no result yet" in done.stdout
    assert (toy.output_dir / "x" / "config.yaml").exists()
    assert not (toy.output_dir / ".store" / "draw").exists()
    assert not (toy.output_dir / "x" / "run.json").exists()


def test_progress_false_prints_the_path_only(toy):
    done = toy("run=x", "prompt=a", "progress=false")
    assert done.stdout.splitlines() == [str(toy.output_dir / "x" / "image.png")]
    assert done.stderr == ""


def test_a_stage_by_hand(toy):
    toy("run=x", "prompt=a", "stage=plan")
    command = [sys.executable, "-m", "stages", "draw", str(toy.output_dir / "x"), "--pipeline", "toy_pipeline"]
    done = subprocess.run(command, env=toy.environment({}), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "1/1 steps" in done.stdout
    command[3] = "join"
    done = subprocess.run(command, env=toy.environment({}), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "the results of tiles (no result yet)" in done.stderr


def test_a_torn_line_is_the_end_and_a_strange_one_an_error():
    heard: list[Event] = []
    lines = io.StringIO(to_line(Start(5, "tiles")) + to_line(Resumed("tile 2")) + to_line(Advance(1)) + '{"event": "Do')
    assert listen(lines, heard.append) == (None, "tile 2", ())
    assert heard == [Start(5, "tiles"), Resumed("tile 2"), Advance(1)]
    assert listen(io.StringIO(to_line(Done("ran", 1))), heard.append) == (Done("ran", 1), "", ())
    with pytest.raises(ValueError, match="got 'Don', expected one of"):
        listen(io.StringIO('{"event": "Don"}\n'), heard.append)


def test_a_failure_names_the_module_and_the_end_of_its_log(tmp_path):
    log = tmp_path / "denoise.log"
    log.write_text("a\nb\n")
    text = failure("denoise", 1, Error("KeyError: 'x'", False), log, "unet.mid")
    assert text.startswith("denoise: KeyError: 'x' (last module: unet.mid)") and text.endswith("| b")
    assert failure("denoise", 1, Error("seed: got -1", True), log, "unet.mid") == "denoise: seed: got -1"
    assert "choose another folder" in explain(PermissionError(13, "Permission denied", "/x"))
    assert "free some space" in explain(OSError(28, "No space left on device", "/x"))


def test_environment_of_a_stage(make_config, monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    given = environment(make_config({"launch.threads": 3}))
    assert given["MALLOC_TRIM_THRESHOLD_"] == given["MALLOC_MMAP_THRESHOLD_"] == "131072"
    assert given["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert given["OMP_NUM_THREADS"] == given["MKL_NUM_THREADS"] == "3"
    assert str(ROOT) in given["PYTHONPATH"].split(os.pathsep)


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(32, 1, "8"), (32, 2, "8"), (8, 2, "4"), (2, 4, "1")])
def test_processes_on_gpus_share_the_cores(make_config, monkeypatch, cores, ranks, threads):
    """Rows of a canvas are little work, and threads of several ranks would wait for one another's cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("stages.workflow.machine.processors", lambda: cores)
    assert environment(make_config({"device": "cuda", "launch.nproc": ranks}))["OMP_NUM_THREADS"] == threads
    assert environment(make_config({"device": "cuda", "launch.threads": 3}))["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in environment(make_config({"launch.nproc": ranks}))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment(make_config({"device": "cuda"}))["OMP_NUM_THREADS"] == "5"


def test_monitor_sees_the_tree_and_its_module():
    code = "import subprocess, sys, time; x = bytearray(60_000_000); "
    inner = "x = bytearray(90_000_000); import time; time.sleep(1.5)"
    process = subprocess.Popen([sys.executable, "-c", f"{code} subprocess.run([sys.executable, '-c', {inner!r}])"])
    seen: list[Sample] = []
    monitor = Monitor(process.pid, 0.01, lambda: "unet.down.0", seen.append).start()
    process.wait()
    monitor.stop()
    assert monitor.peak.rss > 150_000_000 + usage(os.getpid()).rss * 0.5
    assert monitor.peak.rss == max(sample.rss for sample in seen)
    assert monitor.peak.anon + monitor.peak.file == monitor.peak.rss
    assert monitor.heaviest == [("unet.down.0", monitor.peak.rss)]
    assert monitor.child_peak > 60_000_000
    assert peak_rss(process.pid) == 0
    assert usage(process.pid) == (0, 0)


def test_processes_that_end_under_the_look_are_none(monkeypatch):
    def gone(*_):
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(os, "scandir", gone)
    monkeypatch.setattr(os, "listdir", gone)
    assert descendants(os.getpid()) == []


@pytest.mark.parametrize("mode", ["watchdog", "off"])
def test_a_stage_that_nobody_watches_is_stopped(mode):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
    enforcer = enforce.start(mode, 10**12)
    enforcer.adopt(process.pid)

    def broken():
        raise ZeroDivisionError("no module")

    monitor = Monitor(process.pid, 0.01, broken, enforcer.look, blind=enforcer.lost).start()
    code = process.wait()
    monitor.stop()
    assert (code, enforcer.blind) == ((-9, "ZeroDivisionError: no module") if mode == "watchdog" else (0, ""))


def test_the_timeline_is_thinned_but_keeps_the_peak():
    monitor = Monitor(os.getpid(), 1, lambda: "", lambda sample: None)
    for number in range(20_000):
        monitor._keep(Sample(float(number), 10**9 if number == 12_345 else number, 0, 0, "", number % 5_003))
    assert 900 < len(monitor.timeline) <= 2000
    assert max(sample.rss for sample in monitor.timeline) == 10**9
    assert max(sample.vram for sample in monitor.timeline) == 5_002
    assert [sample.seconds for sample in monitor.timeline] == sorted(sample.seconds for sample in monitor.timeline)


def test_enforcer_off_only_watches():
    enforcer = enforce.start("off", 1)
    enforcer.adopt(os.getpid())
    enforcer.look(Sample(0.0, 10, 10, 0, ""))
    assert enforcer.violation is None
    assert enforce.start("watchdog", 1).kind == "watchdog"


def test_marks_carry_the_module_and_the_bytes_on_the_device():
    view = mmap.mmap(-1, MARK_BYTES)
    progress = Progress(None, view)
    assert (read_mark(view), read_device_bytes(view)) == ("", 0)
    progress.device_bytes(747 * 10**6)
    progress.mark("up_blocks." * 100)
    assert read_mark(view).startswith("up_blocks.up_blocks.") and read_device_bytes(view) == 747 * 10**6
    progress.mark("conv_out")
    assert read_mark(view) == "conv_out"


def test_a_stage_tells_what_the_gpu_holds_once_one_is_in_use(monkeypatch):
    view, used, looks = mmap.mmap(-1, MARK_BYTES), [], []

    def is_initialized() -> bool:
        looks.append(None)
        if "over" in used:
            raise SystemExit  # ends the thread
        return bool(used)

    gpu = SimpleNamespace(is_initialized=is_initialized, memory_reserved=lambda: 5)
    gpu.device_count, gpu.max_memory_reserved = lambda: 2, lambda device: 7 * device
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=gpu))
    stage_process.report_vram(Progress(None, view), 0.005)
    wait_for(lambda: len(looks) > 3)
    assert (read_device_bytes(view), stage_process.peak_vram()) == (0, [])
    used.append("yes")
    wait_for(lambda: read_device_bytes(view) == 5)
    assert stage_process.peak_vram() == [7]
    used.append("over")
    wait_for(lambda: "vram" not in [thread.name for thread in threading.enumerate()])


def test_progress_holds_back_but_loses_no_step(monkeypatch):
    events: list[Event] = []
    milliseconds = itertools.count(1000)
    monkeypatch.setattr("stages.context.time", SimpleNamespace(monotonic=lambda: next(milliseconds) / 1000))
    progress = Progress(events.append)
    progress.start(1000, "tiles", done=1)
    for _ in range(999):
        progress.advance()
    progress.flush()
    assert 8 < len(events) < 20  # 999 pieces of a millisecond
    assert sum(event.n for event in events if isinstance(event, Advance)) == 999
