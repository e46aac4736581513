"""Every family at full width fits into 800 MB on a CPU as it comes: planned on meta, from headers without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from benchmarks import random_checkpoint
from stages import denoise, text_encode
from stages.families.facts import facts_of
from stages.families.looking import Looking, StageLook
from stages.families.opening import open_checkpoint
from stages.families.qwen3 import TOKENS
from stages.files import read_json, write_json
from stages.job import Job
from stages.memory.planner import Chosen, StageProfile, plan_stage
from stages.schema import Config
from stages.workflow.complete import complete

RUNNER, BASE = 45_000_000, 285_000_000  # bytes, as measured: the runner, and a stage's process without weights
# equal blocks ask for no more memory than one of them
FEW = {
    "sdxl": "text_encoder=2,text_encoder_2=2",
    "sd3": "transformer=2,text_encoder=2,text_encoder_2=2,text_encoder_3=2",
    "flux": "transformer=1,text_encoder=2,text_encoder_2=2",
    "flux2_klein": "transformer=1,text_encoder=28",
}
TILES = {  # pixels a side
    "sdxl": {"fp32": 768},
    "sd3": {"bf16": 1024, "fp32": 768},
    "flux": {"bf16": 768, "fp32": 512},
    "flux2_klein": {"bf16": 640, "fp32": 320},
}


@pytest.fixture(scope="module", params=[pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "flux", "flux2_klein"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("full-width") / request.param
    random_checkpoint.main([request.param, str(to), "--holes", "--layers", FEW[request.param]])
    return to


def looking(folder: Path, dtype: str) -> Looking:
    model = {"name": "auto", "family": "auto", "path": str(folder)}
    chosen = {"prompt": "a cat", "model": model, "scheduler": {"name": "checkpoint"}, "technique": {"dtype": dtype}}
    config = OmegaConf.merge(OmegaConf.structured(Config), chosen, {"output_dir": str(folder.parent)})
    assert isinstance(config, DictConfig)
    job: Job = complete(config)
    checkpoint = open_checkpoint(job.config, facts_of(job.config).opened, print)
    return Looking(config=job.config, regions=job.regions, checkpoint=checkpoint)


def planned(name: str, look: StageLook) -> Chosen:
    options = {"imports": 0, "extra": look.extra, "models": look.models, "rate": 1e11, "seconds": 0.0}
    return plan_stage(StageProfile(name=name, base=BASE, **options), 800_000_000, RUNNER)


def test_a_picture_of_2048_pixels_in_800_mb(folder: Path) -> None:
    for dtype, tile in TILES[folder.name].items():
        found = looking(folder, dtype)
        assert (found.config.width, found.config.height, found.config.denoise.tile_size) == (2048, 2048, tile)
        look = denoise.look(found)
        chosen = planned("denoise", look)
        (choice,) = chosen.choices.values()
        assert 600e6 < chosen.peak < 800e6 and choice.group % look.models[0].together == 0
    assert planned("text_encode", text_encode.look(found)).peak < 800e6  # in float32


def test_a_distilled_model_holds_no_negative_prompt(tmp_path: Path) -> None:
    random_checkpoint.main(["flux2_klein", str(tmp_path / "small"), "--small", "--holes"])
    index, least = tmp_path / "small" / "model_index.json", {}
    for distilled in (True, False):
        write_json(index, {**read_json(index), "is_distilled": distilled})
        (model,) = denoise.look(looking(tmp_path / "small", "fp32")).models
        least[distilled] = min(line.fixed for line in model.cuts[0].lines)
    assert least[False] - least[True] == TOKENS * 96 * 4  # float32, as wide as three layers of its text encoder
