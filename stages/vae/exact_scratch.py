"""The scratch folder of an exact pass in a stage: room for it, what an earlier try left, progress in layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.context import StageContext
from stages.memory.disk import SCRATCH, refusal, room
from stages.tiles import Size
from stages.vae.exact import layers_done
from stages.vae.exact_program import program
from stages.vae.exact_vae import PIXELS, Direction, exact_disk_bytes


def open_scratch(context: StageContext, streamer: Any, direction: Direction, size: Size) -> tuple[Path, dict[str, Any]]:
    """The folder and the options of ``exact_decode`` or ``exact_encode``; says how much disk it takes.

    Args:
        streamer: ``models.loading.Streamer`` of the VAE.
        size: of the canvas in latents.

    Raises:
        ValueError: the disk has less room than the scratch files need.
    """
    vae, progress, folder = streamer.model, context.progress, context.output / f"{SCRATCH}_{direction}"
    needed, there = exact_disk_bytes(vae, direction, size, vae.dtype.itemsize), room(context.output)
    if needed > there:
        raise ValueError(refusal(context.stage, needed, there))
    progress.note(f"exact {direction}: up to {needed / 1e9:.1f} GB of scratch space in {folder}")
    layers = len(program(vae, direction))
    before = layers if (folder / PIXELS).is_file() else layers_done(folder)
    if before:
        progress.resumed(f"layer {before} of {layers}")
    progress.start(layers, "layers", before)
    shown = before

    def advance(share: float) -> None:
        nonlocal shown
        now = max(shown, round(share * layers))
        progress.advance(now - shown)
        shown = now

    common = {"hold": streamer.hold, "device": context.config.device}
    return folder, {**common, "mark": progress.mark, "advance": advance}
