"""Schedules and layers are tried before any work: what cannot be is refused by the plan, what can is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process import Work
from omegaconf import OmegaConf

from benchmarks import random_checkpoint
from stages import PROFILE, REHEARSAL
from stages.config import ConfigError
from stages.models.checkpoint import Checkpoint, CheckpointError
from stages.rehearsal import rehearse, spell


def tried(work: Work, values: dict[str, Any]) -> None:
    config = work.config(values)
    rehearse(config, Checkpoint.open(str(work.checkpoint), prediction_type=config.model.prediction_type))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lowres.num_inference_steps": 1000, "scheduler.options": {"steps_offset": 1}}, "cannot make 1000 steps"),
        ({"lowres.num_inference_steps": 60, "scheduler.class_name": "LCMScheduler"}, "cannot make 60 steps"),
        ({"scheduler.class_name": "FlowMatchEulerDiscreteScheduler"}, "cannot|can drive"),
        ({"scheduler.class_name": "VQDiffusionScheduler"}, "VQDiffusionScheduler"),
        ({"scheduler.class_name": "NoSuchScheduler"}, "a scheduler class of diffusers"),
        ({"scheduler.class_name": "DPMSolverSDEScheduler"}, "DPMSolverSDEScheduler"),
        ({"scheduler.options": {"prediction_type": "nan"}}, "It says: prediction_type given as nan"),
        ({"scheduler.options": {"beta_end": 1e9}}, r"scheduler \(lowres\).*It says: latents after the last step"),
        ({"scheduler.options": {"beta_start": "many"}}, "one that takes these options"),
        ({"scheduler.options": {"num_train_timesteps": 10**8}}, "num_train_timesteps: got 100000000, expected 1 to"),
        (
            {"scheduler.options": {"trained_betas": [0.1]}},
            "trained_betas: got '1 of them', expected as many",
        ),
        ({"text_encode.clip_skip": 99}, "text_encode.clip_skip: got 99, expected at most 3"),
    ],
)
def test_what_cannot_be_is_refused(work: Work, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tried(work, values)


def test_a_prediction_that_is_none_is_refused_without_a_look(work: Work) -> None:
    with pytest.raises(ConfigError, match=r"model\.prediction_type: got 'nan', expected one of epsilon"):
        work.config({"model.prediction_type": "nan"})


@pytest.mark.parametrize("values", [{}, {"guide.mode": "none"}, {"text_encode.clip_skip": 3}])
@pytest.mark.parametrize("name", ["KDPM2AncestralDiscreteScheduler", "HeunDiscreteScheduler", "DDPMScheduler"])
def test_what_can_be_is_left_alone(work: Work, name: str, values: dict[str, Any]) -> None:
    tried(work, {"scheduler.class_name": name, **values})


@pytest.mark.parametrize("kind", ["sd15", "flux", "z_image"])
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    """Of CLIP, T5 and Qwen3."""
    folder = tmp_path / kind
    random_checkpoint.main([kind, str(folder), "--small"])
    config = OmegaConf.create({"model": {"family": kind.replace("sd15", "sd")}})
    checkpoint = Checkpoint.open(str(folder))
    spell(config, checkpoint)
    name = "tokenizer_2" if kind == "flux" else "tokenizer"
    file = next(path for path in (folder / name).iterdir() if path.name in ("vocab.json", "tokenizer.json"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read .*Download the checkpoint again"):
        spell(config, checkpoint)


def test_other_steps_need_no_new_look() -> None:
    """They are rehearsed in the look where there is one, else by themselves."""
    assert "denoise.strength" in REHEARSAL.parameters and "denoise.strength" not in PROFILE.parameters
    assert set(REHEARSAL.parameters) == set(PROFILE.checks)
