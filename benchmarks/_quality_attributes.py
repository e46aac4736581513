"""Attributes: what 64 hand-written prompts ask, and what the classifier sees in their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from benchmarks._quality_samples import read
from benchmarks._quality_scenes import Scene
from stages.files import atomic_path
from training.classifier import ATTRIBUTES, classify

PROMPTS = Path(__file__).with_name("embedded_prompts.txt")


class Asked(NamedTuple):
    """A prompt and what its picture should show; attributes that it does not name are absent."""

    prompt: str
    attributes: dict[str, str]


def asked(path: Path = PROMPTS) -> list[Asked]:
    """Read the prompts. ValueError for a line that is no prompt or an attribute that the classifier does not know."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#"):
            continue
        *values, prompt = (part.strip() for part in line.split("|"))
        if len(values) != len(ATTRIBUTES):
            raise ValueError(f"{path.name}:{number}: got {line!r}, expected time | subject | setting | prompt.")
        wanted = {name: value for name, value in zip(ATTRIBUTES, values, strict=True) if value != "-"}
        for name, value in wanted.items():
            if value not in ATTRIBUTES[name]:
                raise ValueError(f"{path.name}:{number}: {name} {value!r} is none of {', '.join(ATTRIBUTES[name])}.")
        found.append(Asked(prompt, wanted))
    return found


def judge_accuracy(scenes: Sequence[Scene]) -> dict[str, float]:
    """What the classifier gets right on held-out rendered scenes: the yardstick's own error."""
    right = dict.fromkeys(ATTRIBUTES, 0)
    for scene in scenes:
        seen = classify(scene.render()[0])
        for name in ATTRIBUTES:
            right[name] += seen[name]["labels"][0] == getattr(scene.spec, name)
    return {name: round(value / len(scenes), 3) for name, value in right.items()}


def judge_pictures(paths: Sequence[Path], prompts: Sequence[Asked]) -> dict[str, Any]:
    """Share of the asked attributes that the classifier sees: each attribute, all of them, and every miss."""
    counts = {name: [0, 0] for name in ATTRIBUTES}
    misses = []
    for number, (path, one) in enumerate(zip(paths, prompts, strict=True)):
        seen = {name: value["labels"][0] for name, value in classify(read(path)).items()}
        for name, wanted in one.attributes.items():
            counts[name][0] += seen[name] == wanted
            counts[name][1] += 1
            if seen[name] != wanted:
                misses.append({"picture": number, "attribute": name, "asked": wanted, "seen": seen[name]})
    right, total = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    shares = {name: {"right": r, "asked": n, "share": round(r / n, 3)} for name, (r, n) in counts.items()}
    return {"overall": round(right / total, 4), "right": right, "asked": total, **shares, "misses": misses}


def contact_sheet(paths: Sequence[Path], file: Path, columns: int = 8, side: int = 192) -> Path:
    """All pictures in one file, in the prompts' order, row by row."""
    sheet = Image.new("RGB", (columns * side, -(-len(paths) // columns) * side))
    for number, path in enumerate(paths):
        with Image.open(path) as picture:
            place = number % columns * side, number // columns * side
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
    with atomic_path(file) as temporary:
        sheet.save(temporary, format="PNG")
    return file
