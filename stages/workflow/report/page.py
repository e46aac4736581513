"""``report.html``: one page for people. Nothing in it comes from outside; pictures lie beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.documents import save_text
from stages.files import read_object
from stages.job import Job
from stages.techniques.lora_file import strengths
from stages.tiles import latent_grid
from stages.workflow.launch import StageResult

if TYPE_CHECKING:
    from jinja2 import Environment

PAGES = Path(__file__).parent / "pages"
_BORDERS = 10  # rows of a table of seams


@cache
def environment() -> Environment:
    """Where the templates are; texts are escaped. ``mb``: bytes as megabytes; ``time``, ``ago``: seconds in
    words."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from stages.workflow.progress import duration

    found = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found.filters["mb"] = lambda size: f"{size / 1e6:.0f}" if size else "-"
    found.filters["ago"] = _ago
    found.filters["time"] = lambda seconds: duration(seconds) if seconds else "-"
    return found


def _ago(seconds: float) -> str:
    """``3 hours ago``, by the largest unit that it fills."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return "now" if seconds < 60 else "a minute ago" if seconds < 120 else f"{int(seconds // 60)} minutes ago"


def render(
    run_dir: Path,
    job: Job,
    rows: Sequence[dict[str, Any]],
    *,
    state: str,
    results: Sequence[StageResult] = (),
    error: str = "",
    command: str = "",
    typed: str = "",
    preview: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Args:
        rows: of the stages (:mod:`stages.workflow.report.rows`).
        state: running | finished | failed | stopped.
        command: that goes on with the run; ``typed``: the one that makes it from nothing.
        preview: the address of a small picture of how it came out so far, and its ``stage``.
    """
    heaviest = [(result.name, name, size) for result in results for name, size in result.heaviest]
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            config=job.config,
            loras=[one.tag for one in strengths(job.config)],
            state=state,
            error=error,
            command=command,
            typed=typed,
            preview=preview,
            rows=rows,
            budget=job.budget,
            peak=max((result.peak_rss_bytes for result in results), default=0),
            on_gpu=any(row.get("vram") or row.get("planned_vram") for row in rows),
            heaviest=sorted(heaviest, key=lambda row: -row[2])[:10],
            seams=_seams(run_dir),
            parameters=save_text(job.config),
            picture=picture(run_dir, job),
        )
    )


def picture(run_dir: Path, job: Job) -> dict[str, Any] | None:
    """What the viewer shows: size in pixels, where its tiles lie, grids and regions over it; None without a picture."""
    if not (run_dir / "image.png").exists():
        return None
    config, zoom = job.config, read_object(run_dir / "stitch" / "zoom" / "zoom.json")
    factor, grids = config.model.vae_scale_factor, {}
    for name in ("denoise", "decode"):
        step = config.model.patch if name == "denoise" else 1
        tiles = latent_grid(config.width, config.height, config[name].tile_size, config[name].overlap, factor, step)
        grids[name] = {
            "rows": sorted({(tile.top * factor, tile.bottom * factor) for tile in tiles}),
            "cols": sorted({(tile.left * factor, tile.right * factor) for tile in tiles}),
        }
    return {
        "image": "image.png",
        "width": config.width,
        "height": config.height,
        "zoom": {**zoom, "folder": "stitch/zoom"} if zoom else None,
        "lowres": "guide/lowres.png" if (run_dir / "guide" / "lowres.png").exists() else None,
        "grids": grids,
        "regions": [
            {"box": [one.box.left, one.box.top, one.box.right, one.box.bottom], "prompt": one.prompt}
            for one in job.regions.regions
        ],
    }


def _seams(run_dir: Path) -> list[dict[str, Any]]:
    """What ``stitch`` measured at the borders of the tiles: a grid's name, ratios, most visible borders, map."""
    found = read_object(run_dir / "stitch" / "seams.json")
    return [
        {**one, "name": name, "borders": one["borders"][:_BORDERS], "map": f"stitch/seams_{name}.png"}
        for name, one in found.items()
    ]
