"""What every part of a picture shows, to count what was asked as one: a finder of all materials of the scenes.

``count(image, "boat")`` and ``materials(image)`` are the public face.

    python -m training.counter --fresh --device cuda --groups 900 --seconds 140    # 14,400 scenes of 900 specs
    python -m training.counter --pool FILE --groups 60 --seconds 0      # on a CPU: renders 240 scenes, more each time
    python -m training.counter --pool FILE --groups 0 --seconds 200     # and goes on with those

It sees rendered scenes only, half of them as the embedded model's autoencoder returns them. What it gets wrong on
held-out scenes of known counts is said by ``python -m benchmarks embedded_quality`` beside its counts.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .finder import Finder, Pool, Task, class_maps, count_parts, gather, load_finder, train
from .scenes import MATERIALS
from .specs import BACKDROPS, SETTINGS, SUBJECTS, Spec, sample_spec

WEIGHTS = Path(__file__).parent / "counter.safetensors"
SIDE = 256  # pixels of the longer side that pictures are looked at with
WORDS: Mapping[str, tuple[str, ...]] = {  # what is counted -> the materials that it is made of
    **{name: (name,) for name in ("lighthouse", "moon", "sun", "house", "castle", "windmill", "balloon")},
    "boat": ("sailboat", "ship"),
}
GROUND = ("sky", "clouds", "rock", "snow", "water", "sand", "cliff", "grass", "pines")  # large, and not counted
_LAND = tuple(setting for setting in SETTINGS if setting != "sea")
_COUNTED = ("lighthouse", "lighthouse", "windmill", "windmill", "house", "castle", "sailboat", "ship", "balloon")
_AFLOAT = ("sailboat", "ship", "bridge")  # they stand where the scenes have a place for them


def _specs(rng: random.Random) -> Spec:
    """Subjects that are counted two or three times as often as others, anywhere on land; half with sun or moon."""
    spec = sample_spec(rng)
    subject = rng.choice((*SUBJECTS, *_COUNTED))
    while subject in _AFLOAT and spec.subject != subject:
        spec = sample_spec(rng)
    setting = spec.setting if subject in _AFLOAT or rng.random() < 0.3 else rng.choice(_LAND)
    if subject == "lighthouse" and rng.random() < 0.5:
        setting = rng.choice(("cliff", "cliff", "sea", "beach"))
    if subject not in (*_AFLOAT, "lighthouse", "none", "balloon", "birds") and setting == "sea":
        setting = "beach"
    weather = spec.weather if rng.random() < 0.5 else rng.choice(("clear", "cloudy"))
    body = spec.body
    if weather in ("clear", "cloudy") and rng.random() < 0.5:
        body = rng.choice(("moon", "crescent") if spec.time in ("dusk", "night") else ("sun",))
    backdrop = spec.backdrop if setting == spec.setting else rng.choice(BACKDROPS)
    return Spec(spec.time, weather, setting, subject, body, backdrop)


TASK = Task(_specs, MATERIALS, GROUND, mosaics=0.0, size=256, renew=0, width=96)
GPU = {"each": 16, "pictures": 48, "device": "cuda"}


def materials(image: torch.Tensor, model: Finder | None = None) -> torch.Tensor:
    """Probabilities ``[materials, h, w]`` of a picture ``[1,3,H,W]`` in [-1,1], in the order of ``MATERIALS``: the mean
    of what is seen in it and in its mirror image."""
    model = model or load_finder(WEIGHTS)
    return (class_maps(image, model, SIDE) + class_maps(image.flip(-1), model, SIDE).flip(-1)) / 2


def together(maps: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Probability of any of these materials, ``[h, w]``."""
    return maps[[MATERIALS.index(name) for name in names]].sum(0)


def count(image: torch.Tensor, word: str, model: Finder | None = None) -> int:
    """How many ``word`` (of ``WORDS``) a picture ``[1,3,H,W]`` in [-1,1] shows."""
    return count_parts(together(materials(image, model), WORDS[word]), share=0.25)


def pooled(file: Path | None, groups: int, task: Task) -> Pool:
    """The scenes in ``file``, and those of ``groups`` new specs that are kept there too: rendering takes the time."""
    from safetensors.torch import load_file, save_file

    parts = [load_file(file, device=task.device)] if file and file.exists() else []
    if groups:
        seed = sum(len(part["images"]) for part in parts)
        images, classes = gather(random.Random(seed), groups, task)
        parts.append({"images": images, "classes": classes})
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("images", "classes")}
    if groups and file:
        save_file(joined, file)
    return joined["images"], joined["classes"]


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--seconds", type=float, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--fresh", action="store_true", help="from nothing, not from the weights there are")
    options.add_argument("--pool", type=Path, help="a file that keeps the scenes")
    options.add_argument("--groups", type=int, default=100, help="specs, whose scenes join those kept")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--out", type=Path, default=WEIGHTS)
    given = options.parse_args()
    from .models import halves, save_halves

    if given.device == "cpu":
        torch.set_num_threads(1)  # as in training.finder
    task = TASK if given.device == "cpu" else TASK._replace(**GPU)
    pool = pooled(given.pool, given.groups, task)
    if not given.seconds:
        return
    start = None if given.fresh else load_finder(WEIGHTS)
    model = train(given.seconds, start, seed=given.seed, task=task, pool=pool)
    save_halves(halves(model), given.out)


if __name__ == "__main__":
    main()
