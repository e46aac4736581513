"""A prompt is text: what was typed is what the config says, whatever it is."""

import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from stages.config import ROOT, ConfigError
from stages.files import read_json
from stages.schema import Config
from stages.workflow.grammar import merge, parse, quote, value_of
from stages.workflow.overrides import prepare, save
from stages.workflow.saved import SAVED

HOSTILE = [
    "a cat, mat",
    "(cat:1.2)",
    "a=b",
    "it's",
    'he said "no"',
    "'quoted'",
    '"quoted"',
    "介绍一下",
    "<lora:x:0.8>",
    "${x}",
    "\\${x}",
    "\\\\${x}",
    "${oc.env:HOME}",
    "$ {x} $x ${",
    "line one\nline two",
    "tab\there\r\n",
    "👩‍🚀 on 🌙",
    " padded ",
    "",
    " ",
    "\\",
    "ends with \\",
    "ends with \\'",
    "\\' \\\\' \\\\\\",
    "null",
    "true",
    "1e5",
    "007",
    "???",
    "[a, b]",
    "{a: b}",
    "choice(1,2)",
    "a,b,c",
    "~x",
    "-m",
    "--help",
    "# comment",
    "%s {0} $$",
    "x" * 10_000,
    "long, (and:1.1) ${hostile} 'it\\'s' " * 280,
    "\u2028\u0085\ufeff",
    "עברית العربية",
]


@pytest.fixture(scope="module", autouse=True)
def schema():
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def through_hydra(text: str) -> str:
    """The prompt after Hydra's parser and composition."""
    (override,) = [argument for argument in prepare([f"prompt={text}"]) if argument.startswith("prompt")]
    return compose("config", overrides=[override]).prompt


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_prompts_arrive_as_typed(text):
    assert through_hydra(text) == text


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00")))
@example("\\" * 7 + "'")
def test_any_text_arrives_as_typed(text):
    assert through_hydra(text) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(list("\\${}'\"a:,\n "))))
def test_any_mix_of_the_grammars_own_characters_parses_to_one_value(text):
    override = OverridesParser.create().parse_override(f"prompt={quote(text)}")
    assert not override.is_sweep_override()
    value = override.value()
    assert isinstance(value, str)
    assert value.replace("\\", "").replace("${three_question_marks:}", "???") == text.replace("\\", "")


def test_every_prompt_at_once_through_the_command_line(toy):
    """One sweep of real jobs: the quoted prompt stays one value with -m, and config.yaml holds the text typed."""
    text = "a, 'b' (c:1.2) \"d\" ${e} \\ 介绍\n🙂"
    done = toy("-m", f"prompt={text}", "+negative_prompt=x=1, ${y}", "seed=1,2", "stage=plan", "progress=false")
    assert done.returncode == 0, done.stderr
    saved = [yaml.safe_load(path.read_text()) for path in sorted(toy.output_dir.glob("*/config.yaml"))]
    assert [config["prompt"] for config in saved] == [text, text]
    assert {config["seed"] for config in saved} == {1, 2}
    assert {config["negative_prompt"] for config in saved} == {"x=1, ${y}"}


def test_a_saved_run_keeps_its_prompt(toy):
    text = "it's ${x}, \\ (y:1)"
    assert toy("run=poster", f"prompt={text}", "seed=4", "stage=plan").returncode == 0
    assert toy("run=poster", "seed=5", "stage=plan").returncode == 0
    saved = yaml.safe_load((toy.output_dir / "poster" / "config.yaml").read_text())
    assert (saved["prompt"], saved["seed"], saved["run"]) == (text, 5, "poster")
    assert toy("run=poster", "prompt=new", "stage=plan").returncode == 0
    assert yaml.safe_load((toy.output_dir / "poster" / "config.yaml").read_text())["prompt"] == "new"


def test_a_prompt_file_sweep_and_reuse(toy, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"prompt {name}, ${{x}}\n")
    files = ",".join(str(tmp_path / f"{name}.txt") for name in ("a", "b"))
    done = toy("-m", f"prompt_file={files}", "stage=plan")
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent.name for path in toy.output_dir.glob("*/config.yaml"))
    assert len(runs) == 2
    (tmp_path / "a.txt").unlink()
    assert toy(f"run={runs[0]}", "stage=plan").returncode == 0
    assert yaml.safe_load((toy.output_dir / runs[0] / "config.yaml").read_text())["prompt"] == "prompt a, ${x}"


def test_prepare_leaves_the_rest_alone():
    given = ["seed=1", "-m", "denoise.strength=0.3,0.5", "prompt=a, b", "~experiment", "+scheduler.options.x=1"]
    ready = prepare(given)
    assert ready[:6] == ["-m", "seed=1", "denoise.strength=0.3,0.5", "prompt='a, b'", "~experiment", given[-1]]
    assert prepare(["--cfg", "job", "seed=1"])[:3] == ["--cfg", "job", "seed=1"]
    assert prepare(["prompt_file=a b.txt"])[0] == "prompt_file='a b.txt'"
    assert prepare(["-m", "prompt_file=a.txt,b.txt"])[1] == "prompt_file=a.txt,b.txt"
    assert prepare(["regions.grid=[[a,b]]"])[0] == "regions={grid: [[a,b]]}"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("promt=x, y", "Did you mean prompt"),
        ("denoise.strenght=1", "Did you mean denoise.strength"),
        ("schedule.options.x=1", "known key"),
        ("scheduler=dpmm_2m", "Did you mean dpmpp_2m"),
        ("device=gpu", "cpu, cuda"),
        ("lighthouse", "key=value"),
        ("run=a/b", "folder name"),
        ("run=..", "folder name"),
    ],
)
def test_typos_are_answered_before_hydra(argument, message):
    with pytest.raises(ConfigError, match=message):
        prepare([argument])


def test_merge_new_wins_and_prompt_excludes_prompt_file():
    base = ["prompt='a'", "seed=1", "model=sd15"]
    assert merge(base, ["seed=2", "width=8"]) == ["prompt='a'", "model=sd15", "seed=2", "width=8"]
    assert merge(base, ["prompt_file=x"]) == ["seed=1", "model=sd15", "prompt_file=x"]
    assert merge([], ["seed=1", "seed=2"]) == ["seed=2"]


def test_save_keeps_what_belongs_to_the_run(tmp_path):
    said = ["prompt_file=gone.txt", "seed=1", "stage=plan", "run='x'", "force=true", "hydra.run.dir='y'"]
    save(tmp_path, said, OmegaConf.create({"prompt": "it's", "model": {"loras": []}}))
    assert read_json(tmp_path / SAVED) == ["prompt='it\\'s'", "seed=1"]


def test_parse_and_value_of():
    assert parse("+a.b@c=d=e") == ("+", "a.b", "@c", "d=e")
    assert parse("nothing") is None
    assert value_of(["run='it\\'s'", "x=1"], "run") == "it's"
    assert value_of(["run=null"], "run") is None
    assert Path(sys.executable).exists()
