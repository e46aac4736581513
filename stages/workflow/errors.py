"""Other people's errors (Hydra, OmegaConf, the system) in the words of this program: key, got, expected."""

from __future__ import annotations

import errno
import re
import signal


def explain(error: BaseException) -> str:
    """One message without a traceback; HIGHRES_TRACEBACK=1 shows where it came from."""
    chain = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in chain:
        if isinstance(link, OSError) and link.errno is not None:
            return system(link)
    text = "\n".join(str(link) for link in chain)
    wrong = re.search(_WRONG, text, re.DOTALL)
    key = re.search(r"full_key: (\S+)", text)
    if wrong and key:
        return f"{key[1]}: got {wrong[1]!r:.200}, expected {_A.get(wrong[2], wrong[2])}."
    if said := _refused(text, key[1] if key else ""):
        return said
    unknown = re.search(r"Key '([^']+)' (?:not in|is not in struct)", text)
    if unknown:
        where = f"{key[1]}: " if key else ""
        return f"{where}{unknown[1]!r} is not a known key. See python runner.py --cfg job"
    missing = re.search(r"Missing mandatory value: (\S+)|Could not override '([^']+)'", text)
    if missing:
        return f"{missing[1] or missing[2]}: {str(error).splitlines()[0]}"
    said = next((str(link) for link in chain if str(link).strip()), "")
    lines = [line for line in said.splitlines() if line.strip()]
    return "\n".join(lines[:6]) or f"{type(error).__name__} (HIGHRES_TRACEBACK=1 shows more)"


def _refused(text: str, key: str) -> str:
    """Of an override that Hydra or the schema does not take; "" for other errors."""
    merged = re.search(r"Error merging override [+~]*[^=]+=(.*?)(?:\n|$)", text, re.DOTALL)
    if key and merged:
        expected = next(
            (expected for sign, expected in _KINDS.items() if sign in text),
            f"{key}.NAME=VALUE, as there are keys below it",
        )
        return f"{key}: got {merged[1]!r:.200}, expected {expected}."
    several = re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'\n", text, re.DOTALL)
    if several:
        return f"{several[1]}: got {several[2]!r:.200}, expected one value. A list is [a,b]; -m sweeps."
    return ""


_KINDS = {"is not Optional": "a value", "to string": "a text"}
_WRONG = r"Value '(.*?)'(?: of type '\w+')? (?:could not be converted to|is not a valid) (\w+)"
_A = {"Integer": "an integer", "Float": "a number", "bool": "true or false", "String": "a text"}


def disk_full(error: BaseException) -> bool:
    """Whether it, or what it came from, is a disk without room; libraries say so in their own ways."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            break
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "os error 28" in str(current) or "No space left on device" in str(current):
            return True
        current = current.__cause__ or current.__context__
    return False


def ended(code: int) -> str:
    """How a process ended that was to end with 0."""
    if code >= 0:
        return f"ended with exit code {code}"
    outside = " (from outside: kill -9, or the kernel when the machine is out of memory)"
    return f"ended by signal {signal.Signals(-code).name}{outside if -code == signal.SIGKILL else ''}"


def system(error: OSError) -> str:
    """What the system refused, and what helps."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}: free some space and give the same command again; finished work stays"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not writable{where}: choose another folder with output_dir=FOLDER"
    return f"{error.strerror or error}{where}"
