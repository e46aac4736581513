"""Measures of the embedded model: prompts, added detail, borders against the lattice; refining the classifier."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks._quality_attributes import asked
from benchmarks._quality_runs import high_frequency_energy, moved_ratios
from stages.picture import seams
from stages.tiles import Tile
from training.captions import caption
from training.classifier import ATTRIBUTES, INPUT_SIZE, Classifier
from training.refine import refine, scenes, vary
from training.specs import SUBJECTS, sample_spec

TILES = [Tile(0, 0, 0, 0, 256, 136), Tile(0, 1, 0, 104, 256, 256)]


def lattice_picture(step_at_lattice: int, step_at_borders: int) -> np.ndarray:
    """Noise with a step at every eighth column, and another one at the columns where tiles end."""
    picture = np.random.default_rng(0).integers(90, 110, (256, 256, 3)).astype(int)
    for column in range(8, 256, 8):
        size = step_at_borders if column in (104, 136) else step_at_lattice
        picture[:, column:] += size if column % 16 else -size
    return picture.clip(0, 255).astype(np.uint8)


def test_sixty_four_prompts_ask_for_what_the_classifier_knows():
    prompts = asked()
    assert len(prompts) == len({one.prompt for one in prompts}) == 64
    assert all("time" in one.attributes and "setting" in one.attributes for one in prompts)
    assert {one.attributes.get("subject", "none") for one in prompts} == set(SUBJECTS)


def test_no_prompt_is_a_caption_of_the_grammar():
    rng = random.Random(0)
    captions = {caption(rng, sample_spec(rng), rng.randrange(8)) for _ in range(20000)}
    assert not captions & {one.prompt.lower() for one in asked()}


def test_bad_lines_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("noon | - | sea | waves\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts.txt:1: time 'noon' is none of day"):
        asked(path)
    path.write_text("day | sea | waves\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected time \| subject \| setting \| prompt"):
        asked(path)


def test_fine_detail_counts_and_smooth_shades_do_not():
    shade = np.repeat(np.linspace(0, 255, 256)[None], 256, axis=0)
    fine = shade.copy()
    fine[::2] += np.where(shade[::2] < 128, 20, -20)
    energies = [high_frequency_energy(Image.fromarray(x.astype(np.uint8))) for x in (shade, fine)]
    assert energies[0] < 1
    assert energies[1] > 90


def test_steps_between_all_latents_are_no_seam_and_higher_ones_at_borders_are():
    even = seams.measure([lattice_picture(10, 10)], TILES)
    assert even.ratio > 1.2  # 'elsewhere' has mostly lines inside of latents
    assert even.lattice_ratio == pytest.approx(1, abs=0.05)
    assert seams.measure([lattice_picture(10, 40)], TILES).lattice_ratio > 1.5


def test_an_edge_of_the_picture_on_a_border_is_seen_for_what_it_is():
    """A horizon makes the ratio high; it does so as well where no tile ends."""
    picture = np.random.default_rng(0).integers(90, 110, (256, 256, 3)).astype(np.uint8)
    picture[:, 136:] += 80
    seen = seams.measure([picture], TILES)
    moved = moved_ratios(seen.gradients, TILES, 8)
    assert seen.ratio > 2 and max(moved) > 2 and np.std(moved) > 0.3
    plain = seams.measure([lattice_picture(0, 0)], TILES)
    assert np.std(moved_ratios(plain.gradients, TILES, 8)) < 0.05


def test_refining_learns_rendered_scenes():
    torch.manual_seed(0)
    images, targets = scenes(0, 0, None)
    assert images.shape == (2 * len(SUBJECTS), 3, INPUT_SIZE, INPUT_SIZE)
    assert sorted(set(targets[:, 1].tolist())) == list(range(len(SUBJECTS)))
    model = Classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = refine(model, images, targets, seconds=1, batch=8, peak_lr=1e-3)
    assert any(not torch.equal(before[k], v) for k, v in after.state_dict().items())
    logits = after(vary(images[:4]))
    assert {name: out.shape for name, out in logits.items()} == {n: (4, len(v)) for n, v in ATTRIBUTES.items()}
