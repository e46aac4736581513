"""Settings of a training run and its command line."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch

PHASES = ("vae", "denoiser", "classifier")


@dataclass(kw_only=True)
class Settings:
    """Seconds of each phase in all; stop_after: seconds of this command; reserve: kept of it for figures and files.

    phase: the one to train, or ``all``. finish: its budget ends with this command. parts: folder that gets the files
    of the phases that ran. keep_every: seconds after which the denoiser is written while it learns. text: diffusers
    folder of a text encoder to begin with. anchor: one of an autoencoder of fewer channels or as many, whose latents
    the first channels keep. Batches, pools and groups: those of one process.
    """

    out: Path
    device: str = "cuda"
    phase: str = "all"
    resume: bool = False
    finish: bool = False
    compile: bool = False
    parts: Path | None = None
    text: Path | None = None
    anchor: Path | None = None
    seed: int = 0
    vae_seconds: float = 450.0
    denoiser_seconds: float = 960.0
    classifier_seconds: float = 45.0
    stop_after: float = 540.0
    reserve: float = 35.0
    size: int = 256
    tiny: bool = False
    groups: int = 800
    per_group: int = 128
    held_groups: int = 32
    vae_batch: int = 192
    vae_lr: float = 1.0e-3
    texture: float = 0.2
    batch: int = 384
    lr: float = 8.0e-4
    classifier_batch: int = 256
    pictures: int = 24576
    pool: int = 262144
    fill: int = 64
    render_every: int = 6
    keep_every: float = 240.0
    sheet: int = 16
    sheet_columns: int = 2
    sample_steps: int = 25
    prompts: int = 192


_SMOKE = {
    "vae_seconds": 6,
    "denoiser_seconds": 6,
    "classifier_seconds": 3,
    "stop_after": 36,
    "reserve": 8,
    "size": 64,
    "tiny": True,
    "groups": 6,
    "per_group": 4,
    "held_groups": 2,
    "vae_batch": 8,
    "batch": 16,
    "classifier_batch": 16,
    "pictures": 64,
    "pool": 64,
    "fill": 4,
    "render_every": 1,
    "sheet": 2,
    "sheet_columns": 1,
    "sample_steps": 5,
    "prompts": 4,
}


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[Settings, int]:
    """Read the command line into settings, and how many processes are asked for. Minutes on the command line,
    seconds inside."""
    default = Settings(out=Path())
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--phase", choices=("all", *PHASES), default=default.phase)
    parser.add_argument("--resume", action="store_true", help="go on from what lies in --out")
    parser.add_argument("--finish", action="store_true", help="the phase ends with this command: anneal to its end")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU, under 40 seconds")
    parser.add_argument("--compile", action="store_true", help="torch.compile: minutes, unless its cache is warm")
    parser.add_argument("--parts", type=Path, help="copy the files of the phases that ran there")
    parser.add_argument("--text", type=Path, help="diffusers folder whose text encoder to begin with")
    parser.add_argument(
        "--anchor", type=Path, help="diffusers folder of an autoencoder whose latents the first channels keep"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()), help="one a GPU")
    parser.add_argument("--minutes", type=float, default=default.stop_after / 60, help="length of this command")
    for name in PHASES:
        minutes = getattr(default, f"{name}_seconds") / 60
        parser.add_argument(
            f"--{name}-minutes", type=float, default=minutes, help="of the phase, all commands together"
        )
    numbers = ("seed", "batch", "vae_batch", "groups", "per_group", "pictures", "pool", "fill", "render_every")
    for name in (*numbers, "lr", "vae_lr", "texture", "reserve", "keep_every"):
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(argv))
    seconds = {f"{name}_seconds": 60 * given.pop(f"{name}_minutes") for name in PHASES}
    values = given | seconds | {"stop_after": 60 * given["minutes"]}
    values = {field.name: values[field.name] for field in fields(Settings) if field.name in values}
    if given["smoke"]:
        values |= _SMOKE | {"device": "cpu"}
    return Settings(**values), given["processes"]
