"""The command line as a person meets it: refusals, help, saved runs, a terminal."""

import json
import os
import pty
import subprocess
import sys

import pytest
import yaml

from stages.config import ROOT

REFUSALS = [
    ("width=abc", "width: got 'abc', expected an integer"),
    ("width=2047", "The nearest are 2040 and 2048"),
    ("seed=1.5", "seed: got '1.5', expected an integer"),
    ("stage=denois", "Did you mean denoise?"),
    ("scheduler=dpmpp2m", "Did you mean dpmpp_2m?"),
    ("promt=x", "Did you mean prompt?"),
    ("memory.budget=270MB", "at least 280MB"),
    ("model.path=/no/such.ckpt", "Unpickling runs code"),
    ("model.path=/no/such", "model=embedded"),
    ("guide.image=/no/such.png", "guide.image: got"),
    ("output_dir=/proc/nope", "output_dir: got"),
    ("prompt_file=/no/such.txt", "either prompt or prompt_file"),
    ("nonsense", "key=value"),
    ("technique.group_offload=${seed}", "technique.group_offload: got 0, expected technique.group_offload.NAME=VALUE"),
    ("scheduler=[1,2]", "scheduler: got '[1,2]', expected one of"),
    ("lowres.height=???", "lowres.height: got '???', expected a value"),
    ("lowres.num_inference_steps=???", "lowres.num_inference_steps: got '???', expected a value"),
    ("denoise={strenght: 1}", "strenght"),
    ("progress=perhaps", "true or false"),
    ("progress='", "progress: got \"'\", expected a value in Hydra's grammar"),
    ("device={a: 1}", "device: got '{a: 1}', expected one of cpu, cuda"),
    ("memory.enforce=null", "memory.enforce: got 'null', expected a value"),
    ("scheduler=null", "scheduler: got 'null', expected one of checkpoint"),
    ("seed=1,2", "seed: got '1,2', expected one value"),
    ("denoise=3", "denoise: got '3', expected denoise.NAME=VALUE"),
]


@pytest.mark.parametrize(("argument", "message"), REFUSALS)
def test_one_clear_message_exit_1_and_no_traceback(cli, argument, message):
    done = cli("prompt=a", argument, "stage=plan" if not argument.startswith("stage") else "run=x")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Error executing job" not in done.stderr
    assert len(done.stderr.splitlines()) <= 6


def test_full_errors_when_asked(cli):
    done = cli("prompt=a", "width=2047", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "The nearest are" in done.stderr


def test_no_prompt_at_all(cli):
    done = cli()
    assert done.returncode == 1
    assert 'python runner.py prompt="a lighthouse' in done.stderr


def test_help_is_readable(cli):
    done = cli("--help")
    assert done.returncode == 0, done.stderr
    for word in ("prompt=TEXT", "memory.budget=800MB", "dpmpp_2m_karras", "-m seed=1,2,3", "stage=plan"):
        assert word in done.stdout


def test_groups_reach_the_config(toy):
    arguments = ["scheduler=dpmpp_2m_karras", "memory=minimal", "device=cuda", "experiment=quick", "model=sd15"]
    done = toy("prompt=a", "run=x", "stage=plan", *arguments, f"model.path={toy.common[-1].split('=')[1]}")
    assert done.returncode == 0, done.stderr
    saved = yaml.safe_load((toy.output_dir / "x" / "config.yaml").read_text())
    assert saved["scheduler"]["options"]["use_karras_sigmas"] is True
    assert saved["memory"]["budget"] == "600MB"
    assert saved["device"] == "cuda"
    assert saved["width"] == 1024
    assert saved["model"]["native_size"] == saved["denoise"]["tile_size"] == 512


def test_groups_that_are_no_more_are_understood(toy):
    """Of runs that were saved when they were there, and on the command line."""
    assert toy("run=x", "prompt=a", "stage=plan", "launch=local", "technique=default").returncode == 0
    saved = toy.output_dir / "x" / "overrides.json"
    saved.write_text(json.dumps([*json.loads(saved.read_text()), "launch=local", "technique='default'"]))
    done = toy("run=x", "stage=plan", "seed=1")
    assert done.returncode == 0, done.stderr
    kept = json.loads(saved.read_text())
    assert "seed=1" in kept and not [text for text in kept if text.startswith(("launch", "technique"))]
    assert toy("run=x", "stage=plan", "launch=elsewhere").returncode == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "scheduler").glob("*.yaml")))
def test_every_scheduler_option_names_itself(name):
    assert yaml.safe_load((ROOT / "conf" / "scheduler" / f"{name}.yaml").read_text())["name"] == name


def test_on_a_terminal_there_are_bars(toy):
    main, side = pty.openpty()
    command = [*toy.common, "run=x", "prompt=a"]
    process = subprocess.Popen(command, env=toy.environment({"TERM": "xterm", "TOY_SLOW": "0.3"}), stdout=side)
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    assert "━".encode() in shown
    assert b"5/5 tiles" in shown or b"4/5 tiles" in shown
    assert b"joins 5 tiles" in shown
    assert b" left" in shown and b"starts 0:00:00 left" not in shown
    assert sys.platform != "win32"
