"""Files that are damaged, of finished and of unfinished work, then the same command: the same picture."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks._faults.common import VARIANTS, Bench, Tally, forget, same_picture, stages_of, summary
from benchmarks._faults.kills import strike


def _flip(file: Path, random: Random) -> None:
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def _truncated(file: Path, random: Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(len(content))])


def _longer(file: Path, random: Random) -> None:
    file.write_bytes(file.read_bytes() + random.randbytes(100))


def _empty(file: Path, random: Random) -> None:
    file.write_bytes(b"")


def _garbage(file: Path, random: Random) -> None:
    file.write_bytes(random.randbytes(max(1, file.stat().st_size)))


def _zeros(file: Path, random: Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _other_json(file: Path, random: Random) -> None:
    file.write_text(random.choice(["null", "1", "[]", "{}", '"x"', "[[]]", '{"files": null}', "[" * 5000, "NaN"]))


def _folder(file: Path, random: Random) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


def _nowhere(file: Path, random: Random) -> None:
    file.unlink()
    file.symlink_to("/nowhere/at/all")


def _gone(file: Path, random: Random) -> None:
    file.unlink()


WAYS: dict[str, Callable[[Path, Random], None]] = {
    "flip": _flip,
    "truncated": _truncated,
    "longer": _longer,
    "empty": _empty,
    "garbage": _garbage,
    "zeros": _zeros,
    "other json": _other_json,
    "folder": _folder,
    "link to nowhere": _nowhere,
    "gone": _gone,
}
_FLIPS = ("flip", "flip", "flip", "truncated")  # the commonest, as they are the hardest to see


def places(output: Path) -> dict[str, list[Path]]:
    """Files by what they are for."""
    found: dict[str, list[Path]] = {}
    for file in sorted(path for path in output.rglob("*") if path.is_file() and not path.is_symlink()):
        parts = list(file.relative_to(output).parts)
        if parts[0] == ".store":
            unfinished = len(parts) > 3 and not (output.joinpath(*parts[:3]) / "manifest.json").exists()
            kind = "weights" if parts[1] == "weights" else "unfinished" if unfinished else "beside"
            kind = parts[1] if kind == "beside" and not parts[1].startswith(".") else kind
        else:
            kind = "run"
        found.setdefault(kind, []).append(file)
    return found


def half_done(bench: Bench, variant: str) -> Path:
    """A run of which some stage is in the middle of its work."""
    template = bench.template(variant)
    stages = stages_of(template)
    while True:
        output = bench.copy(variant)
        begin = bench.random.randrange(1, len(stages) - 1)
        forget(output, stages[begin:])
        seconds = summary(template)["stages"][begin]["seconds"]
        arguments = bench.arguments(output, *VARIANTS[variant])
        strike(
            bench, output, arguments, bench.random.uniform(0.3, 0.5 + seconds), bench.random.choice(["stage", "runner"])
        )
        if "unfinished" in places(output):
            return output


def run(bench: Bench) -> Tally:
    tally = Tally("damaged files")
    while tally.tries < bench.tries:
        variant, random = bench.random.choice(bench.variants), bench.random
        unfinished = random.random() < 0.4
        output = half_done(bench, variant) if unfinished else bench.copy(variant)
        template = bench.template(variant)
        found, stages = places(output), stages_of(template)
        kind = "unfinished" if unfinished else random.choice(sorted(found))
        file = random.choice(found[kind])
        way = random.choice(_FLIPS) if random.random() < 0.5 else random.choice(list(WAYS))
        if way in ("flip", "truncated") and not file.stat().st_size:
            way = "garbage"
        if not unfinished:  # else nothing would read what was damaged
            after = stages.index(kind) + 1 if kind in stages else 0
            forget(output, stages[random.randint(after, len(stages)) if kind != "weights" else 0 :])
        WAYS[way](file, random)
        tally.tries += 1
        what = f"{variant}: {way} of {file.relative_to(output)}"
        done = bench.run(output, *VARIANTS[variant])
        if not same_picture(tally, output, template, done, what):
            kept = bench.scratch / f"damage-{tally.tries}"
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(output, kept)
    return tally
