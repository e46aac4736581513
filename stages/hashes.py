"""What a file or a set of values is, as a hash. Those of files are remembered, so that gigabytes are read once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.files import digest, read_object, write_json


def fingerprint(payload: Mapping[str, Any]) -> str:
    """sha256 (hex) of the payload as canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def is_remembered(path: Path, cache: Path) -> bool:
    """Whether a file was hashed before, by this path."""
    return bool(_known(_note(path.resolve(), cache)))


def file_hash(path: Path, cache: Path) -> str:
    """sha256 of a file, remembered under ``cache`` until its path, size, mtime or inode changes.

    A file that is gone is what it was last. FileNotFoundError for one that never was.
    """
    path = path.resolve()
    note = _note(path, cache)
    known = _known(note)
    if known and not path.exists():
        return known["sha256"]
    stat = path.stat()
    key = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    if known.get("key") == key:
        return known["sha256"]
    found = {"key": key, "sha256": digest(path)}
    write_json(note, {**found, "whole": fingerprint(found)})
    return found["sha256"]


def _known(note: Path) -> dict[str, Any]:
    """What a note says, if it is whole to the bit; else nothing."""
    found = read_object(note)
    whole = found.pop("whole", None)
    try:
        return found if "sha256" in found and whole == fingerprint(found) else {}
    except ValueError:  # what no fingerprint is made of
        return {}


def _note(path: Path, cache: Path) -> Path:
    return cache / f"{fingerprint({'path': str(path)})[:32]}.json"
