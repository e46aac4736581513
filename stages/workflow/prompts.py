"""``prompts_file``: a run for every line. What one leaves open (``{a|b}``, ``__name__``) is drawn, always the same."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

from stages.config import ConfigError

NEGATIVE = " -- "  # what stands behind it is the negative prompt
_OPEN = re.compile(r"[{}]|__[\w*/.-]+?__")
_WILDCARD = re.compile(r"__[\w*/.-]+?__")
_INSTALL = "Install it: pip install -c constraints.txt -e '.[prompts]'"


def split(line: str) -> tuple[str, str | None]:
    """A line's prompt, and its negative prompt if it has one."""
    text, separator, negative = line.partition(NEGATIVE)
    return text.strip(), negative.strip() if separator else None


def read(path: Path, folder: Path, seed: int, draws: int) -> list[str]:
    """The lines of a file, in order; those that leave something open ``draws`` times.

    Empty lines and those that begin with ``#`` are passed over. A line is drawn by ``seed`` and its own text, so lines
    that are added, and a sweep that goes on, change nothing in the others.

    Args:
        folder: where ``__name__`` finds ``name.txt``.

    Raises:
        ConfigError: no such file, no line in it, or one that cannot be drawn.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompts_file", str(path), f"a UTF-8 text file ({error})") from None
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    numbered = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not numbered:
        raise ConfigError("prompts_file", str(path), "a prompt in a line")
    found: list[str] = []
    seen: Counter[str] = Counter()
    for number, line in numbered:
        if _OPEN.search(line):
            found += _draw(line, f"{path}:{number}", folder, f"{seed} {seen[line]} {line}", draws)
        else:
            found.append(line)
        seen[line] += 1
    return found


def _draw(line: str, where: str, folder: Path, salt: str, draws: int) -> list[str]:
    try:
        from dynamicprompts.generators import RandomPromptGenerator
        from dynamicprompts.wildcards import WildcardManager
    except ImportError:
        expected = "a line without {a|b} and __name__, which the package dynamicprompts draws"
        raise ConfigError("prompts_file", f"{where}: {line}", expected, _INSTALL) from None
    number = int(hashlib.sha256(salt.encode()).hexdigest()[:12], 16)
    try:
        drawn = RandomPromptGenerator(WildcardManager(folder), seed=number).generate(line, draws)
    except Exception as error:  # pyparsing's, and what wildcards that name each other come to
        raise ConfigError("prompts_file", f"{where}: {line}", f"a line that dynamicprompts reads ({error})") from None
    for text in drawn:
        if left := _WILDCARD.search(text):
            raise ConfigError("prompts_file", f"{where}: {left[0]}", f"{left[0].strip('_')}.txt in {folder}")
    return [" ".join(text.split("\n")) for text in drawn]
