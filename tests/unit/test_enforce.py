"""The memory cgroup: made, entered, kept, removed; where none can be made, refused or done without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.config import ConfigError
from stages.memory.monitor import Sample, usage
from stages.workflow import cgroup, enforce

EAT = "import sys; data = bytearray(int(sys.argv[1])); data[::4096] = b'x' * len(data[::4096]); print(len(data))"


def possible() -> bool:
    try:
        cgroup.Cgroup.create(100_000_000, "probe").remove()
    except OSError:
        return False
    return True


needs_cgroup = pytest.mark.skipif(not possible(), reason="this process cannot make a memory cgroup")


def eat(enforcer: enforce.Enforcer, size: int) -> subprocess.CompletedProcess[str]:
    command = enforcer.command([sys.executable, "-c", EAT, str(size)])
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_cgroup
def test_the_kernel_ends_a_stage_over_its_limit_and_the_group_goes():
    budget = usage(os.getpid()).rss + 200_000_000
    enforcer = enforce.start("cgroup", budget, what="decode")
    assert enforcer.kind == "cgroup"
    assert enforcer.cgroup is not None
    path = enforcer.cgroup.path
    assert path.name == f"highres-{os.getpid()}-decode"
    assert 150_000_000 < enforcer.cgroup.limit < 250_000_000  # what the runner, this process, leaves of the budget
    enforcer.look(Sample(1.5, 250, 200, 50, "up_blocks.3"))
    ended = eat(enforcer, 600_000_000)
    assert ended.returncode == -9
    enforcer.stop()
    assert enforcer.violation is not None
    assert enforcer.violation.module == "up_blocks.3"
    assert "page cache included" in enforcer.by_kernel
    assert not path.exists()


@needs_cgroup
def test_within_the_limit_nothing_happens():
    enforcer = enforce.start("auto", usage(os.getpid()).rss + 200_000_000)
    ended = eat(enforcer, 50_000_000)
    enforcer.stop()
    assert (ended.returncode, ended.stdout.strip()) == (0, "50000000")
    assert enforcer.violation is None


@needs_cgroup
def test_page_cache_over_the_limit_is_reclaimed(tmp_path):
    if enforce.in_memory(tmp_path):
        pytest.fail(f"{tmp_path} is in memory; run with --basetemp=FOLDER_ON_DISK")
    copy = "import sys; f = open(sys.argv[1], 'wb'); [f.write(bytes(1 << 20)) for _ in range(200)]; f.close(); "
    copy += "print(sum(len(b) for b in iter(lambda f=open(sys.argv[1], 'rb'): f.read(1 << 20), b'')))"
    group = cgroup.Cgroup.create(60_000_000, "cache")
    ended = subprocess.run(group.command([sys.executable, "-c", copy, str(tmp_path / "file")]), capture_output=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, b"209715200")
    assert group.usage()["peak"] <= 60_000_000
    assert group.oom_kills() == 0
    group.remove()
    assert not group.path.exists()


@needs_cgroup
def test_what_a_crashed_runner_left_is_swept():
    group = cgroup.Cgroup.create(50_000_000, "x")
    ended = subprocess.run(["true"], check=False)
    assert ended.returncode == 0
    left = group.path.parent / f"{cgroup.PREFIX}{2**22 + 1}-denoise"  # no such process
    left.mkdir()
    cgroup.sweep(group.path.parent)
    assert not left.exists()
    assert group.path.exists()  # its runner is alive
    group.remove()


def fake_proc(tmp_path: Path, membership: str, mountinfo: str) -> Path:
    (tmp_path / "cgroup").write_text(membership)
    (tmp_path / "mountinfo").write_text(mountinfo)
    return tmp_path


def test_v2_takes_the_nearest_group_that_hands_memory_down(tmp_path):
    root = tmp_path / "fs"
    scope = root / "user.slice" / "app.slice" / "run.scope"
    scope.mkdir(parents=True)
    for folder, controllers in ((scope, ""), (scope.parent, "cpu memory pids"), (root, "memory")):
        (folder / "cgroup.subtree_control").write_text(controllers + "\n")
    proc = fake_proc(
        tmp_path,
        "0::/user.slice/app.slice/run.scope\n",
        f"30 23 0:26 / {root} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
    )
    assert list(cgroup.places(proc)) == [(scope.parent, 2)]


def test_v1_takes_the_own_group_and_a_container_its_mount(tmp_path):
    root = tmp_path / "memory"
    (root / "jobs" / "a").mkdir(parents=True)
    line = f"35 31 0:32 /docker/x {root} rw,relatime - cgroup cgroup rw,memory\n"
    assert list(cgroup.places(fake_proc(tmp_path, "4:memory:/docker/x/jobs/a\n", line))) == [(root / "jobs" / "a", 1)]
    assert list(cgroup.places(fake_proc(tmp_path, "4:memory:/elsewhere\n", line))) == [(root, 1)]
    assert list(cgroup.places(fake_proc(tmp_path, "4:cpu:/docker/x\n", line))) == []


def test_without_a_controller_auto_watches_and_cgroup_refuses(monkeypatch):
    monkeypatch.setattr(cgroup, "places", lambda proc: iter(()))
    assert enforce.start("auto", 500_000_000).kind == "watchdog"
    with pytest.raises(ConfigError, match=r"memory\.enforce: got 'cgroup'.*memory\.enforce=watchdog"):
        enforce.start("cgroup", 500_000_000)


def test_a_group_that_cannot_be_entered_is_given_back(monkeypatch, tmp_path):
    monkeypatch.setattr(cgroup, "places", lambda proc: iter([(tmp_path, 2)]))
    monkeypatch.setattr(cgroup.Cgroup, "_configure", lambda self: (self.path / "cgroup.procs").mkdir())
    with pytest.raises(cgroup.Unavailable, match=r"[Dd]irectory"):
        cgroup.Cgroup.create(1 << 30, "x")


def test_v2_limits_and_events(tmp_path):
    for name in ("memory.max", "memory.swap.max", "memory.oom.group"):
        (tmp_path / name).write_text("max\n")
    group = cgroup.Cgroup(tmp_path, 2, 123_000_000)
    group._configure()
    assert [(tmp_path / name).read_text() for name in ("memory.max", "memory.swap.max", "memory.oom.group")] == [
        "123000000",
        "0",
        "1",
    ]
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 17\noom 2\noom_kill 2\noom_group_kill 1\n")
    (tmp_path / "memory.stat").write_text("anon 90\nfile 30\nkernel 5\n")
    assert group.oom_kills() == 2
    assert group.usage() == {"anon": 90, "file": 30}  # no memory.peak before Linux 5.19
    (tmp_path / "memory.peak").write_text("123\n")
    assert group.usage()["peak"] == 123
