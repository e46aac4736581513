"""What the kinds share: the tally of a kind, the runs that are disturbed, and what counts as a fault."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from benchmarks._faults.warm import Command, Ended

FAULTS = ("wrong picture", "lost", "stuck", "unclear", "over budget")
BUDGET = "1500MB"  # runner and stage are forks of a process that holds all libraries: twice what each needs

BASE = (
    *("model=sd15", "scheduler=euler_ancestral", "prompt=a cat, (sea:1.2)", "negative_prompt=dog", "seed=5"),
    *("model.native_size=64", "model.size_multiple=8", "model.phase_growth=1", "width=128", "height=96"),
    *("lowres.num_inference_steps=3", "denoise.num_inference_steps=4", "denoise.strength=0.75"),
    *("decode.tile_size=64", "decode.overlap=16", "decode.halo=16", "guide.tile_size=64"),
    *("technique.dtype=fp32", "launch.threads=1", "launch.sample_seconds=0.05", "progress=false"),
    *(f"memory.budget={BUDGET}", "memory.enforce=watchdog", "memory.weights=streamed"),
)
REGIONS = "regions=[{prompt: sky, box: [0, 0, 128, 64]}, {prompt: sea, box: [0, 32, 128, 96], seed: 7}]"
VARIANTS: dict[str, tuple[str, ...]] = {
    "tiles": (),
    "exact": ("decode.mode=exact", "guide.vae_mode=exact"),
    "phases": ("guide.phases=[96]", "denoise.dilated.enabled=true"),
    "regions": (REGIONS, "scheduler=dpmpp_2m"),
    "picture": ("guide.image=picture.png", "decode.mode=independent"),
}


@dataclass
class Tally:
    """Tries of one kind, and the faults that were found: (which, what happened)."""

    kind: str
    tries: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)

    def fault(self, which: str, what: str) -> None:
        assert which in FAULTS
        self.faults.append((which, what))
        print(f"{self.kind}: {which.upper()}: {what}", file=sys.stderr, flush=True)

    def count(self, which: str) -> int:
        return sum(one == which for one, _ in self.faults)


@dataclass(frozen=True)
class Bench:
    """Where all happens, the checkpoint, chance, and how many tries of a kind are wanted."""

    scratch: Path
    checkpoint: Path
    random: Random
    tries: int
    variants: tuple[str, ...] = tuple(VARIANTS)

    def arguments(self, output: Path, *more: str) -> list[str]:
        """A whole command; later values replace earlier ones."""
        found: dict[str, str] = {}
        for text in (*BASE, f"model.path={self.checkpoint}", f"output_dir={output}", "run=x", *more):
            found[text.partition("=")[0]] = text
        return list(found.values())

    def run(self, output: Path, *more: str, timeout: float = 300.0) -> Ended:
        """It, to its end."""
        return Command(self.cwd(output), self.arguments(output, *more)).end(timeout)

    def cwd(self, output: Path) -> Path:
        """Where commands on ``output`` begin, with the person's files."""
        folder = output.with_name(f"{output.name}-cwd")
        if not (folder / "picture.png").exists():
            folder.mkdir(parents=True, exist_ok=True)
            picture(300, 200).save(folder / "picture.png")
        return folder

    def template(self, name: str) -> Path:
        """The finished run of a variant; made once."""
        output = self.scratch / f"template-{name}"
        if not (output / "x" / "image.png").exists():
            made = self.run(output, *VARIANTS[name])
            if made.code:
                raise SystemExit(
                    f"the run that is to be disturbed failed ({made.code}):\n{made.err}\n{made.out[-2000:]}"
                )
        return output

    def copy(self, name: str) -> Path:
        """A fresh copy of a template."""
        target = self.scratch / "try"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.template(name), target, symlinks=True)
        shutil.rmtree(self.scratch / "try-cwd", ignore_errors=True)
        return target


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def image(output: Path) -> bytes | None:
    """The run's picture, if there is one."""
    file = output / "x" / "image.png"
    return file.read_bytes() if file.is_file() else None


def summary(output: Path, run: str = "x") -> dict[str, Any]:
    file = output / run / "run.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def stages_of(output: Path) -> list[str]:
    """Stages of a finished run, in order."""
    return [stage["name"] for stage in summary(output)["stages"]]


def results(output: Path, stage: str) -> list[Path]:
    """The folders of a stage in the store."""
    return sorted(path for path in (output / ".store" / stage).glob("*") if path.is_dir())


def forget(output: Path, stages: Sequence[str]) -> None:
    """Remove the results of these stages."""
    for stage in stages:
        shutil.rmtree(output / ".store" / stage, ignore_errors=True)


def same_picture(tally: Tally, output: Path, template: Path, done: Ended, what: str) -> bool:
    """Whether the command ended well with the template's picture; what did not is a fault."""
    if done.timed_out or done.code:
        tally.fault("stuck", f"{what}: exit {done.code}{' (too long)' if done.timed_out else ''}: {last(done)}")
        return False
    if image(output) != image(template):
        tally.fault("wrong picture", f"{what}: {output}")
        return False
    within_budget(tally, output, what)
    return True


def within_budget(tally: Tally, output: Path, what: str, run: str = "x") -> None:
    found = summary(output, run)
    if found and found.get("peak_rss_bytes", 0) > found.get("budget_bytes", 1 << 60):
        tally.fault("over budget", f"{what}: {found['peak_rss_bytes'] / 1e6:.0f} MB")


def last(done: Ended, length: int = 400) -> str:
    return " | ".join(done.err.strip().splitlines()[-6:])[-length:]


_SAYS = re.compile(
    r"\bgot\b|expected|needs at least|cannot|not a known key|disk is full|[Mm]issing|Could not|is damaged|torn|not JSON"
    r"|not a whole|NaN or infinite|do not fit"
)


def unclear(done: Ended) -> str:
    """Why a refusal is not one that a person understands; "" if it is."""
    if done.timed_out:
        return "took too long"
    if done.code != 1:
        return f"exit code {done.code}"
    if "Traceback" in done.err:
        return "a traceback"
    if not done.err.strip():
        return "says nothing"
    if len(done.err) > 4000:
        return f"{len(done.err)} characters"
    return "" if _SAYS.search(done.err) else "says neither what was got nor what was expected"


def worked(output: Path, run: str = "x") -> bool:
    """Whether any stage did something in the run's last command."""
    return any(stage.get("status") in ("ran", "resumed") for stage in summary(output, run).get("stages", ()))
