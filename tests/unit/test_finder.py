"""Counting subjects: calibrated on rendered scenes with none, one, two and four of them, held out from training."""

import pytest
import torch
from torch import Tensor

from training.finder import CLASSES, Finder, count, scenes, subject_map
from training.scenes import View, render
from training.specs import Spec

PLACES = (("cliff", "sunset"), ("sea", "night"), ("beach", "day"), ("cliff", "day"), ("sea", "sunset"))
HELD_OUT = 2**40  # beyond every seed that training draws


def scene(place: int, number: int, subject: str, size: int = 192) -> Tensor:
    setting, time = PLACES[place % len(PLACES)]
    spec = Spec(time=time, setting=setting, subject=subject)
    return render(spec, torch.tensor([HELD_OUT + number]), torch.tensor([number % 8]), View.whole(1, size=size))[0]


def four(*parts: Tensor) -> Tensor:
    """Two by two: what a canvas of tiles looks like when every tile paints a scene of its own."""
    return torch.cat([torch.cat(parts[:2], -1), torch.cat(parts[2:], -1)], -2)


@pytest.mark.parametrize("place", range(len(PLACES)))
def test_counts_of_rendered_scenes(place: int) -> None:
    one, other = scene(place, 11 + place, "lighthouse"), scene(place + 1, 37 + place, "lighthouse")
    empty, also = scene(place, 11 + place, "none"), scene(place + 1, 37 + place, "none")
    assert count(scene(place, 11 + place, "lighthouse", 384), "lighthouse") == 1
    assert count(four(empty, also, also, empty), "lighthouse") == 0
    assert count(four(one, empty, also, other), "lighthouse") == 2
    assert count(four(one, other, other, one), "lighthouse") == 4


def test_other_subjects_are_not_lighthouses() -> None:
    pictures = [scene(3, 50 + index, name, 256) for index, name in enumerate(("castle", "tree", "house", "windmill"))]
    assert [count(picture, "lighthouse") for picture in pictures] == [0, 0, 0, 0]


def test_any_shape_and_size() -> None:
    picture = torch.cat([scene(0, 5, "lighthouse", 256), scene(0, 5, "none", 256)], -1)
    assert subject_map(picture, "lighthouse").shape == (40, 80)
    assert count(picture, "lighthouse") == 1


def test_an_untrained_finder_finds_something_else() -> None:
    torch.manual_seed(0)
    assert not torch.allclose(
        subject_map(scene(0, 5, "lighthouse"), "lighthouse", model=Finder().eval()),
        subject_map(scene(0, 5, "lighthouse"), "lighthouse"),
        atol=0.2,
    )


def test_scenes_come_with_the_classes_of_their_pixels() -> None:
    import random

    images, classes = scenes(random.Random(3), 3, size=64)
    assert images.shape == (12, 3, 64, 64) and classes.shape == (12, 64, 64)
    assert 0 < int(classes.max()) < len(CLASSES)
