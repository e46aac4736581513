"""Sweeps: shared stages, resume, failures, prompts from a file; real processes over the toy pipeline."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from stages.config import ConfigError
from stages.files import write_json
from stages.workflow.grammar import value_of
from stages.workflow.overrides import prepare, save
from stages.workflow.prompts import read, split
from stages.workflow.score import scorer
from stages.workflow.sweep import Sweep

GRID = ("-m", "prompt=a", "denoise.strength=0.3,0.5", "seed=1,2,3", "width=1000")


def results(toy, stage: str) -> dict[str, int]:
    """The finished results of a stage, with the time each was written at."""
    manifests = (toy.output_dir / ".store" / stage).glob("*/manifest.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in manifests}


def jobs(toy) -> list[dict]:
    (folder,) = (toy.output_dir / ".sweeps").glob("*/sweep.json")
    return json.loads(folder.read_text())["jobs"]


def test_a_sweep_that_is_killed_goes_on_and_computes_nothing_twice(toy):
    killed = toy.start(*GRID, TOY_SLOW="0.1")
    while len(results(toy, "join")) < 2:
        time.sleep(0.02)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=20)
    before = {stage: results(toy, stage) for stage in ("draw", "tiles", "join")}
    again = toy(*GRID)
    assert again.returncode == 0, again.stderr
    after = {stage: results(toy, stage) for stage in before}
    assert [len(found) for found in after.values()] == [3, 6, 6]
    assert all(after[stage].items() >= found.items() for stage, found in before.items())
    listed = jobs(toy)
    assert listed[0]["status"] == "finished before"
    assert [one["status"] for one in listed[2:]] == ["done"] * 4
    assert listed[4]["varies"] == ["denoise.strength=0.5", "seed=2"]
    assert "denoise.strength=0.5 seed=2" in again.stdout
    runs = [json.loads((toy.output_dir / one["run"] / "run.json").read_text()) for one in listed]
    assert [stage["status"] for stage in runs[0]["stages"]] == ["ran"] * 3  # as it was when it ran


def test_failures_are_named_and_tried_again(toy):
    sweep = ("-m", "prompt=a", "width=1001,1008", "progress=false")
    done = toy(*sweep, TOY_FAIL="tiles")
    assert done.returncode == 1
    assert "2 of 2 jobs have no result:\n  job 1 (width=1001): failed: width: got 1001" in done.stderr
    assert "  job 2 (width=1008): failed: tiles: ValueError: the toy broke" in done.stderr
    again = toy(*sweep)
    assert again.returncode == 1
    assert again.stdout.splitlines() == [str(toy.output_dir / jobs(toy)[1]["run"] / "image.png")]
    assert "1 of 2 jobs have no result:\n  job 1" in again.stderr


def test_an_interrupted_sweep_says_which_jobs_are_missing(toy):
    process = toy.start(*GRID, TOY_SLOW="0.1")
    while not results(toy, "join"):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    between = "5 of 6 jobs" in said  # it came when the first job had ended and the next had not begun
    assert ("interrupted" in said or between) and said.count("not begun") >= 3, said


def test_a_run_for_every_line(toy, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat, $x 'it' \\\n\n# a comment\na dog, mat -- blurry, \"bad\"\n", encoding="utf-8")
    done = toy("-m", f"prompts_file={file}", "negative_prompt=ugly", "stage=draw")
    assert done.returncode == 0, done.stderr
    drawn = sorted(path.read_text() for path in toy.output_dir.glob(".store/draw/*/drawn.txt"))
    assert drawn == ["0 a cat, $x 'it' \\", "0 a dog, mat"]
    kept = [json.loads(path.read_text()) for path in toy.output_dir.glob("*/overrides.json")]
    assert {value_of(one, "negative_prompt") for one in kept} == {"ugly", 'blurry, "bad"'}
    assert all(value_of(one, "prompt_line") is None for one in kept)
    alone = toy(f"prompts_file={file}")
    assert alone.returncode == 1 and "expected -m on the command line" in alone.stderr


def test_lines_are_drawn_the_same_again(tmp_path):
    pytest.importorskip("dynamicprompts")
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "animal.txt").write_text("cat\ndog\nowl\n")
    file = tmp_path / "p.txt"
    line = "a {red|green|blue} __animal__, (soft:1.2) <lora:x:0.8> -- {bad|ugly}"
    file.write_text(f"plain, 50% (a:1.2)\n{line}\n{line}\n")

    def draw(seed: int = 0, draws: int = 20) -> list[str]:
        return read(file, tmp_path / "wildcards", seed, draws)

    drawn = draw()
    assert drawn == draw() != draw(seed=1)
    assert drawn[0] == "plain, 50% (a:1.2)" and len(drawn) == 41 and len(set(drawn[1:21])) > 5
    assert drawn[1:21] != drawn[21:]  # the same line once more is drawn anew
    assert all("(soft:1.2) <lora:x:0.8>" in one and split(one)[1] in ("bad", "ugly") for one in drawn[1:])
    file.write_text(f"another {{a|b}}\n{line}\n")
    assert draw()[20:] == drawn[1:21]  # whatever stands beside it
    for text, said in (("a __nope__", "nope.txt in"), ("a {b|", "reads"), ("# only", "a prompt in a line")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            draw()
    file.write_text("a {b|c}")
    swept = prepare(["-m", f"output_dir={tmp_path}", f"prompts_file={file}", "wildcards.draws=3", "wildcards.seed=2"])
    assert value_of(swept, "prompts_file") is None and value_of(swept, "wildcards.draws") is None
    with pytest.raises(ConfigError, match=r"wildcards\.draws"):
        prepare(["-m", f"output_dir={tmp_path}", f"prompts_file={file}", "wildcards.draws=0"])


def test_without_the_package_braces_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dynamicprompts.generators", None)
    file = tmp_path / "p.txt"
    file.write_text("as it is\na {b|c}")
    with pytest.raises(ConfigError, match=r"p\.txt:2: a .*pip install .*\[prompts\]"):
        read(file, tmp_path, 0, 1)
    file.write_text("as it is")
    assert read(file, tmp_path, 0, 1) == ["as it is"]


def test_a_sweep_has_one_name_whatever_is_said_beside_it(tmp_path):
    def folder(*words: str) -> str | None:
        return value_of(prepare([f"output_dir={tmp_path}", "-m", "prompt=a", *words]), "hydra.sweep.dir")

    assert folder("seed=1,2") == folder("seed=1,2", "progress=false", "launch.threads=2")
    assert folder("seed=1,2") != folder("seed=1,2,3")


def test_scores(tmp_path, monkeypatch):
    run_dir = tmp_path / "x"
    stage = {"name": "denoise", "fingerprint": "ab", "peak_rss_bytes": 5e8}
    write_json(run_dir / "run.json", {"stages": [stage]})
    write_json(tmp_path / ".store" / ".stats" / "denoise-ab.json", {"seconds": 3.5})
    write_json(run_dir / "stitch" / "seams.json", {"denoise": {"local_ratio": 1.25}, "decode": {"local_ratio": 1.0}})
    assert tuple(scorer(one)(run_dir) for one in ("peak", "seconds", "seams")) == (500.0, 3.5, 1.25)
    (tmp_path / "own_score.py").write_text("def value(run_dir):\n    return len(run_dir.name)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert scorer("own_score:value")(run_dir) == 1.0
    with pytest.raises(ConfigError, match=r"score: got 'own_score:no'"):
        scorer("own_score:no")
    for figure in ("seams", "peak"):
        with pytest.raises(ConfigError, match="score: got"):
            scorer(figure)(tmp_path / "nothing")


def test_what_a_line_of_the_file_said_is_kept_as_text(tmp_path, make_config):
    config = make_config({"prompt": "a", "negative_prompt": "b"})
    save(tmp_path, ["prompt_line='a -- b'", "seed=1", "score=peak"], config)
    assert json.loads(Path(tmp_path / "overrides.json").read_text()) == ["prompt='a'", "negative_prompt='b'", "seed=1"]
    assert os.listdir(tmp_path) == ["overrides.json"]


def test_the_ready_sweeps_vary_what_they_say(toy):
    done = toy("-m", "experiment=strengths", "prompt=a", "stage=plan", "denoise.strength=0.3,0.4")
    assert done.returncode == 0, done.stderr
    assert [one["varies"] for one in jobs(toy)] == [["denoise.strength=0.3"], ["denoise.strength=0.4"]]


def test_what_a_job_is_writing_is_not_read(tmp_path):
    for name in ("0000.json", ".tmp-7-0-0001.json"):
        write_json(tmp_path / "jobs" / name, {"status": "done"})
    sweep = Sweep(tmp_path, [["seed=1"]])
    write_json(tmp_path / "jobs" / "0000.json", {"status": "done"})
    assert [one["status"] for one in sweep.outcomes()] == ["done"]


def test_prompts_are_given_once(tmp_path):
    (tmp_path / "lines.txt").write_text("a\n")
    words = ["-m", f"prompts_file={tmp_path / 'lines.txt'}", f"output_dir={tmp_path}"]
    with pytest.raises(ConfigError, match="prompt: got 'b', expected either it or prompts_file"):
        prepare([*words, "prompt=b"])
    with pytest.raises(ConfigError, match=r"wildcards\.draws: got"):
        prepare([*words, "wildcards.draws=²"])


def test_a_score_that_is_none_is_refused_before_the_work(toy):
    done = toy("-m", "prompt=a", "seed=1", "score=seems")
    assert done.returncode == 1 and "score: got 'seems'" in done.stderr and "Traceback" not in done.stderr
    assert not results(toy, "draw")
