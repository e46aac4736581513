"""``from_image``: the settings that a picture carries, as overrides; and what it does not say.

Ours (``highres_lowram``, JSON) or A1111's text (``parameters`` of a PNG, the EXIF comment of a JPEG or WebP).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.config import ConfigError
from stages.workflow.words import sampler

_PAIR = re.compile(r'\s*([\w ()/+-]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_EXIF, _COMMENT = 0x8769, 0x9286  # the tags of EXIF's own values and of its comment
_OF_SIZE = ("lowres.width", "lowres.height", "guide.phases")  # follow from width and height where those are given anew

_SAID = {"prompt", "negative_prompt", "prompt_weighting", "width", "height", "seed", "regions", "reroll"}
_SECTIONS = {"lowres", "guide", "denoise", "decode", "stitch", "text_encode", "scheduler", "technique"}
_FILES = {"guide.image", "technique.linfusion.path"}
_OPTION = re.compile(r"scheduler\.options\.\w+")
_TAG = {"name", "scale"}  # of a LoRA, what its tag in a prompt says


class Found(NamedTuple):
    """Values by key, and what the picture does not say or what is not taken from it."""

    values: dict[str, Any]
    unknown: list[str]


def read(path: Path, options: Mapping[str, Collection[str]], known: Collection[str], given: Collection[str]) -> Found:
    """What the picture in ``path`` says of its run.

    Args:
        options: of the config groups.
        known: every key that there is.
        given: keys of the command line, which hold instead.

    Raises:
        ConfigError: no such picture, or it says nothing of how it was made.
    """
    texts = _texts(path)
    ours = texts.get("highres_lowram")
    if ours is not None:
        try:
            settings = json.loads(ours)
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise ConfigError("from_image", str(path), "a picture whose highres_lowram is a JSON object")
        found = _ours(settings, options, known)
    elif "parameters" in texts:
        found = _a1111(texts["parameters"], options)
    else:
        expected = "a picture that says how it was made (PNG text 'highres_lowram' or 'parameters', an EXIF comment)"
        raise ConfigError("from_image", str(path), expected, "Pictures lose it when they are edited or sent.")
    if {"width", "height"} & set(given):
        found = Found({key: one for key, one in found.values.items() if key not in _OF_SIZE}, found.unknown)
    if "<lora:" in str(found.values.get("prompt", "")) and "model.lora_dir" not in given:
        found.unknown.append("where its LoRAs lie (model.lora_dir=FOLDER)")
    if "model.path" in given:
        found.values.pop("model", None)
    elif found.values.get("model") != "embedded":
        found.unknown.append("where the files of its model lie (model.path=...)")
    return found


def _texts(path: Path) -> dict[str, str]:
    from PIL import Image  # Pillow: not for every run

    from stages.picture.header import opened

    with opened(path, "from_image") as image:
        found = {str(key): one for key, one in image.info.items() if isinstance(one, str)}
        comment = Image.Image.getexif(image).get_ifd(_EXIF).get(_COMMENT)  # a PNG's own would decode all of it first
    if isinstance(comment, bytes) and len(comment) > 8:
        coding = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}.get(comment[:8], "utf-8")
        text = comment[8:].decode(coding, errors="replace").strip("\0")
        if "Steps:" in text:  # a camera's comment is no prompt
            found.setdefault("parameters", text)
    return found


def _ours(settings: dict[str, Any], options: Mapping[str, Collection[str]], known: Collection[str]) -> Found:
    values, unknown = dict(_flat(settings, set(known))), []
    for group in ("model", "scheduler"):
        name = str(values.pop(f"{group}.name", ""))
        if name in options.get(group, ()):
            values = {group: name, **values}
        elif name and group == "model":
            unknown.append(f"what model={name} was")
    loras = _listed(values.pop("model.loras", None))
    tags = [f"<lora:{one['name']}:{one['scale']}>" for one in loras if isinstance(one, dict) and one.keys() >= _TAG]
    if tags:
        values["prompt"] = " ".join([str(values.get("prompt") or ""), *tags])
    if "guide.fit" in values:
        unknown.append("the picture that guided it (guide.image=FILE)")
    if words := _listed(values.pop("model.embeddings", None)):
        unknown.append(f"where the learned words {', '.join(map(str, words))} lie (model.embeddings=[FILE])")
    if values.pop("model.controlnets", None):
        unknown.append("its ControlNets (model.controlnets=...)")
    if str(values.get("guide.upscale", "lanczos")) not in ("lanczos", "latent"):
        unknown.append(f"where {values.pop('guide.upscale')} lies (guide.upscale=FILE)")
    for key in [key for key in values if not _may_be_said(key, known) and key not in options]:
        unknown.append(f"what {key}={values.pop(key)!s:.40} means")
    return Found(values, unknown)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _may_be_said(key: str, known: Collection[str]) -> bool:
    """Whether a picture, which may be anybody's, decides this: how a picture is made, no file and no code."""
    mine = key in _SAID or key.partition(".")[0] in _SECTIONS or key.startswith("model.prediction_type")
    return mine and key not in _FILES and (key in known or _OPTION.fullmatch(key) is not None)


def _flat(node: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; a mapping that is a value of its own (``regions``) stays one."""
    for name, below in node.items():
        key = f"{prefix}{name}"
        has_keys = key == "scheduler.options" or any(one.startswith(f"{key}.") for one in known)
        if isinstance(below, dict) and has_keys:
            yield from _flat(below, known, f"{key}.")
        else:
            yield key, below


def _a1111(text: str, options: Mapping[str, Collection[str]]) -> Found:
    """The form of A1111's web UI: the prompt, ``Negative prompt: ...``, then ``Steps: 20, Sampler: Euler a, ...``."""
    body, _, last = text.strip().rpartition("\n")
    if not last.startswith("Steps:"):
        body, last = text.strip(), ""
    prompt, _, negative = f"\n{body}".partition("\nNegative prompt:")
    said = {name.strip(): value.strip().strip('"') for name, value in _PAIR.findall(last)}
    values: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    taken = {"Model", "Model hash", "Version"}  # the model is asked for, the others are no settings

    def take(name: str, kind: type, *keys: str) -> Any:
        try:
            value = kind(said[name])
            round(value)
        except (KeyError, ValueError, OverflowError):  # not said, no number, infinite
            return None
        taken.add(name)
        values.update(dict.fromkeys(keys, value))
        return value

    take("Steps", int, "lowres.num_inference_steps", "denoise.num_inference_steps")
    take("CFG scale", float, "lowres.guidance_scale", "denoise.guidance_scale")
    take("Seed", int, "seed")
    take("Denoising strength", float, "denoise.strength")
    if (skip := take("Clip skip", int)) and skip > 1:
        values["text_encode.clip_skip"] = skip - 1  # diffusers counts layers that are skipped
    if size := re.fullmatch(r"(\d+)x(\d+)", said.get("Size", "")):
        taken.add("Size")
        larger = take("Hires upscale", float) or 1.0
        sides = [int(side) for side in size.groups()]
        values |= {"width": round(sides[0] * larger / 8) * 8, "height": round(sides[1] * larger / 8) * 8}
        if larger > 1:
            values |= {"lowres.width": sides[0], "lowres.height": sides[1]}
    name = " ".join(filter(None, [said.get("Sampler"), said.get("Schedule type")])).replace(" Automatic", "")
    for wanted in (name, said.get("Sampler", "")):
        if wanted and (found := sampler(wanted, options["scheduler"])) in options["scheduler"]:
            values["scheduler"] = found
            taken |= {"Sampler", "Schedule type"} if wanted == name else {"Sampler"}
            break
    return Found(values, [f"{name}: {value}" for name, value in said.items() if name not in taken])
