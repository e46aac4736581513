"""``sweep.html`` and ``sweep.png``: the pictures of a sweep by what they differ in, and a table that can be sorted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from stages.files import atomic_path, read_object, write_text
from stages.workflow.grammar import parse, value_of
from stages.workflow.report.gallery import thumbnail
from stages.workflow.report.page import environment

ACROSS = 6  # pictures in a row where nothing orders them in two directions


class Shot(NamedTuple):
    """A job: what it was made with (key -> value), what came of it, where its picture and its report lie."""

    number: int
    values: Mapping[str, str]
    status: str
    said: str
    seconds: float | None
    peak: int
    score: float | None
    run: str
    href: str | None
    picture: str | None  # relative to the sweep's folder


class Table(NamedTuple):
    """Pictures with axes; ``heading``: what they all have beyond them."""

    heading: str
    x: str
    y: str
    columns: list[str]
    rows: list[tuple[str, list[Shot | None]]]


def sweep(folder: Path) -> Path | None:
    """Write both files beside ``sweep.json``, from what is on the disk; returns the page, None where there is none.

    ``{"jobs": [{"overrides": [...], "status": ..., "run": NAME}]}``; runs lie in a folder above this one.
    """
    jobs = read_object(folder / "sweep.json").get("jobs") or []
    if not jobs:
        return None
    shots = _shots(folder, jobs)
    keys = list(shots[0].values) if shots else []
    tables = _tables(shots, keys)
    _write_sheet(folder, tables)
    page = environment().get_template("sweep.html.j2")
    first, *rest = (job.get("overrides", []) for job in jobs)
    common = [text for text in first if not text.startswith("hydra") and all(text in other for other in rest)]
    scored = any(shot.score is not None for shot in shots)
    html = page.render(keys=keys, shots=shots, tables=tables, scored=scored, common=common, name=folder.name)
    write_text(folder / "sweep.html", html)
    return folder / "sweep.html"


def _shots(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> list[Shot]:
    """In the jobs' order, with the values that are not the same in all."""
    said = [
        {one.key: value_of([text], one.key) or "" for text in job["overrides"] if (one := parse(text))} for job in jobs
    ]
    everywhere = list(dict.fromkeys(key for values in said for key in values))
    keys = [key for key in everywhere if len({values.get(key) for values in said}) > 1]
    names = [str(job.get("run")) for job in jobs if job.get("run")]
    above = next((one for one in folder.parents if any((one / name).is_dir() for name in names)), folder)
    found = []
    for number, (job, values) in enumerate(zip(jobs, said, strict=True), 1):
        run = above / str(job["run"]) if job.get("run") else None
        made = read_object(run / "run.json") if run else {}
        small = thumbnail(run) if run and job.get("status") not in ("failed", "killed") else None
        up = quote(os.path.relpath(above, folder))
        shot = Shot(
            number=number,
            values={key: values.get(key, "") for key in keys},
            status=str(job.get("status", "")),
            said=str(job.get("error") or "").partition("\n")[0],
            seconds=sum(stage.get("computed_seconds") or 0.0 for stage in made.get("stages", [])) or job.get("seconds"),
            peak=made.get("peak_rss_bytes", 0),
            score=job.get("score"),
            run=run.name if run else "",
            href=f"{up}/{quote(run.name)}/report.html" if run and (run / "report.html").is_file() else None,
            picture=f"{up}/{small}" if small else None,
        )
        found.append(shot)
    return found


def _tables(shots: Sequence[Shot], keys: Sequence[str]) -> list[Table]:
    """The last key, which changes fastest, runs to the right, the one before it down; one table for each value of the
    others. Where several jobs would share a place, or one key alone has many values, in rows as they come."""
    if len(keys) >= 2:
        *others, y, x = keys
        tables = []
        for beyond in dict.fromkeys(tuple(shot.values[key] for key in others) for shot in shots):
            some = [shot for shot in shots if tuple(shot.values[key] for key in others) == beyond]
            columns, rows = ([*dict.fromkeys(shot.values[key] for shot in some)] for key in (x, y))
            by_place = {(shot.values[y], shot.values[x]): shot for shot in some}
            if len(by_place) < len(some) or len(by_place) * 2 < len(columns) * len(rows):
                return _in_rows(shots, "")
            heading = ", ".join(f"{key}={value}" for key, value in zip(others, beyond, strict=True))
            cells = [(row, [by_place.get((row, column)) for column in columns]) for row in rows]
            tables.append(Table(heading, x, y, columns, cells))
        return tables
    x = keys[0] if keys else ""
    if len(shots) > ACROSS:
        return _in_rows(shots, x)
    return [Table("", x, "", [shot.values.get(x, "") for shot in shots], [("", list(shots))])]


def _in_rows(shots: Sequence[Shot], x: str) -> list[Table]:
    """Rows with what each is above it."""
    rows = [shots[at : at + ACROSS] for at in range(0, len(shots), ACROSS)]
    return [Table("", x, "", [" ".join(one.values.values()) for one in row], [("", list(row))]) for row in rows]


def _write_sheet(folder: Path, tables: Sequence[Table]) -> None:
    from stages.picture.sheet import Block, Cell, sheet  # Pillow: not for every command

    def cell(shot: Shot | None) -> Cell | None:
        return shot and Cell(folder / unquote(shot.picture) if shot.picture else None, f"{shot.status} {shot.said}")

    blocks = []
    for table in tables:
        columns = [f"{table.x}={name}" if table.x and at == 0 else name for at, name in enumerate(table.columns)]
        rows = [
            (f"{table.y}={name}" if at == 0 and table.y else name, [*map(cell, cells)])
            for at, (name, cells) in enumerate(table.rows)
        ]
        blocks.append(Block(table.heading, columns, rows))
    with atomic_path(folder / "sweep.png") as temporary:
        sheet(temporary, blocks)
