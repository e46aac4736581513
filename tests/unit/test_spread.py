"""How many ranks a stage gets, and what the plan makes of them."""

from __future__ import annotations

import os
from typing import Any

import pytest

from stages import PIPELINE, expanded
from stages import ranks as launcher
from stages.config import ConfigError
from stages.distributed import LOST, Place, Ranks
from stages.job import Job
from stages.memory.planner import Cut, Line, ModelProfile, StageProfile
from stages.ranks import environment
from stages.workflow import planning
from stages.workflow.spread import Spread, spread
from stages.workflow.validate import validate

HOSTS = {"launch.nnodes": 2, "launch.rdzv_endpoint": "host:29500"}


def test_tiles_are_shared_by_hosts_and_their_ranks(make_config):
    (denoise,) = (stage for stage in PIPELINE if stage.name == "denoise")
    found = spread(Job.of(make_config({**HOSTS, "launch.nproc": 5, "width": 512, "height": 512})), denoise)
    assert (found, found.ranks) == (Spread(hosts=2, each=4), 8)  # of nine tiles


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"launch.nproc": 4}, {"denoise": 4, "decode": 4}),
        ({"launch.nproc": 4, "width": 8192, "height": 256}, {"lowres": 4, "denoise": 4, "decode": 4}),
        ({"launch.nproc": 4, "decode.mode": "exact"}, {"denoise": 4}),
        ({"launch.nproc": 1000, "width": 512, "height": 512, "technique.dtype": "fp32"}, {"denoise": 9, "decode": 9}),
        ({"launch.nproc": 2, "guide.phases": [512]}, {"denoise_512": 2, "denoise": 2, "decode": 2}),
        ({**HOSTS, "launch.nproc": 4}, {"denoise": 8, "decode": 8}),
        ({**HOSTS, "launch.nnodes": 100}, {}),
    ],
)
def test_ranks_of_each_stage(make_config, values, expected):
    job = Job.of(make_config({"width": 1024, "height": 1024, **values}))
    found = {stage.name: spread(job, stage).ranks for stage in expanded(job.config)}
    assert {name: count for name, count in found.items() if count > 1} == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"launch.nproc": 0}, "launch.nproc: got 0, expected 1 or more"),
        ({"launch.nproc": 2, "device": "cuda:1"}, "launch.nproc: got 2, expected 1 with device=cuda:1"),
        ({"launch.backend": "nccl"}, "launch.backend: got 'nccl', expected auto or gloo on the CPU"),
        ({"launch.backend": "mpi"}, "launch.backend: got 'mpi', expected one of auto, gloo, nccl"),
        ({"launch.timeout": 0}, "launch.timeout"),
        ({"launch.nnodes": 2}, "launch.rdzv_endpoint: got None, expected HOST:PORT with launch.nnodes=2"),
        ({**HOSTS, "launch.rdzv_endpoint": "host"}, "launch.rdzv_endpoint: got 'host', expected HOST:PORT"),
        ({**HOSTS, "launch.node_rank": 2}, "launch.node_rank: got 2, expected 0 to 1"),
        ({**HOSTS, "force": True}, "force: got True, expected false"),
    ],
)
def test_what_cannot_be_is_refused(make_config, values, message):
    with pytest.raises(ConfigError, match=message):
        validate(make_config(values))


def test_a_rank_is_planned_with_its_part_of_the_tiles(make_config):
    line = Line(unit="a", fixed=1, slope=1, workspace=1)
    cut = Cut(limit=9, order=("a",), nbytes={"a": 9}, flops={"a": 1}, lines=(line,))
    model = ModelProfile(component="unet", weights=9, micro_batch=2, micro_batches=25, steps=1, cuts=(cut,))
    profile = StageProfile(name="denoise", base=100, imports=0, extra=0, models=(model,), rate=8.0, seconds=0.0)
    (stage,) = (one for one in PIPELINE if one.name == "denoise")
    for count, batches, rate in ((1, 25, 8.0), (2, 13, 4.0)):
        values = {"launch.nproc": count, "width": 1024, "height": 1024}
        found = planning._of_stage(profile, stage, Job.of(make_config(values)))
        assert (found.models[0].micro_batches, found.rate) == (batches, rate)


def test_shares_are_runs_that_make_the_whole():
    items = list(range(11))
    parts = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert [item for part in parts for item in part] == items and {len(part) for part in parts} == {3, 4}


def test_a_rank_alone_makes_everything_in_order():
    tenfold: Any = lambda item: 10 * item  # noqa: E731
    assert list(Ranks().ordered([3, 1, 2], tenfold, lambda item: ())) == [(3, 30), (1, 10), (2, 20)]


def test_a_rank_sees_its_own_gpu_only(monkeypatch):
    for visible, local, expected in ((None, 1, "1"), ("4,6", 1, "6"), ("4", 1, ""), ("", 0, "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        Place(local, 2, local).take_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_the_environment_is_torchruns(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = environment(0, 1, "host:29500", nodes=2, node=1)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["MASTER_PORT"]) == ("1", "0", "2", "29500")
    assert environment(0, 1, "[::1]:29500")["MASTER_ADDR"] == "::1"
    found = environment(1, 2, "127.0.0.1:29501")
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("1", "1", "2")
    assert int(found["OMP_NUM_THREADS"]) >= 1 and found["NCCL_NVLS_ENABLE"] == "0"
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert Place.told() == Place(1, 2, 1)


class Process:
    """Ends with each of ``codes`` in turn; the last one stays."""

    def __init__(self, *codes: int | None) -> None:
        self.codes = list(codes)

    def poll(self) -> int | None:
        return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([Process(0), Process(None, 0)], None),
        ([Process(0), Process(None)], None),  # the result is there: the others are of no use any more
        ([Process(None), Process(None, -9)], (1, -9)),
        ([Process(LOST), Process(None, None, -9)], (1, -9)),  # the cause, not who noticed it
        ([Process(LOST), Process(None)], (0, LOST)),  # it is there, and silent
    ],
)
def test_which_rank_failed(monkeypatch, processes, expected):
    monkeypatch.setattr(launcher, "_PATIENCE", 0.3)
    assert launcher.watch(processes) == expected
