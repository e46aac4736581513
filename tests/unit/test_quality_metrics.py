"""What judges the embedded model, on inputs whose figures are known."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._quality_bands import by_name, mean_energy, names, octaves
from benchmarks._quality_counts import WORDS, asks_for, doubled, known, pair_scenes, questions
from benchmarks._quality_features import features_of, frechet_distance
from benchmarks._quality_scenes import Scene, held_out, pictures
from benchmarks._quality_specks import paint, sky_of, specks, true_sky
from benchmarks.embedded_quality import PARTS, Row
from training.captions import caption
from training.classifier import load_classifier
from training.counter import count
from training.finder import count_parts
from training.scenes import MATERIALS
from training.specs import NEVER_TOGETHER, Spec, sample_spec


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    """16 held-out scenes ``[16,3,256,256]``."""
    return torch.cat(list(pictures(held_out(16))))


def blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 5, 1, 2, count_include_pad=False)


# distances


def test_equal_sets_are_no_distance_apart_and_shifted_ones_are_as_far_as_the_shift() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(400, 8))
    assert frechet_distance(one, one[::-1]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one + 0.5) == pytest.approx(8 * 0.25)
    assert frechet_distance(one, 3 * one) == pytest.approx(
        4 * np.cov(one, rowvar=False).trace() + 4 * (one.mean(0) ** 2).sum()
    )


def test_the_distance_is_that_of_the_root_of_the_product() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(60, 6)), rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6))
    first, second = (np.cov(x, rowvar=False) for x in (one, other))
    root = np.trace(np.real(sqrtm(first @ second)))
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(one, other) == pytest.approx(expected)


def test_fewer_pictures_than_features_give_a_number() -> None:
    one = np.random.default_rng(2).normal(size=(5, 12))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_blurred_scenes_are_further_from_scenes_than_other_scenes_are(scenes: Tensor) -> None:
    networks = {"classifier": load_classifier().features}
    one, other, soft = (
        features_of([images], networks)["classifier"] for images in (scenes[::2], scenes[1::2], blurred(scenes[::2]))
    )
    assert one.shape == (8, 512)
    assert frechet_distance(one, soft) < frechet_distance(one, other) < frechet_distance(one, -other)


# sharpness


@pytest.mark.parametrize(("pixels", "band"), [(3, 0), (6, 1), (12, 2), (24, 3), (48, 4)])
def test_a_wave_counts_in_its_octave(pixels: int, band: int) -> None:
    wave = torch.sin(torch.arange(256) * 2 * torch.pi / pixels).expand(1, 3, 256, 256)
    energy = octaves(wave)[0]
    assert energy[band] > 0.95 * energy.sum()
    assert len(names()) == len(energy)


def test_blurred_scenes_lose_the_fine_octaves_and_keep_the_coarse(scenes: Tensor) -> None:
    plain, soft = (mean_energy([octaves(images)]) for images in (scenes, blurred(scenes)))
    shares = list(by_name(soft, plain).values())
    assert shares[0] < 0.15 and shares[1] < 0.5 and shares[-1] > 0.9
    assert list(by_name(plain, plain).values()) == [1.0] * len(shares)


def test_twice_the_contrast_is_four_times_the_energy(scenes: Tensor) -> None:
    ratio = mean_energy([octaves(scenes)]) / mean_energy([octaves(scenes[:8] / 2), octaves(scenes[8:] / 2)])
    assert ratio == pytest.approx([4] * len(ratio), rel=1e-4)


# counting


def test_prompts_ask_for_one_of_each_word() -> None:
    asked = questions(20)
    assert [one.word for one in asked] == [
        word for index, word in enumerate(WORDS) for _ in range(3 if index < 4 else 2)
    ]
    assert asked == questions(20)
    assert all("moon" in one.prompt for one in asked if one.word == "moon")
    assert all(
        any(w in one.prompt for w in ("boat", "yacht", "ship", "steamer", "vessel", "liner"))
        for one in asked
        if one.word == "boat"
    )


def test_a_second_one_is_laid_into_the_scene_where_there_is_room() -> None:
    image, ids = torch.zeros(1, 3, 32, 128), torch.zeros(1, 32, 128, dtype=torch.uint8)
    image[..., 10:20, 20:30], ids[..., 10:20, 20:30] = 1, MATERIALS.index("moon")
    two = doubled(image, ids, "moon")
    assert two is not None and torch.equal(two, image + torch.roll(image, 34, -1))
    ids[..., 10:20, 30:110] = MATERIALS.index("moon")
    assert doubled(image, ids, "moon") is None


def test_parts_count_that_are_sure_and_not_much_smaller_than_the_largest() -> None:
    probability = torch.zeros(32, 32)
    probability[2:8, 2:8] = 0.9
    assert count_parts(probability) == 1
    probability[2:8, 20:26] = 0.9
    assert count_parts(probability) == 2
    probability[20:22, 10:12] = 0.9  # four cells: enough for itself, little beside the others
    assert (count_parts(probability), count_parts(probability, share=0.25)) == (3, 2)
    probability[5, 8:20] = 0.2  # a faint bridge makes two parts one
    assert count_parts(probability, share=0.25) == 1
    assert count_parts(torch.full((8, 8), 0.4)) == 0


@pytest.mark.parametrize("word", ["house", "balloon"])
def test_none_one_and_two_are_counted(word: str) -> None:
    seen = [(truth, count(image, word)) for image, truth in known(word, 2)]
    assert sorted(truth for truth, _ in seen) == [0, 0, 1, 1, 2, 2]
    assert sum(truth == found for truth, found in seen) >= 5


def test_what_is_asked_is_what_the_spec_says() -> None:
    assert asks_for("boat", Spec(subject="ship")) and not asks_for("boat", Spec(subject="house"))
    assert asks_for("moon", Spec(body="crescent")) and not asks_for("moon", Spec(body="moon", weather="fog"))


# words never seen together


def test_training_never_says_held_out_pairs_together() -> None:
    rng = random.Random(0)
    specs = [sample_spec(rng) for _ in range(20000)]
    drawn = {(spec.subject, spec.setting) for spec in specs}
    assert not drawn & set(NEVER_TOGETHER)
    assert {subject for subject, _ in NEVER_TOGETHER} <= {spec.subject for spec in specs}
    said = [caption(rng, spec, 0) for spec in specs if spec.subject == "cactus"]
    assert not [
        text for text in said for word in ("meadow", "beach", "cliff", "lake", "forest", "snow") if word in text
    ]


def test_scenes_of_the_pairs_show_their_subjects() -> None:
    found = pair_scenes(len(NEVER_TOGETHER))
    assert [(one.spec.subject, one.spec.setting) for one in found] == list(NEVER_TOGETHER)
    for one in found[::4]:
        assert (one.render()[1] == MATERIALS.index(one.spec.subject)).any()


# specks


def sky(side: int = 384) -> np.ndarray:
    """A smooth sky with a little grain, dark above."""
    shade = np.linspace(90, 200, side)[:, None, None] + np.random.default_rng(0).normal(0, 1, (side, side, 3))
    return shade.round().clip(0, 255).astype(np.uint8)


def test_a_plain_sky_has_no_specks_and_painted_ones_are_found() -> None:
    picture, everywhere = sky(), np.ones((384, 384), bool)
    assert specks(picture, everywhere) == []
    inner = np.zeros_like(everywhere)
    inner[60:-60, 60:-60] = True
    spotted, painted = paint(picture, inner, 4, seed=1)
    found = specks(spotted, everywhere)
    near = [
        any(np.hypot(f.y - p.y, f.x - p.x) <= 2 + p.sigma and f.contrast * p.contrast > 0 for f in found)
        for p in painted
    ]
    assert sum(near) >= 3 and len(found) <= 4


def test_what_lies_outside_of_the_sky_or_is_long_is_no_speck() -> None:
    picture, where = sky(), np.ones((384, 384), bool)
    where[100:140, 100:140] = False
    picture[118:123, 118:123] = 20  # a spot that the sky does not include
    picture[250:254, 50:300] = 60  # a wire
    assert specks(picture, where) == []
    assert specks(picture, np.zeros_like(where)) == []


def test_the_sky_of_a_scene_is_sky() -> None:
    scene = Scene(Spec(time="day", setting="meadow", subject="house"), 3)
    image, ids = scene.render()
    picture = ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    found = sky_of(picture)
    truth = torch.isin(
        ids[0], torch.tensor([MATERIALS.index(name) for name in ("sky", "clouds")], dtype=torch.uint8)
    ).numpy()
    assert found.mean() > 0.5 * truth.mean()
    assert (found & ~truth).mean() < 0.01


def test_true_skies_are_whole_scenes() -> None:
    assert true_sky(0, side=128).shape == (128, 128, 3)


# the table


def test_rows_say_what_was_asked_and_by_how_much_it_was_missed() -> None:
    assert (Row("a", 0.9, 0.8, 1.2).missed, Row("a", 0.9, 0.8, 1.2).asked) == (0, "0.8 to 1.2")
    assert Row("a", 0.7, 0.8, 1.2).missed == pytest.approx(0.1) and Row("a", 1.5, 0.8, 1.2).missed == pytest.approx(0.3)
    assert Row("a", 30, low=33).missed == 3 and Row("a", 30, low=33).asked == "at least 33"
    assert Row("a", 3, high=2).missed == 1 and Row("a", 3, high=2).asked == "at most 2"
    assert Row("a", 3).missed == 0 and Row("a", 3).asked == "-"
    assert list(PARTS) == ["vae", "samples", "counting", "pairs", "attributes", "large"]


# samples


def test_a_sample_is_what_lowres_makes_of_its_prompt_and_seed(tmp_path: Path) -> None:
    from in_process import Work
    from PIL import Image

    from benchmarks._quality_samples import samples
    from stages.config import ROOT

    model, prompts = ROOT / "models" / "embedded", ["a castle at night", "a lighthouse on a cliff at sunset"]
    options = ("lowres.num_inference_steps=2", "technique.dtype=fp32")
    paths = samples(model, tmp_path / "made", prompts, *options, first_seed=4)
    size = {"width": 256, "height": 256, "model.native_size": 256, "guide.tile_size": 256}
    scheduler = {"scheduler.class_name": "DPMSolverMultistepScheduler", "lowres.guidance_scale": 4.0}
    done = Work(tmp_path / "runs", model).run({"prompt": prompts[1], "seed": 5, **size, **scheduler}, until="guide")
    with Image.open(paths[1]) as made, Image.open(done["guide"] / "lowres.png") as plain:
        difference = np.abs(np.asarray(made, dtype=int) - np.asarray(plain.convert("RGB"), dtype=int))
    assert difference.max() <= 1
    times = [path.stat().st_mtime_ns for path in paths]
    again = samples(model, tmp_path / "made", [prompts[0], "the sea"], *options, first_seed=4)
    assert again[0].stat().st_mtime_ns == times[0] and again[1].stat().st_mtime_ns > times[1]
