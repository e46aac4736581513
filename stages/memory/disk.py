"""Room on the disk for scratch files of exact passes and of tiles that wait: what is there, the refusal. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from stages import Stage

SCRATCH = "checkpoint_exact"  # begins the names of scratch folders in a stage's output; they go when the stage ends
_SCOPE = ("technique.linfusion.scope=canvas", "technique.linfusion.scope=tile")
_WAYS = {  # (what needs it, what does not)
    "decode": ("decode.mode=exact", "decode.mode=shared"),
    "guide": ("guide.vae_mode=exact", "guide.vae_mode=shared"),
    "lowres": _SCOPE,
    "denoise": _SCOPE,
}


def room(output: Path) -> int:
    """Bytes that scratch files in ``output`` may take: free ones, and what an interrupted pass left there."""
    there = sum(path.stat().st_size for path in output.glob(f"{SCRATCH}*/*"))
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    return shutil.disk_usage(nearest).free + there


def refusal(stage: Stage, needed: int, there: int) -> str:
    """What to do where ``needed`` bytes are more than ``there`` are."""
    way, other = _WAYS[stage.module]
    return (
        f"{way}: {stage.name} needs {needed / 1e9:.1f} GB of scratch space, {there / 1e9:.1f} GB are free. "
        f"Free some, set output_dir to another disk, or use {other}."
    )
