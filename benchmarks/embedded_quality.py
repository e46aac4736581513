"""The embedded model in four figures: VAE PSNR, attributes of 64 prompts, added detail, seams.

    python -m benchmarks embedded_quality                 # makes a 2048x2048 run of its own
    python -m benchmarks embedded_quality --run NAME      # judges outputs/NAME (or the folder of a run)
    python -m benchmarks embedded_quality --reuse         # judges the 64 pictures that lie there again

The prompts are in benchmarks/embedded_prompts.txt, written before any of their pictures was made. A classifier
trained on rendered scenes only (training/classifier.py) says what the pictures show: what it mixes up in rendered
held-out scenes limits what it can confirm here, so its own accuracy is printed beside.
The pictures are left in outputs/benchmarks/embedded_quality/, with a contact sheet: look at them.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from benchmarks._measure import RESULTS, finish, runner, table
from stages.config import ROOT
from stages.documents import load
from stages.files import atomic_path
from stages.picture import seams
from stages.tiles import latent_grid

FOLDER = RESULTS / "embedded_quality"
PROMPTS = Path(__file__).with_name("embedded_prompts.txt")
PROMPT = "a lighthouse on a cliff at sunset"
STEPS, BATCH, SEED = 25, 8, 0
BLUR = 2.0  # pixels: standard deviation of the Gaussian; what it takes away counts as high frequency


class Asked(NamedTuple):
    """A prompt and what its picture should show; attributes that it does not name are absent."""

    prompt: str
    attributes: dict[str, str]


def asked(path: Path = PROMPTS) -> list[Asked]:
    """Read the prompts. ValueError for a line that is no prompt or an attribute that the classifier does not know."""
    from training.classifier import ATTRIBUTES

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


def held_out(count: int) -> list[Any]:
    """``count`` specs of scenes, each as often as the training recipe draws it."""
    from training.specs import sample_spec

    rng = random.Random(20261)
    return [sample_spec(rng) for _ in range(count)]


def rendered(spec: Any, number: int) -> Any:
    """A held-out scene ``[1,3,256,256]`` in [-1,1]: its seed is beyond all that training draws."""
    import torch

    from training.scenes import View, render
    from training.train import HELD_OUT

    return render(spec, torch.tensor([HELD_OUT + 7 * number]), torch.tensor([number % 8]), View.whole(1))[0]


def autoencoder_psnr(model: Path, count: int) -> dict[str, float]:
    """Mean and worst PSNR in dB of held-out scenes after encoding and decoding, and the share of their Laplacian energy
    that is left: of the finest detail."""
    import torch
    from diffusers import AutoencoderKL

    from training.losses import laplacian

    vae: Any = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32).eval()
    values, energy = [], np.zeros(2)
    with torch.inference_mode():
        for number, spec in enumerate(held_out(count)):
            image = rendered(spec, number)
            back = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
            values.append(float(10 * torch.log10(4.0 / ((back - image) ** 2).mean())))
            energy += [float(laplacian(x).square().mean()) for x in (back, image)]
    share = round(float(energy[0] / energy[1]), 3)
    mean, worst = round(float(np.mean(values)), 2), round(min(values), 2)
    return {"mean": mean, "worst": worst, "laplacian_share": share, "scenes": count}


def judge_accuracy(count: int) -> dict[str, float]:
    """What the classifier gets right on held-out rendered scenes: the yardstick's own error."""
    from training.classifier import ATTRIBUTES, classify

    right = dict.fromkeys(ATTRIBUTES, 0)
    for number, spec in enumerate(held_out(count)):
        seen = classify(rendered(spec, number))
        for name in ATTRIBUTES:
            right[name] += seen[name]["labels"][0] == getattr(spec, name)
    return {name: round(value / count, 3) for name, value in right.items()}


def make_pictures(
    model: Path,
    prompts: list[Asked],
    guidance: float,
    folder: Path = FOLDER,
    change: Callable[[Any], None] = lambda unet: None,
) -> list[Path]:
    """A native-size picture for each prompt with stock diffusers; DPM-Solver++ 2M, one seed for each prompt.

    ``change``: what is done to the UNet before."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
    pipeline.set_progress_bar_config(disable=True)
    change(pipeline.unet)
    paths = [folder / f"{number:02}.png" for number in range(len(prompts))]
    for first in range(0, len(prompts), BATCH):
        begin, some = time.monotonic(), prompts[first : first + BATCH]
        made = pipeline(
            [one.prompt for one in some],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(SEED + first + i) for i in range(len(some))],
        )
        for path, picture in zip(paths[first:], made.images, strict=False):
            with atomic_path(path) as temporary:
                picture.save(temporary, format="PNG")
        print(f"{first + len(some)}/{len(prompts)} pictures, {time.monotonic() - begin:.0f} s a batch", flush=True)
    return paths


def contact_sheet(paths: list[Path], columns: int = 8, side: int = 192) -> Path:
    """All pictures in one file, in the prompts' order, row by row."""
    sheet = Image.new("RGB", (columns * side, -(-len(paths) // columns) * side))
    for number, path in enumerate(paths):
        with Image.open(path) as picture:
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), _place(number, columns, side))
    with atomic_path(FOLDER / "sheet.png") as temporary:
        sheet.save(temporary, format="PNG")
    return FOLDER / "sheet.png"


def _place(number: int, columns: int, side: int) -> tuple[int, int]:
    return number % columns * side, number // columns * side


def judge_pictures(paths: list[Path], prompts: list[Asked]) -> dict[str, Any]:
    """Share of the asked attributes that the classifier sees: each attribute, all of them, and every miss."""
    import torch

    from training.classifier import ATTRIBUTES, classify

    counts = {name: [0, 0] for name in ATTRIBUTES}
    misses = []
    for number, (path, one) in enumerate(zip(paths, prompts, strict=True)):
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
        seen = {name: value["labels"][0] for name, value in classify(pixels).items()}
        for name, wanted in one.attributes.items():
            counts[name][0] += seen[name] == wanted
            counts[name][1] += 1
            if seen[name] != wanted:
                misses.append({"picture": number, "attribute": name, "asked": wanted, "seen": seen[name]})
    right, total = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    shares = {name: {"right": r, "asked": n, "share": round(r / n, 3)} for name, (r, n) in counts.items()}
    return {"overall": round(right / total, 4), "right": right, "asked": total, **shares, "misses": misses}


def high_frequency_energy(picture: Image.Image) -> float:
    """Mean square of what a Gaussian blur takes away from the luma, in squared 8-bit levels."""
    luma = np.asarray(picture.convert("L"), dtype=np.float32)
    # Pillow blurs 8-bit pictures only, and rounding would count as detail: the kernel is applied to floats here
    radius = int(4 * BLUR)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / BLUR) ** 2)
    kernel /= kernel.sum()
    blurred = np.pad(luma, radius, mode="edge")
    for axis in (0, 1):
        length = blurred.shape[axis] - 2 * radius
        parts = [w * np.take(blurred, range(i, i + length), axis) for i, w in enumerate(kernel)]
        blurred = np.sum(parts, axis=0, dtype=np.float32)
    return float(np.mean((luma - blurred) ** 2))


def judge_run(run: Path) -> dict[str, Any]:
    """Added detail and seams of a finished run."""
    config, found = load(run / "config.yaml"), {}
    with Image.open(run / "image.png") as picture, Image.open(run / "guide" / "lowres.png") as low:
        large = low.convert("RGB").resize(picture.size, Image.Resampling.LANCZOS)
        energies = [high_frequency_energy(one) for one in (picture.convert("RGB"), large)]
    found["high_frequency"] = {"picture": energies[0], "lanczos": energies[1], "ratio": energies[0] / energies[1]}
    factor = config.model.vae_scale_factor
    for name, node in (("denoise", config.denoise), ("decode", config.decode)):
        grid = latent_grid(config.width, config.height, node.tile_size, node.overlap, factor)
        tiles = [tile.scaled(factor) for tile in grid]
        seen = seams.measure(seams.picture_strips(run / "image.png"), tiles)
        found[f"{name}_seams"] = {
            "ratio": seen.ratio,
            "local_ratio": seen.local_ratio,
            "lattice_ratio": seen.lattice_ratio,
        }
    return found


def own_run() -> Path:
    """A 2048x2048 run with the defaults."""
    print(f"runs: python runner.py stage=all prompt={PROMPT!r} (about three minutes)", flush=True)
    output = FOLDER / "runs"
    runner(output, "run=quality", "stage=all", f"prompt={PROMPT}", "progress=false").check()
    return output / "quality"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", metavar="NAME", help="name of a finished run, or its folder; default: make one")
    options.add_argument("--model", type=Path, default=ROOT / "models" / "embedded")
    options.add_argument("--scenes", type=int, default=48, help="held-out scenes for the PSNR")
    options.add_argument("--reuse", action="store_true", help="judge the pictures that are there")
    given = options.parse_args()
    run = None
    if given.run:
        run = Path(given.run) if Path(given.run).is_dir() else ROOT / "outputs" / given.run
        if not (run / "image.png").exists():
            sys.exit(f"--run: got {given.run!r}, expected a finished run. Make it: python runner.py run={run.name} ...")
    FOLDER.mkdir(parents=True, exist_ok=True)
    prompts = asked()
    guidance = float(OmegaConf.load(ROOT / "conf" / "model" / "embedded.yaml").guidance_scale)
    result: dict[str, Any] = {"psnr": autoencoder_psnr(given.model, given.scenes)}
    print(f"VAE: {result['psnr']}", flush=True)
    paths = [FOLDER / f"{number:02}.png" for number in range(len(prompts))]
    if not (given.reuse and all(path.exists() for path in paths)):
        paths = make_pictures(given.model, prompts, guidance)
    result["attributes"] = judge_pictures(paths, prompts)
    result["classifier"] = judge_accuracy(2 * given.scenes)
    print(f"look at them: {contact_sheet(paths).relative_to(ROOT)}", flush=True)
    result |= judge_run(run or own_run())
    return report(result)


def report(result: dict[str, Any]) -> int:
    """Print the four figures, write them down."""
    seen, detail = result["attributes"], result["high_frequency"]["ratio"]
    for miss in seen["misses"]:
        print(f"  picture {miss['picture']:02}: {miss['attribute']} {miss['asked']}, seen as {miss['seen']}")
    table(
        ("attribute", "right", "share", "classifier on rendered scenes"),
        [
            (name, f"{seen[name]['right']}/{seen[name]['asked']}", f"{seen[name]['share']:.0%}", f"{own:.0%}")
            for name, own in result["classifier"].items()
        ],
    )
    checks = {
        f"VAE PSNR on held-out scenes {result['psnr']['mean']:.1f} dB, at least 28": result["psnr"]["mean"] >= 28,
        f"attributes right {seen['right']}/{seen['asked']} = {seen['overall']:.1%}, at least 90%": seen["overall"]
        >= 0.9,
        f"high-frequency energy {detail:.2f}x the Lanczos-upscaled picture's, at least 1.5": detail >= 1.5,
    }
    for name in ("denoise", "decode"):
        one = result[f"{name}_seams"]
        for key, said in (("ratio", "elsewhere"), ("lattice_ratio", "elsewhere between latents")):
            text = f"mean gradient across {name} borders / {said} {one[key]:.3f}, 0.9 to 1.1"
            checks[text] = 0.9 <= one[key] <= 1.1
    return finish("embedded_quality", result, checks)


if __name__ == "__main__":
    sys.exit(main())
