"""Figures of one machine are not another's: the look at the models is made again where they would differ."""

from pathlib import Path
from typing import Any

import pytest

from stages import PIPELINE, PROFILE, config
from stages.job import Job
from stages.workflow import machine
from stages.workflow.graph import differences, state_of
from stages.workflow.launch.local import environment
from stages.workflow.store import Store


@pytest.fixture
def look(make_config, tmp_path: Path):
    return lambda values=None: state_of(Job.of(make_config(values)), Store(tmp_path), PROFILE, {})


def cpu(name: str = "EPYC", flags: str = "fpu avx2 avx512f"):
    return lambda *names: {"model name": name, "flags": flags}.get(names[0], "")


CHANGES: dict[str, tuple[str, Any]] = {
    "another processor": ("cpu_field", cpu(name="Xeon")),
    "flags that matter": ("cpu_field", cpu(flags="fpu avx2 avx512f avx512_bf16")),
    "another version": ("version", lambda library: "9.9" if library == "diffusers" else "1.0"),
    "fewer processors": ("processors", lambda: 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_machine_or_version_has_another_fingerprint(look, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {"cpu_field": cpu(), "version": lambda library: "1.0", "processors": lambda: 2}.items():
        monkeypatch.setattr(machine, name, value)
    before = look()
    assert look().fingerprint == before.fingerprint
    monkeypatch.setattr(machine, "cpu_field", cpu(flags="fpu hypervisor avx2 avx512f"))  # no kernel hangs on it
    assert look().fingerprint == before.fingerprint
    monkeypatch.setattr(machine, *CHANGES[change])
    after = look()
    assert after.fingerprint != before.fingerprint
    assert differences(before.payload, after.payload) == "the machine or its libraries changed"


def test_threads_count_and_a_gpu_counts_where_it_computes(
    look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert look({"launch.threads": 3}).payload["machine"]["threads"] == 3
    for number, name in enumerate(("NVIDIA H100", "NVIDIA L4")):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        (tmp_path / "gpus" / str(number) / "information").write_text(f"Model: \t\t {name}\nIRQ: 1\n")
    monkeypatch.setattr(machine, "_GPUS", tmp_path / "gpus")
    assert "gpu" not in look().payload["machine"]
    assert look({"device": "cuda"}).payload["machine"]["gpu"] == ["NVIDIA H100", "NVIDIA L4"]


def test_results_of_other_stages_hold_on_every_machine(make_config, tmp_path: Path) -> None:
    for stage in PIPELINE:
        assert "machine" not in state_of(Job.of(make_config()), Store(tmp_path), stage, {}).payload


def test_libraries_are_asked_without_importing_them(make_config) -> None:
    found = machine.machine(make_config())
    assert all(found["libraries"].values()) and set(found["libraries"]) == {"torch", "diffusers", "transformers"}
    assert found["cpu"] and found["threads"] >= 1
    assert config.cpu_field("no such field") == ""


def test_libraries_imported_whole_take_more(look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIGHRES_LIGHT_IMPORTS", raising=False)
    before = look()
    monkeypatch.setenv("HIGHRES_LIGHT_IMPORTS", "0")
    assert look().fingerprint != before.fingerprint


@pytest.mark.parametrize(
    "values", [{}, {"device": "cuda"}, {"device": "cuda", "launch.nproc": 2}, {"launch.threads": 3}]
)
def test_a_stage_finds_the_look_where_the_runner_expects_it(
    look, make_config, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "processors", lambda: 64)
    expected = look(values)
    given = environment(Job.of(make_config(values)).config)
    monkeypatch.setenv("OMP_NUM_THREADS", given.get("OMP_NUM_THREADS", ""))
    assert look(values).fingerprint == expected.fingerprint
