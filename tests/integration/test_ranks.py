"""Ranks: several processes make the canvas of one, to the bit; a lost one is named, and any number goes on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from in_process import Work

from stages.config import ROOT
from stages.documents import save_text
from stages.events import Done, Error
from stages.files import write_json, write_text
from stages.plans import StagePlan
from stages.workflow.launch.local import listen

KILL = ROOT / "tests" / "helpers" / "kill"
VALUES = {
    "scheduler.class_name": "EulerAncestralDiscreteScheduler",  # it draws noise in steps
    "width": 160,
    "denoise.dilated.enabled": True,
    "denoise.num_inference_steps": 6,
    "launch.threads": 1,
    "launch.timeout": 30,
}
PLAN = {"denoise": StagePlan(group_size=4)}


class Ranked(Work):
    """Stages of one run, those with ranks as the runner starts them."""

    def start(
        self, stage: str, ranks: int, values: dict | None = None, hosts: tuple[str, ...] = (), **more: str
    ) -> tuple[int, list, str]:
        """(exit code, its last word and the GPUs' peaks, what was printed); ``hosts``: arguments of one of several."""
        config = self.config({**VALUES, **(values or {})})
        write_text(self.output_dir / config.run / "config.yaml", save_text(config))
        write_json(self.output_dir / config.run / "plan.json", {name: one.as_json() for name, one in PLAN.items()})
        command = [
            sys.executable,
            "-m",
            "stages.ranks",
            "--nproc",
            str(ranks),
            *hosts,
            stage,
            str(self.output_dir / "test"),
        ]
        reader, writer = os.pipe()
        search = os.pathsep.join([str(KILL)] * ("HIGHRES_KILL" in more) + [str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **more}
        done = subprocess.run(
            [*command, "--events", str(writer)],
            pass_fds=(writer,),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        os.close(writer)
        with os.fdopen(reader) as events:
            first = ranks * int(hosts[-1]) if hosts else 0
            return done.returncode, list(listen(events, lambda event: None, first)), done.stdout + done.stderr


def begun(output_dir: Path, checkpoint: Path) -> tuple[Ranked, dict[str, Path]]:
    """A run as far as the guide, and where its stages' folders are."""
    work = Ranked(output_dir, checkpoint)
    work.run(VALUES, until="guide", plan=PLAN)
    return work, {name: state.entry.path for name, state in work.states(work.config(VALUES)).items()}


@pytest.fixture(scope="module")
def single(small: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The stages' folders of a run by one process a stage."""
    work, folders = begun(tmp_path_factory.mktemp("single"), small("sd15"))
    for stage in ("denoise", "decode"):
        code, _, said = work.start(stage, 1)
        assert code == 0, said
    return folders


@pytest.fixture(scope="module")
def several(small: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranked, dict[str, Path]]:
    """The same run elsewhere, as far as the guide."""
    return begun(tmp_path_factory.mktemp("several"), small("sd15"))


def equal(folder: Path, expected: Path) -> bool:
    """Whether both hold the same files, to the byte, but for their manifests."""
    found, wanted = ({p.relative_to(one): p for p in one.rglob("*.safetensors")} for one in (folder, expected))
    assert found.keys() == wanted.keys() and found
    return all(path.read_bytes() == wanted[name].read_bytes() for name, path in found.items())


def free_endpoint() -> str:
    """A TCP port of this host that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.torch
def test_a_lost_rank_is_named_and_one_or_two_go_on_to_the_same_bytes(several, single) -> None:
    work, folders = several
    code, (last, resumed, _), said = work.start("denoise", 2, HIGHRES_KILL="denoise:turn:3:rank1")
    assert code == 1 and isinstance(last, Error), said
    assert last.message.startswith("rank 1 of 2 ended by signal SIGKILL") and not last.expected
    assert not (folders["denoise"] / "manifest.json").exists()
    code, (last, resumed, _), said = work.start("denoise", 1, HIGHRES_KILL="denoise:advance:1:rank0")
    assert resumed in ("step 1 of 3", "step 2 of 3") and isinstance(last, Error), said
    endpoint = free_endpoint()
    with ThreadPoolExecutor() as pool:  # two hosts, each with a rank
        hosts = [("--nnodes", "2", "--rdzv-endpoint", endpoint, "--node-rank", str(node)) for node in (0, 1)]
        for code, (last, _, _), said in pool.map(lambda host: work.start("denoise", 1, hosts=host), hosts):
            assert code == 0 and isinstance(last, Done), said
    assert equal(folders["denoise"], single["denoise"])


@pytest.mark.torch
def test_decoded_tiles_are_shared(several, single) -> None:
    work, folders = several
    shutil.copytree(single["denoise"], folders["denoise"], dirs_exist_ok=True)
    code, (last, _, _), said = work.start("decode", 2)
    assert code == 0 and isinstance(last, Done) and last.status == "ran", said
    assert equal(folders["decode"], single["decode"])
