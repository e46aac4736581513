"""What each technique costs and gains: Stable Diffusion 1.5 with every switch, memory against speed.

    python -m benchmarks techniques                       # on a GPU, about 8 minutes with those of random weights
    python -m benchmarks techniques --device cpu --rows "fp32" "bf16" "offload=stream, 800 MB"
    python -m benchmarks techniques --go-on               # the rows that are missing, of a run that was ended before
    python -m benchmarks techniques --list

Each row is a process of its own: a picture to set all up, one that is measured. Steps are fewer than a picture takes,
their median counts (with a step cache the mean of whole intervals). 'stock' rows are diffusers' pipeline with its own
switches, all of it in one process; 'ours' are the stages of ``runner.py`` with the overrides shown, one after the
other. PSNR is to the picture of the first row of the same work and as many steps. Memory: the allocator's peaks
(allocated, reserved), the highest that ``nvidia-smi`` showed of the card, RES of the process. Speed on a CPU is told by
its CPU-seconds a step, to which other work on the machine adds little.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks._measure import RESULTS, checkpoint, finish, parser, psnr, scratch, slug, stage_environment
from benchmarks._techniques_rows import ROWS, WORKS, Row
from benchmarks._techniques_ways import PROMPT
from stages.config import ROOT
from stages.files import atomic_path

RUNS = 3  # plans that are made at once
COLUMNS = ("allocated_mb", "reserved_mb", "smi_mb", "host_mb")


class Card:
    """The memory that ``nvidia-smi`` shows of the first GPU that this process sees, at most (MB)."""

    def __init__(self, device: str) -> None:
        self.highest, self._process = 0, None
        if device != "cuda":
            return
        query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        command = ["nvidia-smi", f"--id={_card()}", *query]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():
                self.highest = max(self.highest, round(int(line) * 1.048576))

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


class Bench:
    """One run of the table."""

    def __init__(self, folder: Path, pictures: Path, checkpoint: Path, device: str, steps: int | None) -> None:
        self.folder, self.pictures, self.checkpoint = folder, pictures, checkpoint
        self.device, self._steps = device, steps
        self._environment = stage_environment(device) | {"TQDM_DISABLE": "1"}
        self._longest = {"cuda": 120, "cpu": 3600}[device]  # seconds of a row

    def steps(self, row: Row) -> int:
        """That are run, those included that are not timed."""
        intervals = 2 * row.options.get("technique.step_cache.interval", 1)
        return max(3, intervals, round((self._steps or WORKS[row.work].steps[self.device]) * row.share))

    def planned(self, row: Row) -> str:
        """``stage=plan`` of one of ours; why it was refused, or ""."""
        work, options = WORKS[row.work], dict(row.options)
        budget = options.pop("budget", None)
        values = {
            "run": slug(row.name),
            "stage": "plan",
            "prompt": PROMPT,
            "model": "sd15",
            "scheduler": work.scheduler,
        }
        values |= {"model.path": self.checkpoint, "width": work.width, "height": work.height, "guide.mode": "none"}
        values |= {"denoise.num_inference_steps": self.steps(row), "output_dir": self.folder, "progress": "false"}
        values |= {"device": self.device, "technique.dtype": "fp16" if self.device == "cuda" else "fp32", **options}
        values |= {"memory.budget": "100GB"}
        key = "memory.device_budget" if self.device == "cuda" else "memory.budget"
        if budget == "least":
            said = self._plan({**values, key: "300MB"})
            least = re.search(rf"Use {re.escape(key)}=(\d+MB)", said)
            return self._plan({**values, key: least[1]}) if least else said
        return self._plan({**values, key: budget} if budget else values)

    def _plan(self, values: dict[str, Any]) -> str:
        command = [sys.executable, "runner.py", *(f"{key}={value}" for key, value in values.items())]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else ""

    def measured(self, row: Row) -> dict[str, Any]:
        """The row's figures; ``error`` where it could not run."""
        picture = self.pictures / f"{slug(row.name)}.png"
        job: dict[str, Any] = {"kind": row.kind, "device": self.device, "options": row.options, "picture": str(picture)}
        job |= {"checkpoint": str(self.checkpoint), "work": vars(WORKS[row.work]), "steps": self.steps(row)}
        job["run_dir"] = str(self.folder / slug(row.name))
        own = self._environment if row.kind == "ours" else {**os.environ, "TQDM_DISABLE": "1"}
        command, card = [sys.executable, "-m", "benchmarks._techniques_ways", json.dumps(job)], Card(self.device)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=own, timeout=self._longest)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {self._longest} seconds"}
        finally:
            card.close()
        lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            return {"error": (done.stderr or done.stdout).strip()[-800:]}
        found = json.loads(lines[-1]) | ({"smi_mb": card.highest} if card.highest else {})
        step = found["cpu_seconds" if self.device == "cpu" else "step_seconds"]
        found["it_s"] = round(1 / step, 4)  # on a CPU of one core
        return {**found, "picture": str(picture)}


class Kept:
    """Rows and pictures of a run, on disk after each row, so that another goes on with them."""

    def __init__(self, folder: Path, go_on: bool) -> None:
        self.folder, self._file = folder, folder / "rows.json"
        if not go_on:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def add(self, found: dict[str, Any]) -> None:
        self.rows[found["name"]] = found
        with atomic_path(self._file) as temporary:
            temporary.write_text(json.dumps(self.rows), encoding="utf-8")

    def done(self, row: Row, steps: int) -> dict[str, Any] | None:
        found = self.rows.get(row.name, {})
        return found if "it_s" in found and found["run_steps"] == steps else None


def add_psnr(results: list[dict[str, Any]]) -> None:
    """To the first picture of the same work with as many steps."""
    first: dict[tuple[Any, ...], str] = {}
    for one in results:
        if "picture" in one:
            reference = first.setdefault((one["work"], one["run_steps"]), one["picture"])
            one["psnr_db"] = (
                None if reference == one["picture"] else round(psnr(Path(reference), Path(one["picture"])), 1)
            )


def front(results: list[dict[str, Any]], memory: str, work: str = "512") -> list[str]:
    """Names of the rows that no other beats in both memory and speed."""
    rows = [one for one in results if "it_s" in one and one["work"] == work]
    return [
        one["name"]
        for one in rows
        if not any(
            other is not one
            and other[memory] <= one[memory]
            and other["it_s"] >= one["it_s"]
            and (other[memory], other["it_s"]) != (one[memory], one["it_s"])
            for other in rows
        )
    ]


def markdown(results: list[dict[str, Any]], machine: str, memory: str) -> str:
    """The table, a line a row; ratios are to fp32."""
    header = [
        "",
        "kind",
        "work",
        "steps",
        "allocated",
        "reserved",
        "nvidia-smi",
        "RES",
        "it/s" if memory != "host_mb" else "steps a CPU-second",
        "memory",
        "speed",
        "PSNR",
    ]
    lines = [machine, "", f"| {' | '.join([*header, 'published'])} |", "|" + "---|" * (len(header) + 1)]
    best, base = front(results, memory), next((one for one in results if one["name"] == "fp32" and "it_s" in one), None)
    for one in results:
        cells = [f"**{one['name']}**" if one["name"] in best else one["name"], one["kind"], one["work"]]
        if "it_s" not in one:
            cells += [one["error"].splitlines()[-1][:160], *[""] * (len(header) - 4)]
        else:
            same = base is not None and one["work"] == base["work"]
            cells += [f"{one['run_steps']} of {one['full_steps']}"]
            cells += [f"{one[name]:,} MB" if one.get(name) else "-" for name in COLUMNS]
            cells += [f"{one['it_s']:.4g}"]
            cells += [f"{one[memory] / base[memory]:.2f}" if same and base else ""]
            cells += [f"{one['it_s'] / base['it_s']:.2f}x" if same and base else ""]
            cells += ["-" if one.get("psnr_db") is None else f"{one['psnr_db']} dB"]
        lines.append("| " + " | ".join([*map(str, cells), one["published"]]) + " |")
    return "\n".join([*lines, "", "Bold: no other row at 512x512 is better in both memory and speed.", ""])


def plot(results: list[dict[str, Any]], memory: str, title: str, path: Path) -> None:
    """Memory against speed of the rows at 512x512, with the Pareto front."""
    from matplotlib.figure import Figure

    rows, best = [one for one in results if "it_s" in one and one["work"] == "512"], front(results, memory)
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots()
    for kind, marker in (("stock", "o"), ("ours", "s")):
        mine = [one for one in rows if one["kind"] == kind]
        axes.scatter([one[memory] for one in mine], [one["it_s"] for one in mine], marker=marker, label=kind)
    edge = sorted((one[memory], one["it_s"]) for one in rows if one["name"] in best)
    axes.step([x for x, _ in edge], [y for _, y in edge], where="post", linestyle="--", label="Pareto front")
    for one in rows:
        weight = "bold" if one["name"] in best else "normal"
        place = (one[memory], one["it_s"])
        axes.annotate(one["name"], place, xytext=(4, 4), textcoords="offset points", fontsize=8, fontweight=weight)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"{memory.removesuffix('_mb')}, MB",
        ylabel=f"steps a {'CPU-' if memory == 'host_mb' else ''}second",
        title=title,
    )
    axes.legend()
    figure.savefig(path, dpi=110)


def checks(results: list[dict[str, Any]]) -> dict[str, bool]:
    """What must hold of ours on a GPU, as far as it was measured."""
    known = {one["name"]: one for one in results if "reserved_mb" in one}
    least, sequential = known.get("offload=stream, least memory"), known.get("sequential")
    found = {}
    if least:
        lowest = min(one["reserved_mb"] for one in known.values())
        found[f"offload=stream reserves least: {least['reserved_mb']} MB"] = least["reserved_mb"] == lowest
    for ours in (one for name, one in known.items() if sequential and name.startswith("offload=stream")):
        assert sequential is not None
        times, less = ours["it_s"] / sequential["it_s"], ours["reserved_mb"] <= sequential["reserved_mb"]
        found[f"{ours['name']}: {times:.1f} times as fast as sequential, in no more memory"] = times >= 3 and less
    if large := known.get("4K, offload=stream, 1.5 GB"):
        found[f"3840x2224 reserves {large['reserved_mb']} MB, at most 1500"] = large["reserved_mb"] <= 1500
    return found


def machine(device: str) -> str:
    """Card, driver, libraries."""
    import torch

    versions = f"torch {torch.__version__}, diffusers {_version('diffusers')}, accelerate {_version('accelerate')}"
    if device != "cuda":
        return f"CPU, {torch.get_num_threads()} threads, {versions}."
    query = ["nvidia-smi", f"--id={_card()}", "--query-gpu=name,driver_version,memory.used", "--format=csv,noheader"]
    name, driver, used = subprocess.run(query, capture_output=True, text=True).stdout.strip().split(", ")
    return f"{name}, driver {driver}, {used} in use before; {versions}."


def _card() -> str:
    """``nvidia-smi``'s number of the first GPU that this process sees."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def main(arguments: list[str] | None = None) -> int:
    """Run the rows, print a line each, write Markdown, JSON and a plot."""
    made = parser(__doc__)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only (--list shows them)")
    made.add_argument("--list", action="store_true", help="the rows of the device")
    made.add_argument("--steps", type=int, help="for every row, in place of its own")
    made.add_argument("--minutes", type=float, default=8.0, help="after which no further row begins")
    made.add_argument("--no-plot", action="store_true")
    made.add_argument("--go-on", action="store_true", help="keep the rows that were measured before")
    options = made.parse_args(arguments)
    rows = [row for row in ROWS if options.device in row.devices and (not options.rows or row.name in options.rows)]
    if options.list or not rows:
        print("\n".join(row.name for row in ROWS if options.device in row.devices))
        return 0 if options.list else 2
    if not options.no_plot and find_spec("matplotlib") is None:
        raise SystemExit("the plot needs matplotlib: pip install 'highres-lowram[bench]', or --no-plot")
    begin = time.monotonic()
    RESULTS.mkdir(parents=True, exist_ok=True)
    model, results = checkpoint(options.checkpoint), []
    memory = "reserved_mb" if options.device == "cuda" else "host_mb"
    said = machine(options.device)
    print(said, flush=True)
    name = f"techniques_{options.device}"
    kept = Kept(RESULTS / name, options.go_on)
    with scratch() as folder:
        bench = Bench(Path(folder), kept.folder, model, options.device, options.steps)
        todo = [row for row in rows if not kept.done(row, bench.steps(row))]
        with ThreadPoolExecutor(RUNS if options.device == "cuda" else 1) as pool:
            plans = {row.name: pool.submit(bench.planned, row) for row in todo if row.kind == "ours"}
            for row in todo:
                if time.monotonic() - begin > 60 * options.minutes:
                    found: dict[str, Any] = {"error": f"left out: {options.minutes:g} minutes were over"}
                    plan = plans.get(row.name)
                    if plan is not None:
                        plan.cancel()
                elif refused := plans[row.name].result() if row.name in plans else "":
                    found = {"error": refused}
                else:
                    found = bench.measured(row)
                known = {"name": row.name, "kind": row.kind, "work": row.work, "published": row.published}
                known |= {"run_steps": bench.steps(row), "full_steps": WORKS[row.work].full, "options": row.options}
                kept.add({**known, **found})
                print(f"[{time.monotonic() - begin:.0f} s] {json.dumps({**found, 'name': row.name})}", flush=True)
    results = [kept.rows[row.name] for row in rows]
    add_psnr(results)
    with atomic_path(RESULTS / f"{name}.md") as temporary:
        temporary.write_text(markdown(results, said, memory), encoding="utf-8")
    if not options.no_plot:
        plot(results, memory, f"Stable Diffusion 1.5, 512x512: {said.partition(',')[0]}", RESULTS / f"{name}.png")
    print(f"written: {RESULTS / name}.md" + ("" if options.no_plot else " and .png"))
    return finish(name, results, checks(results))


if __name__ == "__main__":
    raise SystemExit(main())
