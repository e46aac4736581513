"""What a run is made from is read once and does not change."""

from dataclasses import FrozenInstanceError

import pytest
from omegaconf.errors import ReadonlyConfigError

from stages.config import ConfigError
from stages.documents import load, save_text
from stages.files import write_text
from stages.job import Job
from stages.tiles import Size
from stages.workflow.complete import complete

REGION = {"prompt": "snow ${x}", "box": [0, 0, 1024, 2048], "seed": 3}


def test_a_job_is_what_the_config_says(make_config):
    job = complete(make_config({"memory.budget": "1GiB", "technique.dtype": "fp32", "run": "x", "regions": [REGION]}))
    assert (job.budget, job.device_budget, job.dtype, job.run) == (2**30, None, "fp32", "x")
    assert [region.prompt for region in job.regions.regions] == ["a cat", "snow ${x}"]
    assert Job.of(make_config({"memory.device_budget": "2GB"})).device_budget == 2 * 10**9
    with pytest.raises(ConfigError, match=r"memory\.device_budget: got 'some'"):
        Job.of(make_config({"memory.device_budget": "some"}))


def test_texts_that_are_not_padded_are_planned_by_their_bytes(make_config):
    keys = {"model.family": "z_image", "model.latent_channels": 16, "model.patch": 2}
    for prompt, tokens in (("a cat", 64), ("ü" * 13, 128), ("a" * 10_000, 512)):
        assert Job.of(make_config({**keys, "prompt": prompt})).config.model.text_tokens == tokens
    assert Job.of(make_config({**keys, "model.text_tokens": 100})).config.model.text_tokens == 100
    assert Job.of(make_config()).config.model.text_tokens is None


def test_nothing_changes_it(make_config):
    config = make_config({"regions": [REGION]})
    job = Job.of(config)
    with pytest.raises(ReadonlyConfigError):
        job.config.seed = 1
    with pytest.raises(ReadonlyConfigError):
        job.config.denoise.strength = 1.0
    with pytest.raises(FrozenInstanceError):
        job.budget = 1  # type: ignore[misc]
    config.seed = 5  # the caller's own stays the caller's
    assert job.config.seed == 0


def test_names_and_canvases_are_copies(make_config):
    job = Job.of(make_config({"regions": [REGION]}))
    named, small = job.named("a-${b}"), job.at(Size(512, 512))
    assert (job.run, named.run, named.config.run) == (None, "a-${b}", "a-${b}")
    assert (small.config.width, small.regions.size, job.config.width) == (512, (512, 512), 2048)
    assert small.at(Size(2048, 2048)).regions.size == job.regions.size
    with pytest.raises(ReadonlyConfigError):
        small.config.width = 8


def test_a_stage_process_reads_the_same_job(make_config, tmp_path):
    job = complete(make_config({"regions": [REGION], "memory.device_budget": "1GB"})).named("x")
    write_text(tmp_path / "config.yaml", save_text(job.config))
    assert Job.of(load(tmp_path / "config.yaml")) == job
