"""``run.json`` for programs and ``report.html`` for people; written at the end of a run, also of a failed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.documents import save_text
from stages.files import read_object, write_json, write_text
from stages.job import Job
from stages.memory.monitor import Sample, own_peak_rss
from stages.plans import StagePlan
from stages.techniques.lora_file import strengths
from stages.workflow.launch import StageResult

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 960, 300, 60, 70
_BORDERS = 10  # rows of a table of seams


def write(
    run_dir: Path,
    job: Job,
    results: Sequence[StageResult],
    predictions: Mapping[str, StagePlan],
    error: str = "",
) -> dict[str, Any]:
    """Write both files; returns what is in ``run.json``.

    A reused stage has ``seconds`` 0 and the peak of the time it was computed. ``peak_rss_bytes`` of the run is the
    highest of its stages (each with the runner in it).
    """
    html = render(run_dir, job, results, predictions, error)  # first: what it takes counts for the runner
    own = own_peak_rss()
    summary: dict[str, Any] = {
        "image": "image.png" if (run_dir / "image.png").exists() else None,
        "stages": [
            {
                "name": result.name,
                "status": result.status,
                "reason": result.reason,
                "seconds": result.seconds,
                "waited_seconds": result.waited_seconds,
                "peak_rss_bytes": result.peak_rss_bytes,
                "predicted_peak_rss_bytes": predictions.get(result.name, StagePlan()).predicted_peak_rss_bytes,
                "ranks": result.ranks,
                "device_map": {
                    component: dict(model.placement)
                    for component, model in predictions.get(result.name, StagePlan()).models.items()
                    if model.placement
                },
                "peak_vram_bytes": result.peak_vram_bytes,
                "gpus": list(result.gpus),
                "predicted_peak_vram_bytes": predictions.get(result.name, StagePlan()).predicted_peak_vram_bytes,
                "fingerprint": result.fingerprint,
                "peak_module": result.peak_module,
                "heaviest_modules": [{"module": name, "peak_rss_bytes": size} for name, size in result.heaviest],
            }
            for result in results
        ],
        "peak_rss_bytes": max([own, *(result.peak_rss_bytes for result in results)]),
        "budget_bytes": job.budget,
        "device_budget_bytes": job.device_budget,
        "runner_peak_rss_bytes": own,
        "run": job.run,
        "error": error or None,
    }
    write_text(run_dir / "report.html", html)
    write_json(run_dir / "run.json", summary)
    return summary


class Lane(NamedTuple):
    """One stage in the plot: its name, extent in pixels, the line of its samples and where it peaked."""

    name: str
    left: float
    width: float
    points: str
    anon_points: str
    vram_points: str  # empty without a GPU
    peak_x: float
    peak_y: float
    label: str


def render(
    run_dir: Path,
    job: Job,
    results: Sequence[StageResult],
    predictions: Mapping[str, StagePlan],
    error: str,
) -> str:
    """The page: picture, stages, memory, heaviest modules, seams, parameters. No scripts, nothing from outside."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["mb"] = lambda size: f"{size / 1e6:.0f}" if size else "-"
    budget = job.budget
    heaviest = [(result.name, name, size) for result in results for name, size in result.heaviest]
    return environment.get_template("report.html.j2").render(
        config=job.config,
        loras=[one.tag for one in strengths(job.config)],
        error=error,
        results=results,
        predicted={name: one.predicted_peak_rss_bytes for name, one in predictions.items()},
        budget=budget,
        peak=max((result.peak_rss_bytes for result in results), default=0),
        plot=plot(results, budget),
        width=_WIDTH,
        height=_HEIGHT,
        bottom=_BOTTOM,
        heaviest=sorted(heaviest, key=lambda row: -row[2])[:10],
        picture="image.png" if (run_dir / "image.png").exists() else None,
        lowres="guide/lowres.png" if (run_dir / "guide" / "lowres.png").exists() else None,
        seams=_seams(run_dir),
        parameters=save_text(job.config),
    )


def _seams(run_dir: Path) -> list[dict[str, Any]]:
    """What ``stitch`` measured at the borders of the tiles: a grid's name, ratios, most visible borders, map."""
    found = read_object(run_dir / "stitch" / "seams.json")
    return [
        {**one, "name": name, "borders": one["borders"][:_BORDERS], "map": f"stitch/seams_{name}.png"}
        for name, one in found.items()
    ]


def plot(results: Sequence[StageResult], budget: int) -> dict[str, Any]:
    """Coordinates of the memory timeline: stages side by side, widths by time, heights by bytes."""
    drawn = [result for result in results if result.timeline]
    highest = [budget, *(sample.rss for result in drawn for sample in result.timeline)]
    highest = max(highest + [sample.vram for result in drawn for sample in result.timeline]) * 1.05
    total = sum(max(result.timeline[-1].seconds, 0.05) for result in drawn) or 1.0
    scale, left, lanes = (_WIDTH - _LEFT) / total, float(_LEFT), []

    def height(size: int) -> float:
        return round(_HEIGHT - _BOTTOM - size / highest * (_HEIGHT - _BOTTOM), 1)

    for result in drawn:
        seconds = max(result.timeline[-1].seconds, 0.05)
        top = max(result.timeline, key=lambda sample: sample.rss)

        def points(kind: str, samples: Sequence[Sample] = result.timeline, left: float = left) -> str:
            return " ".join(f"{left + s.seconds * scale:.1f},{height(getattr(s, kind))}" for s in samples)

        on_gpu = points("vram") if any(sample.vram for sample in result.timeline) else ""
        label = f"{top.rss / 1e6:.0f} MB" + (f" {top.module}" if top.module else "")
        x, y = left + top.seconds * scale, height(top.rss)
        lanes.append(Lane(result.name, left, seconds * scale, points("rss"), points("anon"), on_gpu, x, y, label))
        left += seconds * scale
    step = max(10**8, int(highest / 5 // 10**8 * 10**8))
    ticks = [(size // 10**6, height(size)) for size in range(0, int(highest), step)]
    return {"lanes": lanes, "budget": height(budget), "ticks": ticks, "left": _LEFT, "seconds": total}
