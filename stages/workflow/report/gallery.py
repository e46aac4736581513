"""The runs of an output folder at a glance: a picture of each, its state, size and age."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stages.files import read_object
from stages.workflow.report.live import FOLDER
from stages.workflow.report.page import environment
from stages.workflow.store import MANIFEST

OLD = 12.0  # seconds without news after which a run's command is no more


def gallery(root: Path, now: float) -> str:
    """The page; ``now`` in seconds since the epoch."""
    runs = [run(folder, now) for folder in root.iterdir() if not folder.name.startswith(".") and folder.is_dir()]
    runs = sorted((one for one in runs if one is not None), key=lambda one: one["age"])
    sweeps = [
        {"href": quote(page.relative_to(root).as_posix()), "name": page.parent.name, "age": now - page.stat().st_mtime}
        for page in (root / ".sweeps").glob("*/sweep.html")
    ]
    sweeps.sort(key=lambda one: one["age"])
    return environment().get_template("gallery.html.j2").render(root=root, runs=runs, sweeps=sweeps)


def run(folder: Path, now: float) -> dict[str, Any] | None:
    """What a card says of a run: name, state, prompt, size, seconds since something happened; None for no run."""
    if not any((folder / name).is_file() for name in ("config.yaml", "report.html")):
        return None
    try:
        changed, size = folder.stat().st_mtime, sum(map(_bytes, folder.iterdir()))
    except OSError:  # it is being removed
        return None
    said, made = state(folder), read_object(folder / "run.json")
    known = said.get("state") or ("failed" if made.get("error") else "finished" if made else "not begun")
    if known == "running" and now - said.get("updated", 0) > OLD:
        known = "killed"
    page = folder / "report.html"
    return {
        "name": folder.name,
        "state": known,
        "prompt": said.get("prompt", ""),
        "extent": said.get("extent", ""),
        "href": quote(f"{folder.name}/report.html") if page.is_file() else None,
        "picture": thumbnail(folder),
        "bytes": size,
        "age": max(0.0, now - (said.get("updated") or changed)),
        "error": str(made.get("error") or "").partition("\n")[0] if known == "failed" else "",
    }


def state(folder: Path) -> dict[str, Any]:
    """What a run said last in ``report/live.js``; {} where it never did."""
    try:
        text = (folder / FOLDER / "live.js").read_text(encoding="utf-8")
        found = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def thumbnail(folder: Path) -> str | None:
    """Where a small picture of a run lies, from its parent folder: the whole of it, else how it came out so far."""
    zoom = read_object(folder / "stitch" / "zoom" / "zoom.json")
    tile = f"stitch/zoom/{zoom.get('levels', 1) - 1}/0_0.{zoom.get('format')}"
    previews = [f"{FOLDER}/preview_denoise.png", "guide/lowres.png", f"{FOLDER}/preview_lowres.png"]
    found = next((path for path in [tile, *previews] if (folder / path).is_file()), None)
    return quote(f"{folder.name}/{found}") if found else None


def _bytes(path: Path) -> int:
    """Of a file, or of a stage's result that a link leads to, as its manifest counts them."""
    if path.is_symlink() and path.is_dir():
        files = read_object(path / MANIFEST).get("files", {})
        return sum(file.get("bytes", 0) for file in files.values() if isinstance(file, dict))
    with suppress(FileNotFoundError):  # of one that was being written
        return path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    return 0
