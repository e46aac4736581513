"""What a scene may contain: the categories, which go together, and how often.

A ``Spec`` is the discrete part of a scene. Everything continuous (positions, sizes, shapes) comes from a seed.
"""

import random
from dataclasses import dataclass

TIMES = ("day", "sunrise", "sunset", "dusk", "night")
WEATHERS = ("clear", "cloudy", "storm", "fog", "rain", "snowfall")
SETTINGS = (
    "sea",
    "lake",
    "beach",
    "cliff",
    "mountains",
    "snowy mountains",
    "desert",
    "forest",
    "meadow",
    "snowfield",
)
SUBJECTS = (
    "none",
    "lighthouse",
    "house",
    "sailboat",
    "ship",
    "castle",
    "tree",
    "bridge",
    "windmill",
    "tent",
    "balloon",
    "birds",
    "cactus",
)
BODIES = ("none", "sun", "moon", "crescent")
BACKDROPS = ("none", "hills", "mountains", "snowy mountains")
COLOURS = ("red", "blue", "yellow", "green", "white", "orange", "purple", "brown")

_TIME_WEIGHTS = (0.26, 0.14, 0.24, 0.14, 0.22)
_WATER = ("sea", "lake", "beach", "cliff")
_COLD = ("snowy mountains", "snowfield")

# setting -> how often each subject stands in it; what is absent never does
_SUBJECT_WEIGHTS = {
    "sea": {"none": 2, "sailboat": 4, "ship": 4, "lighthouse": 3, "balloon": 0.8, "birds": 1},
    "lake": {
        "none": 2,
        "sailboat": 2,
        "house": 1.5,
        "bridge": 4,
        "tent": 1,
        "castle": 0.7,
        "birds": 0.7,
        "balloon": 0.7,
    },
    "beach": {
        "none": 2,
        "sailboat": 1.5,
        "ship": 1,
        "tent": 0.8,
        "lighthouse": 1,
        "birds": 0.8,
        "house": 0.8,
        "tree": 0.6,
    },
    "cliff": {"none": 1, "lighthouse": 7, "house": 1.2, "castle": 1.5, "tree": 0.8, "birds": 0.6, "windmill": 0.6},
    "mountains": {
        "none": 2.5,
        "house": 1.2,
        "tent": 1,
        "castle": 1,
        "balloon": 1,
        "tree": 0.8,
        "birds": 0.8,
        "bridge": 1,
    },
    "snowy mountains": {"none": 3, "house": 1.2, "tent": 0.8, "castle": 0.8, "balloon": 0.8, "tree": 0.6, "birds": 0.6},
    "desert": {"none": 2.5, "cactus": 4, "tent": 1.2, "balloon": 0.8, "castle": 0.6, "birds": 0.5, "tree": 0.5},
    "forest": {"none": 3, "house": 2, "tent": 1.5, "castle": 0.7, "birds": 0.6, "balloon": 0.5, "bridge": 0.6},
    "meadow": {
        "none": 1.5,
        "house": 2,
        "windmill": 4,
        "tree": 2.5,
        "castle": 1,
        "tent": 0.8,
        "balloon": 1,
        "birds": 0.6,
    },
    "snowfield": {"none": 2, "house": 1.8, "tree": 1.5, "tent": 0.8, "castle": 0.8, "birds": 0.5, "windmill": 0.5},
}
_ODD = (
    "lighthouse",
    "house",
    "castle",
    "windmill",
    "tree",
    "tent",
    "balloon",
    "birds",
)  # now and then anywhere on land
# subjects in settings that scenes can show, and that no caption of training says in one: what becomes of such words?
NEVER_TOGETHER = (
    ("cactus", "beach"),
    ("cactus", "cliff"),
    ("cactus", "lake"),
    ("cactus", "meadow"),
    ("cactus", "forest"),
    ("cactus", "snowfield"),
    ("cactus", "snowy mountains"),
    ("lighthouse", "lake"),
    ("windmill", "lake"),
    ("tree", "lake"),
    ("ship", "lake"),
    ("ship", "cliff"),
    ("sailboat", "cliff"),
)


@dataclass(frozen=True)
class Spec:
    """The discrete description of a scene; every field is one of the names above."""

    time: str = "day"
    weather: str = "clear"
    setting: str = "sea"
    subject: str = "none"
    body: str = "none"
    backdrop: str = "none"

    @property
    def water(self) -> bool:
        """Whether open water lies in front of the horizon."""
        return self.setting in _WATER


def _pick(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _weather(rng: random.Random, setting: str) -> str:
    weights = {"clear": 5.0, "cloudy": 2.0, "storm": 1.0, "fog": 0.9, "rain": 0.8, "snowfall": 0.15}
    if setting in ("sea", "cliff"):
        weights["storm"] = 2.0
    if setting in _COLD:
        weights |= {"snowfall": 2.0, "rain": 0.05}
    if setting == "desert":
        weights |= {"rain": 0.2, "snowfall": 0.0, "fog": 0.4}
    return _pick(rng, weights)


def _body(rng: random.Random, time: str, weather: str) -> str:
    clear = weather in ("clear", "cloudy")
    if time == "night":
        return _pick(rng, {"none": 1.0, "moon": 2.0, "crescent": 1.0} if clear else {"none": 4.0, "moon": 1.0})
    if time == "dusk":
        return _pick(rng, {"none": 3.0, "crescent": 1.0, "moon": 0.6})
    if time == "day":
        return _pick(rng, {"none": 1.5, "sun": 1.0} if clear else {"none": 1.0})
    return _pick(rng, {"none": 0.6, "sun": 2.0} if clear else {"none": 2.0, "sun": 0.7})


def sample_spec(rng: random.Random) -> Spec:
    """Draw a plausible spec. ``rng``: the only source of randomness."""
    setting = rng.choices(SETTINGS, (1.3, 1.1, 0.9, 1.5, 1.0, 1.2, 1.2, 1.0, 1.1, 0.7))[0]
    time = rng.choices(TIMES, _TIME_WEIGHTS)[0]
    weather = _weather(rng, setting)
    subjects = dict(_SUBJECT_WEIGHTS[setting])
    subject = rng.choice(_ODD) if setting not in ("sea", "lake") and rng.random() < 0.06 else _pick(rng, subjects)
    backdrops = {"none": 1.0, "hills": 0.5, "mountains": 0.6, "snowy mountains": 0.5}
    if setting in ("sea", "cliff", "beach"):
        backdrops["none"] = 3.5
    if setting == "lake":
        backdrops = {"hills": 1.0, "mountains": 1.2, "snowy mountains": 1.2}
    if setting in ("mountains", "snowy mountains"):
        backdrops = {"none": 1.0}
    if setting == "desert":
        backdrops = {"none": 2.0, "mountains": 0.7}
    if weather == "fog":
        backdrops = {"none": 1.0}
    return Spec(time, weather, setting, subject, _body(rng, time, weather), _pick(rng, backdrops))
