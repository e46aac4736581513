"""What the benchmarks share: run a command and measure its tree from outside, a checkpoint to run, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.config import ROOT
from stages.files import atomic_path
from stages.memory.monitor import descendants, peak_rss, usage

RESULTS = ROOT / "outputs" / "benchmarks"
PERIOD = 0.02  # seconds between two samples of the tree
_INNER = "HIGHRES_BENCHMARK"  # set in the process that measures


class Measured(NamedTuple):
    """A command that has ended; bytes and seconds.

    ``peak`` is the highest sum of RES over the tree that a sample saw. ``kernel_peak`` is VmHWM of the command plus the
    highest VmHWM of what it started, with what else runs then: no peak between samples escapes it, and it can be too
    high only.
    ``read``: bytes that the tree has asked of files, cached or not, as last seen.
    """

    code: int
    seconds: float
    peak: int
    kernel_peak: int
    output: str
    read: int = 0

    def check(self) -> Measured:
        """Itself. SystemExit with the end of the output if the command failed."""
        if self.code:
            raise SystemExit(f"the measured command ended with exit code {self.code}:\n{self.output[-3000:]}")
        return self


def measure(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    echo: bool = False,
    started: Callable[[int], None] = lambda pid: None,
) -> Measured:
    """Run ``command`` in the repository and sample RES of it and of all that it starts, every 20 ms.

    Args:
        environment: added to this process' own.
        echo: pass its output on while it runs.
        started: told the process id at once (to move it into a cgroup).
    """
    begin = time.monotonic()
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    started(process.pid)
    lines: list[bytes] = []
    assert process.stdout is not None
    pipe = process.stdout

    def read() -> None:
        for line in pipe:
            lines.append(line)
            if echo:
                sys.stdout.write(line.decode("utf-8", "replace"))
                sys.stdout.flush()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    own = others = peak = count = asked = 0
    pids = [process.pid]
    while process.poll() is None:
        if count % 5 == 0:
            pids = [process.pid, *descendants(process.pid)]
            own, others = max(own, peak_rss(process.pid)), max(others, _highest(pids[1:]))
            asked = max(asked, sum(map(_asked, pids)))
        peak = max(peak, sum(usage(pid).rss for pid in pids))
        count += 1
        time.sleep(PERIOD)
    reader.join()
    seconds = time.monotonic() - begin
    output = b"".join(lines).decode("utf-8", "replace")
    return Measured(process.returncode, seconds, peak, own + others, output, asked)


def stage_environment(device: str = "cpu", threads: int | None = None) -> dict[str, str]:
    """What ``runner.py`` gives the process of a stage; ``threads``: as ``launch.threads``."""
    from omegaconf import OmegaConf

    from stages.workflow.launch.local import environment

    return environment(OmegaConf.create({"device": device, "launch": {"threads": threads}}))


def in_stage_environment(measured: Callable[[], int], name: str, threads: int | None = None) -> int:
    """The exit code of ``measured()``, called by the benchmark ``name``'s own command in a process that has it."""
    if _INNER in os.environ:
        return measured()
    command = [sys.executable, "-m", "benchmarks", name, *sys.argv[1:]]
    own = stage_environment(threads=threads) | {"TQDM_DISABLE": "1", _INNER: name}
    return subprocess.run(command, cwd=ROOT, env=own).returncode


def _highest(pids: Sequence[int]) -> int:
    """Peak of the one that had the highest, with what the others take now (stages are forked from one of them)."""
    return max((peak_rss(pid) + sum(usage(other).rss for other in pids if other != pid) for pid in pids), default=0)


def _asked(pid: int) -> int:
    """Bytes that a process, and its children that have ended, have read from files so far; 0 where it is gone or the
    system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    except OSError:
        return 0


def runner(output_dir: Path, *overrides: str, **options: Any) -> Measured:
    """``python runner.py progress=false output_dir=... overrides`` measured from outside."""
    command = [sys.executable, "runner.py", f"output_dir={output_dir}", *overrides]
    return measure(command, **options)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder beside the results that goes with what is in it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=RESULTS)


def checkpoint(given: Path | None, kind: str = "sd15", *, small: bool = False) -> Path:
    """``given``, or random weights of the kind's shapes under ``outputs/benchmarks``, made if they are not there."""
    if given is not None:
        return given.resolve()
    folder = RESULTS / "checkpoints" / (f"{kind}-small" if small else kind)
    if not (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file():
        print(f"writes random weights with the shapes of {kind} to {folder} (once)", flush=True)
        script = [sys.executable, "benchmarks/random_checkpoint.py", kind, str(folder)]
        subprocess.run(script + (["--small"] if small else []), cwd=ROOT, check=True)
    return folder


def written(kind: str, layers: str, *, holes: bool = False) -> Path:
    """A checkpoint of random weights, with few layers, or (``holes``) without any weight; to be removed after use."""
    folder = RESULTS / "checkpoints" / f"families-{kind}{'-holes' if holes else ''}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "benchmarks/random_checkpoint.py", kind, str(folder)]
    command += (["--layers", layers] if layers else []) + (["--holes"] if holes else [])
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def model_overrides(model: str, given: Path | None) -> list[str]:
    """The overrides that choose a model: ``embedded`` as it lies in the repository; ``small``, random weights of about
    its size; else random weights of the full size."""
    if model == "embedded":
        return ["model=embedded", *([f"model.path={given.resolve()}"] if given else [])]
    if model == "small":
        return ["model=sd15", f"model.path={checkpoint(given, small=True)}", "model.native_size=256"]
    return [f"model={model}", f"model.path={checkpoint(given, model)}"]


def one_step(steps: int = 1) -> list[str]:
    """The overrides for runs of ``steps`` low-res and as many high-res steps."""
    return [f"lowres.num_inference_steps={steps}", f"denoise.num_inference_steps={steps}", "denoise.strength=1.0"]


def slug(name: str) -> str:
    """A name of a row as one of files and runs."""
    return re.sub(r"\W+", "-", name).strip("-")


def psnr(first: Path, second: Path) -> float:
    """Of two pictures of one size, in dB; infinite where they are equal."""
    import numpy as np
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    total = count = 0.0
    with Image.open(first) as a, Image.open(second) as b:
        if a.size != b.size:
            raise ValueError(f"{first} has {a.size}, {second} has {b.size} pixels")
        for top in range(0, a.height, 512):
            box = (0, top, a.width, min(top + 512, a.height))
            strips = [np.asarray(one.convert("RGB").crop(box), dtype=np.float32) for one in (a, b)]
            total += float(np.square(strips[0] - strips[1]).sum(dtype=np.float64))
            count += strips[0].size
    return float("inf") if not total else float(10 * np.log10(255**2 * count / total))


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=(docstring or "").split("\n\n")[0])
    made.add_argument("--checkpoint", type=Path, metavar="DIR", help="a diffusers folder; default: random weights")
    return made


def summary(output_dir: Path, run: str) -> dict[str, Any]:
    """``run.json`` of a finished run."""
    return json.loads((output_dir / run / "run.json").read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with its columns aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def mb(nbytes: float | None) -> str:
    """``612 MB``; ``-`` for None or 0."""
    return f"{nbytes / 1e6:.0f} MB" if nbytes else "-"


def finish(name: str, result: Any, checks: Mapping[str, bool]) -> int:
    """Write ``outputs/benchmarks/NAME.json``, print what passed; the exit code."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"checks": checks, "result": result}, indent=1) + "\n", encoding="utf-8")
    for text, passed in checks.items():
        print(f"{'pass' if passed else 'FAIL'}: {text}")
    print(f"written: {path.relative_to(ROOT)}")
    return 0 if all(checks.values()) else 1
