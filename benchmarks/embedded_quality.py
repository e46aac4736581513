"""The embedded model against the scenes it learned: what is asked for beside what is measured.

    python -m benchmarks embedded_quality                     # all of it: hours on a CPU, and it may be stopped
    python -m benchmarks embedded_quality --short             # a few of everything, to try
    python -m benchmarks embedded_quality --only counting     # or vae, samples, pairs, attributes, large
    python -m benchmarks embedded_quality --only large --run NAME    # judges outputs/NAME (or the folder of a run)
    python -m benchmarks embedded_quality --samples 200 --pictures 3
    python -m benchmarks embedded_quality --device cuda       # the pictures by a GPU: minutes

``samples``: the Fréchet distance between samples and as many held-out scenes, against that between two such sets of
scenes, and the energy of samples over that of scenes in each octave. ``pairs``: words never seen together.
``attributes``: of the 64 prompts in embedded_prompts.txt, written before any of their pictures was made. ``large``:
2048x2048 pictures asked clear, their added detail, borders and specks.

Pictures are made by the stages' own code and left in outputs/benchmarks/embedded_quality/, with contact sheets: look at
them. What is there of the same model, prompt and seed is not made again. What judges pictures was trained on rendered
scenes only; its own error on held-out scenes is printed beside.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _quality_bands as bands
from benchmarks import _quality_counts as counts
from benchmarks import _quality_runs as large
from benchmarks._measure import RESULTS, finish, table
from benchmarks._quality_attributes import asked, contact_sheet, judge_accuracy, judge_pictures
from benchmarks._quality_features import features_of, frechet_distance, networks
from benchmarks._quality_samples import read_all, samples
from benchmarks._quality_scenes import held_out, pictures, returned
from benchmarks._quality_specks import detector_error
from stages.config import ROOT

FOLDER = RESULTS / "embedded_quality"
BEFORE = Path(__file__).with_name("embedded_before.json")  # distances of the model before, by networks that stayed
SHORT = {"samples": 24, "scenes": 8, "questions": 8, "pairs": 13, "pictures": 0, "skies": 2, "known": 3}


class Row(NamedTuple):
    """A figure, at least ``low`` and at most ``high``; None: no bound."""

    name: str
    measured: float
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def asked(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return "-" if self.high is None else f"at most {self.high:g}"

    @property
    def missed(self) -> float:
        """By how much; 0 where it holds."""
        below = self.low - self.measured if self.low is not None else 0.0
        above = self.measured - self.high if self.high is not None else 0.0
        return max(0.0, below, above)


Found = tuple[dict[str, Any], list[Row]]


def judge_vae(given: argparse.Namespace) -> Found:
    found = bands.autoencoder(given.model, held_out(given.scenes))
    rows = [
        Row("VAE: PSNR, dB", found["mean"], low=33, note=f"worst {found['worst']}"),
        Row("VAE: Laplacian energy over scenes'", found["laplacian_share"], low=0.25),
        *(Row(f"VAE: energy of waves of {name}", share) for name, share in found["bands"].items()),
    ]
    return found, rows


def judge_samples(given: argparse.Namespace) -> Found:
    """Distances and sharpness of one set of samples; of the scenes those of its captions, and as many others."""
    scenes, count = held_out(2 * given.samples), given.samples
    paths = samples(given.model, given.folder / "samples", [scene.prompt for scene in scenes[:count]], *given.overrides)
    contact_sheet(paths[:64], given.folder / "samples.png")
    networks_, energy, features = networks(), dict[str, Any](), dict[str, Any]()
    sets = {"samples": read_all(paths), "scenes": pictures(scenes[:count]), "others": pictures(scenes[count:])}
    for name, batches in sets.items():
        kept = list[Any]()

        def watched(batches: Any = batches, kept: list[Any] = kept) -> Any:
            for images in batches:
                kept.append(bands.octaves(images))
                yield images

        features[name] = features_of(watched(), networks_)
        energy[name] = bands.mean_energy(kept)
        print(f"{count} {name} looked at", flush=True)
    distances = {}
    for name in networks_:
        between = {
            who: frechet_distance(features[who][name], features["others"][name]) for who in ("samples", "scenes")
        }
        distances[name] = {"distance": between["samples"], "floor": between["scenes"]}
    sharpness = bands.by_name(energy["samples"], energy["scenes"])
    before = json.loads(BEFORE.read_text(encoding="utf-8")) if BEFORE.is_file() else {}
    rows = []
    for name, one in distances.items():
        rows.append(Row(f"distance, {name}: over the floor", one["distance"] / one["floor"], high=2, note=_said(one)))
        if earlier := before.get(name, {}).get(str(count)):
            rows.append(Row(f"distance, {name}: over the model's before", one["distance"] / earlier, high=0.5))
    rows += [Row(f"sharpness: energy of waves of {name}", share, 0.8, 1.2) for name, share in sharpness.items()]
    return {"count": count, "distances": distances, "sharpness": sharpness}, rows


def _said(one: dict[str, float]) -> str:
    return f"{one['distance']:.3g}, floor {one['floor']:.3g}"


def judge_counting(given: argparse.Namespace) -> Found:
    import torch
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(given.model, subfolder="vae", torch_dtype=torch.float32).eval()
    questions = counts.questions(given.questions)
    paths = samples(given.model, given.folder / "counting", [one.prompt for one in questions], *given.overrides)
    contact_sheet(paths, given.folder / "counting.png", columns=25)
    found = counts.judge_counts(paths, questions)
    own = counts.counter_error(given.known, {"scenes": lambda image: image, "through the VAE": partial(returned, vae)})
    header = ("word", "pictures that show 0, 1, 2, more", *(f"{way}: 0, 1, 2 counted right" for way in own))
    lines = []
    for word, seen in found["found"].items():
        numbers = [seen.get(n, 0) for n in range(3)] + [sum(v for n, v in seen.items() if n > 2)]
        lines.append((word, numbers, *([f"{share:.0%}" for share in one[word].values()] for one in own.values())))
    table(header, lines)
    right = {way: sum(v for word in one.values() for v in word.values()) / (3 * len(one)) for way, one in own.items()}
    note = "counter itself: " + ", ".join(f"{share:.1%} of {way}" for way, share in right.items())
    return found | {"own": own}, [
        Row("counting: exactly one of what was asked as one", found["share"], 0.95, note=note)
    ]


def judge_pairs(given: argparse.Namespace) -> Found:
    scenes = counts.pair_scenes(given.pairs)
    paths = samples(given.model, given.folder / "pairs", [scene.prompt for scene in scenes], *given.overrides)
    contact_sheet(paths, given.folder / "pairs.png", columns=13)
    found = counts.judge_pairs([next(read_all([path])) for path in paths], scenes)
    own = counts.judge_pairs([scene.render()[0] for scene in scenes], scenes)
    rows = [
        Row(f"never seen together: {key}", found[key], note=f"{own[key]:.1%} of rendered scenes")
        for key in ("subject", "setting", "both")
    ]
    return {"samples": found, "scenes": own}, rows


def judge_attributes(given: argparse.Namespace) -> Found:
    prompts = asked()
    paths = samples(given.model, given.folder / "attributes", [one.prompt for one in prompts], *given.overrides)
    contact_sheet(paths, given.folder / "attributes.png")
    found, own = judge_pictures(paths, prompts), judge_accuracy(held_out(2 * given.scenes))
    for miss in found["misses"]:
        print(f"  picture {miss['picture']:02}: {miss['attribute']} {miss['asked']}, seen as {miss['seen']}")
    note = "classifier itself: " + ", ".join(f"{name} {share:.1%}" for name, share in own.items())
    return found | {"own": own}, [Row("attributes of 64 prompts", found["overall"], 0.97, note=note)]


def judge_large(given: argparse.Namespace) -> Found:
    folders = [given.run] if given.run else large.runs(given.model, given.folder / "runs", given.pictures)
    if not folders:
        return {}, []
    found, own = large.judge_runs(folders), detector_error(given.skies)
    rows = []
    for name, one in found["borders"].items():
        note = f"the same lines moved, where no tile ends: {one['moved']:.3f}, give or take {one['spread']:.3f}"
        rows.append(Row(f"{name} borders: step over that elsewhere", one["ratio"], 0.97, 1.03, note))
        rows.append(Row(f"{name} borders: over that between latents nearby", one["lattice_ratio"], 0.97, 1.03))
        rows.append(Row(f"{name} borders: the same, median border", one["median"], 0.97, 1.03))
    rows.append(Row("added detail over the Lanczos-enlarged picture", found["detail"], low=1.5))
    if seen := found["specked"]["skies"]:
        note = f"{found['specked']['specks']} in {seen} skies; detector itself: {own['false']} in {own['skies']} true"
        note += f" skies, {own['found_of_painted']:.0%} of painted ones found"
        rows.append(Row("specks: share of clear skies with any", found["specked"]["with"] / seen, high=0.05, note=note))
    return found | {"own": own}, rows


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "vae": judge_vae,
    "samples": judge_samples,
    "counting": judge_counting,
    "pairs": judge_pairs,
    "attributes": judge_attributes,
    "large": judge_large,
}


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--short", action="store_true", help="a few of everything, no 2048x2048 pictures")
    options.add_argument("--model", type=Path, default=ROOT / "models" / "embedded")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="that makes pictures of 256x256")
    options.add_argument("--run", help="large: name of a finished run, or its folder, to be judged alone")
    numbers = {
        "samples": (1000, "and twice as many scenes"),
        "scenes": (48, "held-out, for the VAE; twice as many for the classifier"),
        "questions": (200, "prompts that ask for one of something"),
        "pairs": (104, "prompts of words never seen together"),
        "pictures": (20, "of 2048x2048, minutes each"),
        "skies": (20, "true ones, that the detector of specks is tried on"),
        "known": (20, "scenes of each word and known count, that the counter is tried on"),
    }
    for name, (number, said) in numbers.items():
        options.add_argument(f"--{name}", type=int, help=f"{said}; default {number}")
    given = options.parse_args()
    for name, (number, _) in numbers.items():
        if getattr(given, name) is None:
            setattr(given, name, SHORT[name] if given.short else number)
    if given.run:
        run = Path(given.run) if Path(given.run).is_dir() else ROOT / "outputs" / given.run
        if not (run / "image.png").exists():
            sys.exit(f"--run: got {given.run!r}, expected a finished run. Make it: python runner.py run={run.name} ...")
        given.run = run
    given.folder = FOLDER
    given.overrides = () if given.device == "cpu" else (f"device={given.device}",)
    return given


def main() -> int:
    given = parse()
    FOLDER.mkdir(parents=True, exist_ok=True)
    result, rows = dict[str, Any](), list[Row]()
    for name in given.only:
        found, own = PARTS[name](given)
        result[name] = found
        rows += own
    lines = [
        (row.name, row.asked, f"{row.measured:.4g}", f"{row.missed:.3g}" if row.missed else "-", row.note)
        for row in rows
    ]
    table(("figure", "asked for", "measured", "missed by", "note"), lines)
    bound = [row for row in rows if row.asked != "-"]
    return finish(
        "embedded_quality", result, {f"{row.name}: {row.measured:.4g}, {row.asked}": not row.missed for row in bound}
    )


if __name__ == "__main__":
    sys.exit(main())
