"""``make run`` hands the prompt over as it was typed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    'a "cat" \'s (sea:1.2), <lora:x:0.8>, 50% #1; $5 ${x} $$ $(touch pwned) `touch pwned`\n'
    "second line, 介绍 🐈 \\n | & > out, trailing \\"
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile beside a runner that only tells its arguments, with an environment that counts as installed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "runner.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / ".run").touch()
    return tmp_path


def make(project: Path, *arguments: str, **environment: str) -> list[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PROMPT")}
    output = subprocess.run(
        ["make", "run", *arguments], cwd=project, env=clean | environment, check=True, capture_output=True, text=True
    )
    return json.loads(output.stdout)


def test_hostile_prompt(project: Path) -> None:
    expected = ["stage=all", f"prompt={HOSTILE}"]
    assert make(project, f"PROMPT={HOSTILE}") == expected
    assert make(project, PROMPT=HOSTILE) == expected
    assert not list(project.glob("pwned"))
    assert not list(project.glob("out"))


def test_arguments_are_passed_on(project: Path) -> None:
    given = make(project, "PROMPT=a cat", "ARGS=width=1024 'negative_prompt=a, b'")
    assert given == ["stage=all", "prompt=a cat", "width=1024", "negative_prompt=a, b"]


def test_no_prompt_is_no_empty_prompt(project: Path) -> None:
    assert make(project, "ARGS=prompt_file=p.txt") == ["stage=all", "prompt_file=p.txt"]
