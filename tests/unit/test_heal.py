"""What is damaged or stands in the way is noted, set aside or made again by the same command: nothing is stuck."""

import json
import os
from pathlib import Path

import pytest
import torch

from stages.files import atomic_path, make_folder, read_json, read_object, set_aside, write_text
from stages.memory.rows import Rows
from stages.workflow import run
from stages.workflow.store import Store

PRINT = "f" * 64
SHAPES = ["null", "{}", "1", "[]", '"x"', '{"out": null}', '{"out": 1}', '{"out": {}}', "[" * 100_000]


@pytest.mark.parametrize("files", SHAPES)
def test_a_manifest_of_another_shape_vouches_for_nothing(tmp_path: Path, files: str) -> None:
    entry = Store(tmp_path).entry("toy", PRINT)
    write_text(entry.path / "out", "x")
    manifest = json.dumps(entry.commit()["files"])
    whole = (entry.path / "manifest.json").read_text()
    text = json.dumps(json.loads(whole)).replace(manifest, files)
    assert files in text
    (entry.path / "manifest.json").write_text(text)
    assert entry.manifest() is None and entry.why_invalid().startswith("toy/")
    entry.prepare()
    assert not (entry.path / "out").exists()
    write_text(entry.path / "out", "x")
    entry.commit()
    assert entry.manifest()


@pytest.mark.parametrize("text", ["1", "[]", "null", "{", "", "x" * 100])
@pytest.mark.parametrize("name", ["payloads.json", "plan.json", "run.json"])
def test_files_of_a_run_of_another_shape_are_made_again(toy, name: str, text: str) -> None:
    assert toy("run=x", "prompt=a").returncode == 0
    (toy.output_dir / "x" / name).write_text(text)
    for stats in toy.output_dir.glob(".store/.stats/*"):
        stats.write_text('{"heaviest": 1, "timeline": [1]}')
    done = toy("run=x")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if name != "plan.json":
        assert isinstance(json.loads((toy.output_dir / "x" / name).read_text()), dict)


IN_THE_WAY = [
    "x/image.png",
    "x/tiles",
    "x/logs",
    ".store/tiles",
    ".store/.locks",
    ".store/.stats",
    "x",
]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("place", IN_THE_WAY)
def test_what_stands_in_the_way_is_set_aside(toy, place: str, folder: bool) -> None:
    path = toy.output_dir / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        (path / "mine").mkdir(parents=True)
    else:
        path.write_text("mine")
    done = toy("run=x", "prompt=a")
    assert done.returncode == 0, done.stderr
    assert (toy.output_dir / "x" / "image.png").read_text().startswith("0 a 0")
    kept = list(path.parent.glob(f"{path.stem}.kept-1*"))
    assert len(kept) == (not folder or place in ("x/image.png", "x/tiles"))
    assert not kept or kept[0].is_dir() == folder


def test_an_entry_that_is_a_file_is_made_again(toy) -> None:
    assert toy("run=x", "prompt=a").returncode == 0
    (entry,) = toy.output_dir.glob(".store/tiles/*")
    entry.rename(entry.with_name("elsewhere"))
    entry.write_text("no folder")
    done = toy("run=x")
    assert done.returncode == 0, done.stderr
    assert entry.is_dir() and (toy.output_dir / "x" / "tiles" / "tiles" / "4.txt").is_file()


def test_a_link_to_nowhere_does_not_stand_in_the_way(tmp_path: Path) -> None:
    for place in ("created", "scratch"):
        (tmp_path / place).symlink_to(tmp_path / "gone" / "file")
    Rows.create(tmp_path / "created", (1, 2, 2)).read(0, 2)
    Rows.scratch(tmp_path / "scratch", (1, 2, 2), torch.float32)
    assert not (tmp_path / "created").is_symlink() and not (tmp_path / "scratch").is_symlink()
    assert not (tmp_path / "gone").exists()


def test_a_folder_in_the_place_of_a_lock_is_set_aside(tmp_path: Path) -> None:
    entry = Store(tmp_path).entry("denoise", PRINT)
    with entry.lock():
        (lock,) = tmp_path.rglob("*.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with entry.lock():
        assert lock.is_file() and list(lock.parent.glob("*kept-1*"))


def test_setting_aside_loses_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "a.txt").write_text(str(number))
        assert set_aside(tmp_path / "a.txt") == tmp_path / f"a.kept-{number}.txt"
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["1", "2"]
    (tmp_path / "b").write_text("file")
    make_folder(tmp_path / "b" / "c" / "d")
    assert (tmp_path / "b" / "c" / "d").is_dir() and (tmp_path / "b.kept-1").read_text() == "file"
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    make_folder(tmp_path / "dangling" / "e")
    assert (tmp_path / "dangling" / "e").is_dir()
    (tmp_path / "f.json").mkdir()
    assert read_json(tmp_path / "f.json") is None and read_object(tmp_path / "f.json") == {}
    with atomic_path(tmp_path / "f.json") as temporary:
        temporary.write_text("[]")
    assert read_json(tmp_path / "f.json") == [] and read_object(tmp_path / "f.json") == {}


@pytest.mark.parametrize("torn", ["", "[", "1", "{}", "[1]", None])
def test_torn_overrides_do_not_change_the_run(toy, torn: str | None) -> None:
    options = ["width=512", "height=256", "scheduler=ddim", "seed=3", "reroll=[{box: [0, 0, 8, 8], seed: 1}]"]
    assert toy("run=x", "prompt=it's, {a} ${b} \\\\", "stage=plan", *options).returncode == 0
    folder = toy.output_dir / "x"
    config = (folder / "config.yaml").read_text()
    (folder / "overrides.json").unlink() if torn is None else (folder / "overrides.json").write_text(torn)
    done = toy("run=x", "stage=plan")
    assert done.returncode == 0, done.stderr
    assert "its values are those of config.yaml" in done.stderr
    assert (folder / "config.yaml").read_text() == config


def test_refused_values_are_not_kept(make_config, monkeypatch, tmp_path: Path) -> None:
    def refuses(*args, **options):
        raise run.planning.DoesNotFit("too small")

    monkeypatch.setattr(run.planning, "plan", refuses)
    folder = tmp_path / "outputs" / "x"
    for before in (None, "seed: 7\n"):
        if before:
            write_text(folder / "config.yaml", before)
        with pytest.raises(run.Reported):
            run.execute(make_config({"run": "x", "device": "cuda"}, derive=False), ["prompt=a", "device=cuda"])
        assert not (folder / "overrides.json").exists()
        assert (folder / "config.yaml").exists() == bool(before)
    assert (folder / "config.yaml").read_text() == "seed: 7\n"
