"""The budget changes speed, never the picture; too small a one is refused with the least that works."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import Command
from in_process import Work, look
from whole_run import Run, arguments, start

from stages.config import ROOT
from stages.job import Job
from stages.memory import disk
from stages.memory.planner import choices
from stages.plans import StagePlan
from stages.workflow import planning
from stages.workflow.graph import build
from stages.workflow.store import Store

# 264x392: tiles of one size on an odd canvas, so that groups end with a rest; the low-res picture is no square, whose
# smallest latents are one pixel in the tiny model: float32 kernels then choose by strides that mean nothing
CANVAS = {"width": 264, "height": 392, "lowres.num_inference_steps": 2, "denoise.num_inference_steps": 2}


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 4.0])
def test_every_kind_of_plan_gives_the_same_bytes(work: Work, tmp_path: Path, guidance: float) -> None:
    """Resident, block by block and leaf by leaf; smallest and largest rings and groups; with and without a copy."""
    values = {**CANVAS, "denoise.guidance_scale": guidance, "lowres.guidance_scale": guidance}
    values |= {"denoise.strength": 1.0, "denoise.tile_size": 128, "denoise.overlap": 32}
    profiles = look(work.config(values))
    expected = work.run(values)["stitch"].joinpath("image.png").read_bytes()

    def choose(which: str, prepared: bool) -> dict[str, StagePlan]:
        found = {}
        for name, profile in profiles.items():
            (model,) = profile.models
            ways = [way for way in choices(model, profile, 0) if way.model.resident != "all"]
            block = max(way.model.unit_limit or 0 for way in ways)
            wanted = [way for way in ways if (way.model.unit_limit == block) == which.startswith("block")]
            wanted = wanted or ways  # a VAE that rolls is cut in one way
            way = (min if which.endswith("small") else max)(wanted, key=lambda one: (one.group, one.model.ring_bytes))
            file = str(tmp_path / f"{name}-{prepared}.bin") if prepared else None
            group = way.group * max(1, model.micro_batch)
            found[name] = StagePlan(models={model.component: replace(way.model, prepared=file)}, group_size=group)
        return found

    for which in ("block small", "block large", "leaf small", "leaf large"):
        plan = choose(which, prepared=which.startswith("leaf"))
        assert plan["denoise"].model("unet").resident == ()
        other = Work(tmp_path / which, work.checkpoint)
        found = other.run(values, plan=plan)
        assert found["stitch"].joinpath("image.png").read_bytes() == expected, which


@pytest.mark.slow
def test_too_small_a_budget_is_refused_before_any_stage_and_the_least_works(finished: Run, tmp_path: Path) -> None:
    checkpoint = Path(finished.command.common[-1].partition("=")[2])
    command = Command(ROOT / "runner.py", tmp_path, checkpoint)
    values = {"width": 264, "height": 200}
    refused = command("run=x", *arguments(**values, **{"memory.budget": "290MB"}))
    assert refused.returncode == 1
    found = re.search(r"memory\.budget: got 290MB, but (\w+) needs at least (\d+) MB for 264x200", refused.stderr)
    assert found, refused.stderr
    assert f"Use memory.budget={found[2]}MB" in refused.stderr and "Traceback" not in refused.stderr
    assert not [
        path for path in (tmp_path / ".store").glob("[a-z]*") if path.name not in ("profile", "rehearsal", "weights")
    ]
    least = start(tmp_path, checkpoint, **values, **{"memory.budget": f"{found[2]}MB", "memory.enforce": "watchdog"})
    assert least.summary["peak_rss_bytes"] <= int(found[2]) * 10**6
    roomy = start(tmp_path / "roomy", checkpoint, **values, **{"memory.budget": "4GB"})
    assert roomy.image == least.image
    for run in (least, roomy):
        check_predictions(run)


def check_predictions(run: Run) -> None:
    """Never more than 3% below what was measured, and close: what a process touches besides weights and activations is
    measured on full-size models (there it is within 10%: tests/slow), a tiny one touches some 35 MB less."""
    for name, stage in run.stages.items():
        if name != "stitch":
            measured, predicted = stage["peak_rss_bytes"], stage["predicted_peak_rss_bytes"]
            assert 0.97 * measured <= predicted <= 1.15 * measured, (name, measured, predicted)


def test_predictions_of_the_shared_run(finished: Run) -> None:
    check_predictions(finished)


def test_plan_computes_nothing_and_predicts_every_stage(finished: Run, tmp_path: Path) -> None:
    checkpoint = Path(finished.command.common[-1].partition("=")[2])
    command = Command(ROOT / "runner.py", tmp_path, checkpoint)
    done = command("run=x", "stage=plan", *arguments())
    assert done.returncode == 0, done.stderr
    assert "nothing was computed" in done.stdout
    assert {path.name for path in (tmp_path / ".store").glob("[a-z]*")} == {"profile", "rehearsal"}
    for name in ("text_encode", "lowres", "guide", "denoise", "decode"):
        assert re.search(rf"{name} +run +\d+ MB +\S+ s", done.stdout), done.stdout


@pytest.mark.slow
def test_an_exact_decode_keeps_its_prediction_and_says_its_disk(finished: Run, tmp_path: Path) -> None:
    checkpoint = Path(finished.command.common[-1].partition("=")[2])
    values = {"decode.mode": "exact", "width": 1024, "height": 768, "guide.mode": "none", "memory.enforce": "off"}
    run = start(tmp_path, checkpoint, **values, **{"memory.budget": "4GB"})
    check_predictions(run)
    assert re.search(r"exact decode: up to 0\.\d GB of scratch space in .*/decode/", run.stdout), run.stdout
    before = run.image
    tight = {**values, "memory.budget": "420MB"}
    done = run.command("run=x", "stage=[decode,stitch]", "force=true", *arguments(**tight))
    assert done.returncode == 0, done.stderr
    check_predictions(run)
    assert run.stages["decode"]["status"] == "ran" and run.image == before
    plan = run.command("run=plan", "stage=plan", *arguments(**values, seed=6))
    assert re.search(r"disk: decode takes up to 0\.\d GB for scratch files in .*/decode/", plan.stdout), plan.stdout


def test_a_disk_too_small_for_an_exact_decode_is_refused_before_any_stage(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(tmp_path, Path(finished.command.common[-1].partition("=")[2]))
    config = work.config({"decode.mode": "exact", "width": 512, "height": 512})
    found = look(config)
    states = build(Job.of(config), Store(tmp_path / ".store"))
    needed = found["decode"].disk
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1000))
    with pytest.raises(planning.DoesNotFit, match=r"decode needs .* GB of scratch space.*decode\.mode=shared"):
        planning.check_disk(states, found.values())
    scratch = next(state for state in states if state.name == "decode").entry.path / f"{disk.SCRATCH}_decode"
    scratch.mkdir(parents=True)
    (scratch / "x.raw").write_bytes(bytes(1000))  # an interrupted pass goes on in what it has
    planning.check_disk(states, found.values())
