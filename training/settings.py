"""Settings of a training run and its command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(kw_only=True)
class Settings:
    """Seconds of each phase in all; stop_after: seconds of this command; reserve: kept of it for figures and files."""

    out: Path
    device: str = "cuda"
    resume: bool = False
    seed: int = 0
    vae_seconds: float = 200.0
    denoiser_seconds: float = 560.0
    classifier_seconds: float = 40.0
    stop_after: float = 570.0
    reserve: float = 30.0
    size: int = 256
    tiny: bool = False
    groups: int = 2400
    per_group: int = 64
    held_groups: int = 32
    vae_batch: int = 96
    batch: int = 512
    lr: float = 1.0e-3
    classifier_batch: int = 256
    pool: int = 131072
    fill: int = 128
    render_every: int = 2
    sheet: int = 12
    sheet_columns: int = 4
    sample_steps: int = 25
    prompts: int = 192


def smoke(out: Path, resume: bool) -> Settings:
    """The whole recipe in half a minute on two CPU cores: toy networks, 64-pixel pictures, a handful of scenes."""
    return Settings(
        out=out,
        device="cpu",
        resume=resume,
        vae_seconds=6,
        denoiser_seconds=6,
        classifier_seconds=3,
        stop_after=36,
        reserve=8,
        size=64,
        tiny=True,
        groups=6,
        per_group=4,
        held_groups=2,
        vae_batch=8,
        batch=16,
        classifier_batch=16,
        pool=64,
        fill=4,
        render_every=1,
        sheet=2,
        sheet_columns=1,
        sample_steps=5,
        prompts=4,
    )


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> Settings:
    """Read the command line into settings. Minutes on the command line, seconds inside."""
    default = Settings(out=Path())
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--resume", action="store_true", help="go on from what lies in --out")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU, under 40 seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--minutes", type=float, help="length of this command; default: stop-after of 9.5 minutes")
    parser.add_argument("--vae-minutes", type=float, default=default.vae_seconds / 60)
    parser.add_argument("--denoiser-minutes", type=float, default=default.denoiser_seconds / 60)
    parser.add_argument("--classifier-minutes", type=float, default=default.classifier_seconds / 60)
    for name in ("batch", "vae_batch", "groups", "per_group", "pool", "fill", "render_every"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--lr", type=float, default=default.lr)
    args = parser.parse_args(argv)
    if args.smoke:
        return smoke(args.out, args.resume)
    return Settings(
        out=args.out,
        device=args.device,
        resume=args.resume,
        seed=args.seed,
        vae_seconds=args.vae_minutes * 60,
        denoiser_seconds=args.denoiser_minutes * 60,
        classifier_seconds=args.classifier_minutes * 60,
        stop_after=args.minutes * 60 if args.minutes else default.stop_after,
        batch=args.batch,
        vae_batch=args.vae_batch,
        groups=args.groups,
        per_group=args.per_group,
        pool=args.pool,
        fill=args.fill,
        render_every=args.render_every,
        lr=args.lr,
    )
