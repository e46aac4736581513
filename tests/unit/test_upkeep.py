"""The folder of runs: listed, cleaned, held to a size, one run taken out of it."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from stages.config import ConfigError
from stages.files import write_json, write_text
from stages.schema import Config
from stages.workflow.store import Store
from stages.workflow.upkeep import clean, command, survey

DAY = 86400


@pytest.fixture
def outputs(tmp_path):
    """A run that links to one result; three more that nobody links to, of 1, 10 and 100 days; one that is begun."""
    store = Store(tmp_path / ".store")
    for name, days in (("used", 200), ("a", 1), ("b", 10), ("c", 100), ("begun", 50)):
        entry = store.entry("denoise", name)
        write_text(entry.path / "x.bin", name[0] * 1000)
        if name != "begun":
            write_json(entry.path / "manifest.json", {})
        entry.write_stats({"seconds": 1})
        for path in (*entry.path.rglob("*"), entry.path):
            os.utime(path, (time.time() - days * DAY,) * 2)
    write_text(tmp_path / "poster" / "config.yaml", "prompt: a\n")
    (tmp_path / "poster" / "denoise").symlink_to("../.store/denoise/used")
    write_text(store.root / "weights" / "w.bin", "w" * 5000)
    os.utime(store.root / "weights" / "w.bin", (time.time() - 30 * DAY,) * 2)
    return tmp_path


def config(outputs: Path, **values):
    return OmegaConf.merge(OmegaConf.structured(Config), {"output_dir": str(outputs), **values})


def left(outputs: Path) -> set[str]:
    return {path.name for path in outputs.glob(".store/[!.]*/*") if path.suffix != ".lock"}


def test_what_lies_there_is_listed(outputs, capsys):
    assert command(config(outputs, stage="list"))
    said = capsys.readouterr().out
    assert "poster" in said and "unfinished" in said and "1 (1 kB)" in said and "200 d" in said
    assert [one.path.name for one in survey.results(outputs)] == ["used", "c", "begun", "w.bin", "b", "a"]
    assert not command(config(outputs, stage="all")) and not command(config(outputs, stage=["gc"]))


def test_what_no_run_links_to_goes(outputs, capsys):
    command(config(outputs, stage="gc", keep="7d", dry=True))
    assert left(outputs) == {"used", "a", "b", "c", "begun", "w.bin"}
    assert "4 results, 8 kB would be freed" in capsys.readouterr().out
    with FileLock(outputs / ".store" / ".locks" / "denoise-c.lock"):
        command(config(outputs, stage="gc", keep="7d"))
    assert left(outputs) == {"used", "a", "c"}
    said = capsys.readouterr().out
    assert "denoise/c: a process works on it, stays" in said and "begun: 1 kB, 50 d old, begun" in said
    assert not (outputs / ".store" / ".stats" / "denoise-b.json").exists()
    command(config(outputs, stage="gc", keep=0))
    assert left(outputs) == {"used"}
    with pytest.raises(ConfigError, match="keep: got 'soon'"):
        command(config(outputs, stage="gc", keep="soon"))


def test_what_a_run_links_to_meanwhile_stays_and_what_is_gone_is_no_error(outputs):
    store = outputs / ".store"
    found = {one.path.name: one for one in survey.results(outputs)}
    (outputs / "poster" / "decode").symlink_to("../.store/denoise/b")
    shutil.rmtree(store / "denoise" / "c")
    with FileLock(store / "weights" / "w.lock"):
        gone = clean._remove([found["b"], found["c"], found["w.bin"]], lambda text: None)
    assert [one.path.name for one in gone] == ["c"] and left(outputs) >= {"b", "w.bin"}


def test_a_result_that_a_run_is_about_to_link_to_stays(outputs):
    write_text(outputs / ".store" / "decode" / "new" / "manifest.json", "{}")
    command(config(outputs, stage="gc", keep=0))
    assert left(outputs) == {"used", "new"}


def test_the_store_is_held_to_a_size(outputs):
    said: list[str] = []
    clean.trim(config(outputs), said.append)
    assert len(left(outputs)) == 6 and not said
    clean.trim(config(outputs, store={"max_size": "3.1kB"}), said.append)
    assert left(outputs) == {"used", "a", "b"}  # the oldest went, until it fits
    clean.trim(config(outputs, store={"max_size": "500"}), said.append)
    assert left(outputs) == {"used"} and "the store holds 1 kB" in said[-1]


def test_one_run_is_taken_out(outputs, tmp_path_factory):
    target = tmp_path_factory.mktemp("elsewhere") / "mine"
    command(config(outputs, stage="export", run="poster", to=str(target)))
    assert (target / "denoise" / "x.bin").read_text() == "u" * 1000
    assert not any(path.is_symlink() for path in target.rglob("*"))
    for values, said in (({"run": "no"}, "stage=list"), ({"run": "poster"}, "to: got"), ({}, "run: got None")):
        with pytest.raises(ConfigError, match=said):
            command(config(outputs, stage="export", to=str(target), **values))
    with pytest.raises(ConfigError, match="to: got None"):
        command(config(outputs, stage="export", run="poster"))


def test_commands_of_the_command_line(toy):
    toy("run=x", "prompt=a")
    assert "│ x " in toy("stage=list").stdout
    done = toy("stage=export", "run=x", f"to={toy.output_dir / 'y, z'}")
    assert done.returncode == 0, done.stderr
    assert (toy.output_dir / "y, z" / "image.png").read_text() == (toy.output_dir / "x" / "image.png").read_text()
    again = toy("stage=export", "run=x", f"to={toy.output_dir / 'y, z'}")
    assert again.returncode == 1 and "expected a folder that is not there yet" in again.stderr


def test_what_a_kill_leaves_is_its_run_s(toy):
    killed = toy.start("run=x", "prompt=a", TOY_SLOW="0.5")
    while not survey.results(toy.output_dir):
        time.sleep(0.02)
        assert killed.poll() is None
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=20)
    assert {one.runs for one in survey.results(toy.output_dir)} == {("x",)}


def test_a_size_that_is_none_is_refused_before_the_work(toy):
    done = toy("prompt=a", "store.max_size=much")
    assert done.returncode == 1 and "store.max_size: got 'much'" in done.stderr
    assert not list(toy.output_dir.glob(".store/*/*"))
