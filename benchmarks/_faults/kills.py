"""SIGKILL of the stage or of the runner at random moments, then the same command: the same picture, nothing lost."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from benchmarks._faults.common import (
    VARIANTS,
    Bench,
    Tally,
    forget,
    last,
    results,
    same_picture,
    stages_of,
    summary,
    unclear,
)
from benchmarks._faults.warm import Command

_STEPS = ("checkpoint/even_*.safetensors", "checkpoint/odd_*.safetensors")
_BEGUN = {"lowres": _STEPS, "denoise": _STEPS, "decode": ("tiles/r*.safetensors",)}  # what a stage goes on from


def strike(bench: Bench, output: Path, arguments: list[str], seconds: float, victim: str) -> tuple[str, str]:
    """Start the command and kill after ``seconds``: (who was killed, "" if it had ended; why its words are unclear)."""
    command = Command(bench.cwd(output), arguments)
    end = time.monotonic() + seconds
    while time.monotonic() < end and command.running():
        time.sleep(0.001)
    if not command.running():
        return "", ""
    stages = command.stages()
    target = stages[0] if stages and victim == "stage" else command.pid
    with suppress(ProcessLookupError):
        os.kill(target, signal.SIGKILL)
    done = command.end()
    if target == command.pid:
        return "runner", ""
    said = unclear(done) if done.code != 0 and "SIGKILL" not in done.err else ""
    return "stage", f"{said}: {last(done)}" if said else ""


def finished(output: Path, stages: list[str]) -> dict[str, str]:
    """What must not be computed again: stages with a manifest are to be reused, those with a step to go on."""
    found = {}
    for stage in stages:
        for folder in results(output, stage):
            if (folder / "manifest.json").is_file():
                found[stage] = "reused"
            elif any(file for pattern in _BEGUN.get(stage.partition("_")[0], ()) for file in folder.glob(pattern)):
                found[stage] = "resumed"
    return found


def run(bench: Bench) -> Tally:
    tally = Tally("kills")
    while tally.tries < bench.tries:
        variant = bench.random.choice(bench.variants)
        template, output = bench.template(variant), bench.copy(variant)
        stages = stages_of(template)
        begin = bench.random.randrange(len(stages))
        forget(output, stages[begin:])
        if bench.random.random() < 0.1:
            forget(output, ["weights"])
        left = sum(stage["seconds"] for stage in summary(template)["stages"][begin:]) + 0.5
        arguments, said = bench.arguments(output, *VARIANTS[variant]), []
        for _ in range(bench.random.randint(1, 3)):
            moment, victim = bench.random.uniform(0.02, left), bench.random.choice(("stage", "runner"))
            killed, wrong = strike(bench, output, arguments, moment, victim)
            said.append(f"{killed or 'none'} after {moment:.3f} s")
            if wrong:
                tally.fault("unclear", f"{variant}, {said[-1]}: {wrong}")
            tally.tries += bool(killed)
        kept = finished(output, stages)
        done = Command(bench.cwd(output), arguments).end()
        what = f"{variant} from {stages[begin]}, {', '.join(said)}"
        if not same_picture(tally, output, template, done, what):
            continue
        statuses = {stage["name"]: stage["status"] for stage in summary(output)["stages"]}
        for stage, wanted in kept.items():
            if statuses[stage] not in (wanted, "reused"):
                tally.fault("lost", f"{what}: {stage} {statuses[stage]}, expected {wanted}")
    return tally
