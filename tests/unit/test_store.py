"""The store: atomic files, manifests with digests, partial work, locks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.config import ROOT
from stages.files import Syncs, atomic_path, read_json, write_text
from stages.hashes import fingerprint
from stages.workflow.store import Store

PRINT = "f" * 64


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_replaces_and_leaves_nothing_behind(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".txt"
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_path_keeps_the_old_file_on_an_error(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def fail_half_way() -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail_half_way()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_path_says_when_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "data.bin"
    code = f"""
import itertools
from pathlib import Path
from stages.files import atomic_path
for number in itertools.count():
    with atomic_path(Path({str(path)!r})) as temporary:
        temporary.write_bytes(bytes([number % 256]) * 300_000)
"""
    for wait in (0.05, 0.11, 0.17):
        writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(wait)
        writer.kill()
        writer.wait()
        data = path.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1
        path.unlink()


def test_fingerprint_is_of_the_content_not_of_the_order():
    assert fingerprint({"a": 1, "b": [1.5, "é"]}) == fingerprint({"b": [1.5, "é"], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()), st.text(), st.integers())
def test_fingerprint_changes_with_every_value(payload, key, value):
    changed = {**payload, key: value}
    same = key in payload and type(payload[key]) is int and payload[key] == value
    assert (fingerprint(changed) == fingerprint(payload)) == same


def test_entry_from_nothing_to_done(tmp_path):
    entry = Store(tmp_path).entry("draw", PRINT, {"seed": 1})
    assert entry.why_invalid() == "no result yet"
    assert not entry.begun()
    entry.prepare()
    assert not entry.begun()
    write_text(entry.path / "tiles" / "a.txt", "a")
    write_text(entry.path / "checkpoint.json", "1")
    assert entry.begun()
    assert entry.manifest() is None
    entry.commit({"steps": 3})
    manifest = entry.manifest()
    assert manifest is not None
    assert list(manifest["files"]) == ["tiles/a.txt"]
    assert manifest["info"] == {"steps": 3}
    assert manifest["payload"] == {"seed": 1}
    assert not (entry.path / "checkpoint.json").exists()
    assert entry.why_invalid() == ""
    assert not entry.begun()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_found_named_and_only_the_intact_stays(tmp_path, damage):
    entry = Store(tmp_path).entry("draw", PRINT)
    for name in ("a.txt", "b.txt"):
        write_text(entry.path / name, name * 100)
    entry.commit()
    file = entry.path / "a.txt"
    if damage == "flip":
        file.write_text("x" + file.read_text()[1:])
    elif damage == "truncate":
        os.truncate(file, 10)
    elif damage == "remove":
        file.unlink()
    else:
        (entry.path / "manifest.json").write_text("{torn")
    assert entry.manifest() is None
    expected = {"remove": "draw/a.txt is missing on disk", "manifest": "draw/manifest.json is not readable"}
    assert entry.why_invalid() == expected.get(damage, "draw/a.txt changed on disk")
    entry.prepare()
    assert names(entry.path) == ([] if damage == "manifest" else ["b.txt"])


def test_prepare_clears_temporaries_and_with_force_everything(tmp_path):
    entry = Store(tmp_path).entry("draw", PRINT)
    write_text(entry.path / "a.txt", "a")
    (entry.path / ".tmp-1-2-b.txt").write_text("half")
    entry.prepare()
    assert names(entry.path) == ["a.txt"]
    entry.prepare(force=True)
    assert names(entry.path) == []


def test_the_lock_excludes_other_processes_and_falls_with_them(tmp_path):
    entry = Store(tmp_path).entry("draw", PRINT)
    code = f"""
import time
from pathlib import Path
from stages.hashes import fingerprint
from stages.workflow.store import Store
lock = Store(Path({str(tmp_path)!r})).entry("draw", {PRINT!r}).lock()
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError):
        entry.lock().acquire(timeout=0.1)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with entry.lock().acquire(timeout=5):
        assert entry.manifest() is None


def test_stats_are_not_part_of_the_result(tmp_path):
    entry = Store(tmp_path).entry("draw", PRINT)
    write_text(entry.path / "a.txt", "a")
    manifest = entry.commit()
    entry.write_stats({"seconds": 2.5})
    assert entry.stats() == {"seconds": 2.5}
    assert entry.manifest() == manifest
    assert read_json(tmp_path / "missing.json") is None


def test_a_path_synced_later_is_there_at_once_and_its_errors_are_told(tmp_path):
    syncs = Syncs()
    with atomic_path(tmp_path / "a.txt", syncs) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    syncs.wait()
    syncs.add(tmp_path / "not there")
    with pytest.raises(FileNotFoundError):
        syncs.wait()
    syncs.wait()
