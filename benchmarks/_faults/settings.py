"""Random settings: refused clearly before any work, or the run completes; what a plan accepts is never refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import diffusers.schedulers as schedulers
import yaml

from benchmarks._faults.common import BASE, Bench, Tally, last, picture, unclear, within_budget, worked
from stages.workflow.keys import groups, known_keys

ABSURD = (
    *("", "null", "-1", "0", "1", "0.5", "1e9", "1e-9", "nan", "inf", "-inf", "abc", "true", "[]", "{}", "[1,2]"),
    *("{a: 1}", "99999999999999999999", "../../etc", "/dev/null", "/dev/zero", "/proc/self/mem", "~", "☃", "${seed}"),
    *("a,b", "'", '"', "\\", "   ", "x" * 5000, "!!python/object:os.system", "[[[[[]]]]]", "0x10", "1_000", "???"),
    *("${oc.env:HOME}", "-0", "2**64", "yes", "800 MB", "16", "64", "[[1]]", "{a: {b: {}}}", "[null]", "['']"),
)
GOOD: dict[str, tuple[str, ...]] = {
    "prompt": ("a cat", "", "(a:1.2)", "x" * 3000, "'\"\\${x}", "☃ ü", "a\nb", "a, b, c"),
    "negative_prompt": ("", "dog", "${x}", "☃"),
    "prompt_file": ("prompt.txt", "pipe", "missing.txt", "folder", "latin.txt", "huge.txt", "/dev/zero"),
    "width": ("8", "64", "72", "100", "128", "136", "192", "512", "4096", "65536", "65544", "-8", "0"),
    "height": ("8", "64", "72", "100", "128", "136", "192", "512", "4096", "65536", "65544", "-8", "0"),
    "seed": ("0", "7", "-1", "18446744073709551615", "18446744073709551616", "-2", "1.5"),
    "stage": ("all", "plan", "denoise", "[decode,stitch]", "decode", "nothing", "[]", "[all]", "[plan,decode]"),
    "regions": (
        *("regions.json", "regions.yaml", "missing.yaml", "ragged.json", "bomb.yaml", "pipe", "deep.json", "[]"),
        *("[{prompt: a, box: [0, 0, 128, 96]}]", "[{prompt: a, box: [0, 0, 0, 0]}]", "[{prompt: a, box: [0, 0, 64]}]"),
        *(
            "[{prompt: a, box: [-8, 0, 64, 96]}]",
            "{grid: [[a, b]]}",
            "{grid: [[a], [b, c]]}",
            "[{box: [0, 0, 64, 96]}]",
        ),
        *("[{prompt: a, box: [0, 0, nan, 96]}]", "[{prompt: a, weight: -1, box: [0, 0, 64, 96]}]", "[1, 2]", "text"),
    ),
    "reroll": ("[{box: [0, 0, 64, 64], seed: 3}]", "[{box: [0, 0, 999, 64], seed: 3}]", "[{seed: 3}]", "[1]", "{a: 1}"),
    "guide.image": ("picture.png", "missing.png", "pipe", "folder", "prompt.txt", "/dev/zero", "torn.png"),
    "guide.mode": ("sdedit", "hold", "skip_residual", "none", "img2img"),
    "guide.phases": ("[]", "[96]", "[64,96]", "[96,64]", "[128]", "[97]", "[8]", "[0]", "[-8]", "[1.5]", "[a]", "96"),
    "guide.hold_steps": ("0", "0.3", "1", "1.1", "-0.1"),
    "guide.tile_size": ("8", "64", "100", "128", "4096"),
    "denoise.num_inference_steps": ("1", "2", "4", "1000", "1001", "0", "-3", "60"),
    "lowres.num_inference_steps": ("1", "2", "4", "1000", "1001", "0", "-3", "60"),
    "denoise.strength": ("0.01", "0.25", "1", "1.01", "0", "-1"),
    "denoise.tile_size": ("8", "16", "64", "96", "100", "4096"),
    "denoise.overlap": ("0", "8", "16", "56", "64", "72", "-8"),
    "denoise.guidance_scale": ("0", "0.5", "1", "7.5", "100", "101"),
    "lowres.guidance_scale": ("0", "0.5", "1", "7.5", "100", "101"),
    "lowres.width": ("8", "64", "128", "63", "4096"),
    "lowres.height": ("8", "64", "96", "63", "4096"),
    "decode.tile_size": ("8", "16", "64", "100", "4096"),
    "decode.overlap": ("0", "8", "56", "64"),
    "decode.halo": ("0", "8", "64", "4096"),
    "text_encode.clip_skip": ("0", "1", "2", "99", "-1"),
    "scheduler.class_name": (
        *sorted(name for name in vars(schedulers) if name.endswith("Scheduler")),
        *("UNet2DConditionModel", "SchedulerMixin", "Scheduler", "os.system", "NoSuchScheduler"),
    ),
    "scheduler.options": (
        *(
            "{use_karras_sigmas: true}",
            "{prediction_type: v_prediction}",
            "{prediction_type: nan}",
            "{beta_start: nan}",
        ),
        *("{num_train_timesteps: 100000000}", "{num_train_timesteps: 3}", "{beta_end: 1e9}", "{beta_start: nan}"),
        *("{timestep_spacing: leading}", "{timestep_spacing: trailing, steps_offset: 1}", "{steps_offset: 100}"),
        *("{trained_betas: [1, 2]}", "{beta_schedule: squared}", "{rescale_betas_zero_snr: true}", "{eta: 1}"),
        *(
            "{solver_order: 9}",
            "{algorithm_type: sde-dpmsolver++}",
            "{use_exponential_sigmas: true}",
            "{set_alpha_to_one: 3}",
        ),
    ),
    "model.path": ("missing", "folder", "picture.png", "org/name", "/dev/zero", "weights.ckpt", "empty.safetensors"),
    "model.family": ("sd", "sdxl", "sd3", "nothing"),
    "model.prediction_type": ("epsilon", "v_prediction", "sample", "nan", "flow"),
    "model.native_size": ("8", "64", "128", "100", "0"),
    "memory.budget": ("800MB", "1500MB", "2GB", "300MB", "1MB", "800", "-1GB", "1e3MB", "999999999TB"),
    "memory.device_budget": ("800MB", "x", "0"),
    "memory.enforce": ("auto", "cgroup", "watchdog", "off", "none"),
    "memory.weights": ("auto", "streamed", "resident", "x"),
    "technique.dtype": ("auto", "fp32", "bf16", "float32", "int8"),
    "technique.component_dtype": ("{vae: fp32}", "{vae: int8}", "{nothing: fp32}", "{unet: bf16}"),
    "launch.threads": ("1", "2", "0", "-1", "100000"),
    "launch.sample_seconds": ("0.02", "0.0001", "11", "nan"),
    "stitch.format": ("png", "tiff", "deepzoom", "gif"),
    "stitch.compression": ("0", "9", "10", "-1"),
    "run": ("poster", "../x", ".", "a/b", "x" * 200, "-x", "☃", "a b"),
    "output_dir": ("{}/out", "/proc/nothing", "{}/picture.png", "/dev/null/x"),
    "device": ("cpu", "cuda", "cuda:0", "cuda:x", "tpu", "mps"),
    "model.revision": ("main", "x" * 40),
    "denoise.dilated.enabled": ("true", "false", "3"),
}
_COSTLY = 192 * 192  # pixels of a canvas that is computed and not only planned
_STEPS = 8


def files(folder: Path) -> None:
    """What the person's values name."""
    import os

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "pipe").exists():
        return
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "prompt.txt").write_text("a boat on the sea\n")
    (folder / "latin.txt").write_bytes("ein schönes Boot".encode("latin-1"))
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(1 << 30)
    picture(300, 200).save(folder / "picture.png")
    (folder / "torn.png").write_bytes((folder / "picture.png").read_bytes()[:400])
    (folder / "regions.json").write_text('{\n\t"regions": [{"prompt": "a \\ud83d\\ude00", "box": [0, 0, 128, 96]}]\n}')
    (folder / "regions.yaml").write_text("regions:\n  - {prompt: 2024-01-01, box: [0, 0, 128, 96]}\n")
    (folder / "ragged.json").write_text('{"prompt": [["a", "b"], ["c"]], "tile_width": 64, "tile_height": 64}')
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11))]
    (folder / "bomb.yaml").write_text("\n".join([*lines, "regions: *a10"]))
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "weights.ckpt").write_bytes(b"\x80\x02cos\nsystem\n")
    (folder / "empty.safetensors").write_bytes(b"")


def drawn(random: Random, keys: list[str], folder: Path) -> dict[str, str]:
    """Up to four settings, good and absurd; ``folder`` holds the person's files."""
    found: dict[str, str] = {}
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        if random.random() < 0.1:
            group, names = random.choice(sorted(groups().items()))
            if group not in ("model", "device"):
                found[group] = random.choice([*names, "nothing"])
            continue
        key = random.choice(list(GOOD) if random.random() < 0.6 else keys)
        good = GOOD.get(key, ABSURD)
        if key == "output_dir":  # a relative one begins in the repository
            found[key] = random.choice(good).format(folder)
            continue
        found[key] = random.choice(good if random.random() < 0.75 else ABSURD)
    return found


def cheap(config: Path) -> bool:
    """Whether a planned run is small enough to be computed."""
    c: Any = yaml.safe_load(config.read_text())
    areas = [c["width"] * c["height"], c["lowres"]["width"] * c["lowres"]["height"]]
    steps = [c[stage]["num_inference_steps"] for stage in ("lowres", "denoise")]
    tiles = [c[node]["tile_size"] - c[node]["overlap"] for node in ("denoise", "decode")]
    return max(areas) <= _COSTLY and max(steps) <= _STEPS and min(tiles) >= 16 and c["guide"]["tile_size"] >= 16


def run(bench: Bench) -> Tally:
    tally = Tally("random settings")
    output, keys = bench.scratch / "out", sorted(known_keys())
    files(bench.cwd(output))
    base = {text.partition("=")[0] for text in BASE}
    while tally.tries < bench.tries:
        tally.tries += 1
        name = f"s{tally.tries}"
        chosen = {"run": name, **drawn(bench.random, keys, bench.cwd(output))}
        if bench.random.random() < 0.3:  # derived values are tried too
            left = bench.random.choice(sorted(base - {"model", "prompt", "width", "height", "progress"}))
            chosen.setdefault(left, "null" if left in ("denoise.strength",) else chosen.get(left, "null"))
        where, run_name = Path(bench.cwd(output) / chosen.get("output_dir", str(output))), chosen["run"]
        said = [f"{key}={value}" for key, value in chosen.items()]
        what = " ".join(text[:120] for text in said)
        folder = where / run_name
        planned = bench.run(output, *said, "stage=plan")
        if planned.code:
            if why := unclear(planned):
                tally.fault("stuck" if planned.timed_out else "unclear", f"{what}: {why}: {last(planned)}")
            continue
        if not (folder / "config.yaml").is_file() or not cheap(folder / "config.yaml"):
            continue
        done = bench.run(output, *said)
        if done.code and chosen.get("stage", "all") not in ("all", "plan") and not (why := unclear(done)):
            continue  # inputs of a stage by itself are not there
        if done.code:
            which = "stuck" if done.timed_out else "unclear"
            late = "after work: " if worked(where, run_name) else "not by the plan: "
            tally.fault(which, f"{what}: refused {late}{last(done)}")
        within_budget(tally, where, what, run_name)
        shutil.rmtree(folder, ignore_errors=True)
    return tally
