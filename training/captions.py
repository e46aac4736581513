"""Captions: a spec said in words, in varied orders; and the captions of details for crops."""

import random

from . import phrases as ph
from .scenes.canvas import MATERIALS
from .specs import COLOURS, TIMES, Spec

COLOURED = 0.3  # of subjects that have a colour are sure to be said with it; others by the chance of their phrases


def _subject(rng: random.Random, spec: Spec, colour: int) -> str:
    ways = ph.SUBJECT[spec.subject]
    coloured = [way for way in ways if "{c}" in way]
    if coloured and rng.random() < COLOURED:
        ways = coloured
    return rng.choice(ways).format(c=COLOURS[colour])


def _place(rng: random.Random, spec: Spec, colour: int) -> str:
    """Who is where: the head of a caption."""
    bare, placed = ph.SETTING[spec.setting]
    noun = rng.choice(bare)
    if spec.subject == "none":
        if rng.random() < 0.25 and spec.weather != "clear":
            return f"{rng.choice(ph.WEATHER_ADJECTIVE[spec.weather])} {noun.removeprefix('a ').removeprefix('the ')}"
        return noun
    subject = _subject(rng, spec, colour)
    roll = rng.random()
    if roll < 0.62:
        return f"{subject} {rng.choice(placed)}"
    if roll < 0.74:
        return f"{noun} with {subject}"
    if roll < 0.82 and spec.weather != "clear":
        plain = noun.removeprefix("a ").removeprefix("the ")
        return f"{rng.choice(ph.WEATHER_ADJECTIVE[spec.weather])} {plain} with {subject}"
    if roll < 0.9:
        return f"{subject}, {noun}"
    return f"{noun}, {subject}"


def caption(rng: random.Random, spec: Spec, colour: int) -> str:
    """A caption of a whole scene: truthful, not always complete (a clear sky may go unsaid, bad weather seldom)."""
    head = _place(rng, spec, colour)
    omit = 0.30 if spec.time == "day" else 0.03
    parts: list[str] = []
    if rng.random() > (0.85 if spec.weather == "clear" else 0.04):
        parts.append(rng.choice(ph.WEATHER[spec.weather]))
    if spec.body != "none" and rng.random() < 0.5:
        parts.append(rng.choice(ph.BODY[spec.body]))
    elif spec.time == "night" and spec.weather in ("clear", "cloudy") and rng.random() < 0.25:
        parts.append(rng.choice(ph.STARS))
    if spec.backdrop != "none" and rng.random() < 0.55:
        parts.append(rng.choice(ph.BACKDROP[spec.backdrop]))
    rng.shuffle(parts)
    if rng.random() < omit:
        text = ", ".join([head, *parts])
    elif rng.random() < 0.6:
        text = ", ".join([f"{head} {rng.choice(ph.TIME[spec.time])}", *parts])
    else:
        noun = rng.choice(ph.TIME_NOUN[spec.time])
        bare = rng.choice(ph.SETTING[spec.setting][0])
        form = rng.random()
        if form < 0.3 and spec.subject != "none":
            text = ", ".join([f"{noun} over {bare}", head, *parts])
        elif form < 0.6:
            text = ", ".join([noun, head, *parts])
        else:
            text = ", ".join([head, *parts, noun])
    if rng.random() < 0.18:
        text = f"{rng.choice(ph.PREFIX)} {text}"
    if rng.random() < 0.22:
        text = f"{text}, {rng.choice(ph.SUFFIX)}"
    if rng.random() < 0.06:
        text = f"{text}, {rng.choice(ph.SUFFIX)}"
    return text


def detail_caption(rng: random.Random, first: str, second: str | None, time: str) -> str:
    """The caption of a crop in which material ``first``, and perhaps ``second``, fills most of the picture."""
    noun = rng.choice(ph.DETAIL[first])
    if second is not None and rng.random() < 0.8:
        noun = f"{noun} and {rng.choice(ph.DETAIL[second])}"
    text = rng.choice(ph.DETAIL_FORM).format(noun) if rng.random() < 0.9 else f"{noun} up close"
    if rng.random() < 0.6:
        text = f"{text} {rng.choice(ph.TIME[time])}"
    return text


def detail_captions(rng: random.Random, variants: int) -> list[str]:
    """Captions for every (first, second or none, time, variant), the last index fastest; second none comes last."""
    out = []
    for first in MATERIALS:
        for second in (*MATERIALS, None):
            for time in TIMES:
                out.extend(
                    detail_caption(rng, first, second if second != first else None, time) for _ in range(variants)
                )
    return out
