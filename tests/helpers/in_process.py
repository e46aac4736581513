"""Real stages of the real pipeline, run one after the other in the test's own process: no imports to wait for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from omegaconf import DictConfig, OmegaConf

from stages import PIPELINE, PROFILE, __main__
from stages.config import resolve
from stages.context import Progress
from stages.documents import escape_all, save_text
from stages.events import Event, Note
from stages.files import write_json, write_text
from stages.job import Job
from stages.plans import StagePlan
from stages.schema import Config
from stages.workflow.graph import StageState, active, build, seen, state_of
from stages.workflow.model import take_channels
from stages.workflow.store import Store
from stages.workflow.validate import validate

if TYPE_CHECKING:
    from stages.memory.planner import StageProfile

# 64x64 pixels are the native size of the tiny models: 8x8 latents, which their three downsamplers can halve
SMALL = {
    "model": {"name": "tiny", "family": "sd", "native_size": 64, "size_multiple": 8},
    "scheduler": {"name": "ddim", "class_name": "DDIMScheduler"},
    "technique": {"dtype": "fp32"},
    "prompt": "a cat",
    "width": 128,
    "height": 96,
    "lowres": {"num_inference_steps": 2},
    "denoise": {"num_inference_steps": 4, "strength": 0.5},
    "decode": {"tile_size": 64, "overlap": 16, "halo": 16},
    "guide": {"tile_size": 64},
}


def small_config(checkpoint: Path, output_dir: Path, values: dict[str, Any] | None = None) -> DictConfig:
    """A resolved, validated config: ``SMALL`` with dotted ``values`` over it."""
    fixed = {"model": {"path": str(checkpoint)}, "output_dir": str(output_dir)}
    config = OmegaConf.merge(OmegaConf.structured(Config), SMALL, fixed)
    for key, value in (values or {}).items():
        OmegaConf.update(config, key, escape_all(value))
    assert isinstance(config, DictConfig)
    take_channels(config, checkpoint if checkpoint.is_dir() else None, (values or {}).keys())
    config = resolve(config)
    config.run = config.run or "test"
    validate(config)
    Job.of(config)
    return config


def look(config: DictConfig, *only: str) -> dict[str, StageProfile]:
    """What the process that looks at the models finds; ``only`` for these stages, which is faster."""
    from stages import profile

    job = Job.of(config)
    state = state_of(job, Store(Path(job.config.output_dir) / ".store"), PROFILE, {})
    stages = [stage for stage in profile.active(job.config) if not only or stage.module in only]
    with patch.object(profile, "active", lambda config: stages):
        return profile.profile_run(seen(job, state, {}), job.regions)


class Work:
    """An output folder, and stages to run on it; ``events`` are those of the last stage that ran."""

    def __init__(self, output_dir: Path, checkpoint: Path) -> None:
        self.output_dir, self.checkpoint = output_dir, checkpoint
        self.events: list[Event] = []

    def config(self, values: dict[str, Any] | None = None) -> DictConfig:
        return small_config(self.checkpoint, self.output_dir, values)

    def states(self, config: DictConfig) -> dict[str, StageState]:
        return {state.name: state for state in build(Job.of(config), Store(self.output_dir / ".store"), verify=False)}

    def run(
        self,
        values: dict[str, Any] | None = None,
        *,
        until: str = "stitch",
        plan: dict[str, StagePlan] | None = None,
        force: bool = False,
    ) -> dict[str, Path]:
        """Run the active stages up to ``until`` (what is there is reused); returns their folders in the store.

        ``plan``: stage -> its plan; without one weights are resident.
        """
        config = self.config(values)
        run_dir = self.output_dir / config.run
        write_text(run_dir / "config.yaml", save_text(config))
        write_json(run_dir / "plan.json", {name: one.as_json() for name, one in (plan or {}).items()})
        states = self.states(config)
        for stage in active(config, PIPELINE):
            self.events = []
            progress = Progress(self.events.append)
            self.status = __main__.run(stage.name, run_dir, "stages", progress, force and stage.name == until)
            if stage.name == until:
                break
        return {name: state.entry.path for name, state in states.items()}

    @property
    def notes(self) -> list[str]:
        """What the last stage said to the person."""
        return [event.text for event in self.events if isinstance(event, Note)]


def payload(folder: Path) -> dict[str, Any]:
    """The manifest of a finished result."""
    return json.loads((folder / "manifest.json").read_text())


def stopped_at(monkeypatch: pytest.MonkeyPatch, *calls: int) -> list[int]:
    """Has samplers stopped (``KeyboardInterrupt``) as those steps from now begin; every step that begins is in the
    list."""
    from stages.canvas.sampler import Sampler

    advance, steps = Sampler.advance, list[int]()

    def advanced(self: Sampler, *args: Any) -> None:
        steps.append(self.step)
        if len(steps) in calls:
            raise KeyboardInterrupt
        advance(self, *args)

    monkeypatch.setattr(Sampler, "advance", advanced)
    return steps
