"""What tokenizers of real size take in memory, for a byte of their files: the rates of ``stages/models/tokenizers.py``.

    python -m benchmarks vocabularies

Vocabularies are random, as large as those of CLIP, Qwen3 and T5; each is opened in a process of its own, as text_encode
opens it. 'left' is what stays when it was given up.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks._measure import finish, mb, parser, table
from stages.config import ROOT
from stages.files import write_json
from stages.memory.monitor import own_peak_rss, usage
from stages.memory.trim import return_freed
from stages.models.tokenizers import LEFT, room
from stages.workflow.launch.local import environment

CLASSES = {"clip": ("CLIPTokenizer", 49_408), "qwen3": ("Qwen2Tokenizer", 151_643), "t5": ("T5Tokenizer", 32_100)}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pairs(folder: Path, count: int, ends: bool) -> None:
    """``vocab.json`` and ``merges.txt`` of ``count`` byte pairs; ``ends``: with CLIP's marks of a word's end."""
    draw, merges = random.Random(0), []
    known = {letter: number for number, letter in enumerate((*LETTERS, *(f"{one}</w>" for one in LETTERS * ends)))}
    pieces = list(LETTERS)
    while len(known) < count:
        pair = [pieces[draw.randrange(min(len(pieces), 3_000))] for _ in range(2)]
        if len(joined := "".join(pair)) < 14 and joined not in known:
            known[joined] = len(known)
            pieces.append(joined)
            merges.append(" ".join(pair))
    known |= {mark: len(known) + number for number, mark in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    folder.mkdir(parents=True)
    write_json(folder / "vocab.json", known)
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges, "")), encoding="utf-8")


def words(count: int) -> list[tuple[str, float]]:
    """Of T5, each with its log-probability."""
    draw, known = random.Random(1), dict[str, float]({"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0})
    while len(known) < count:
        word = "".join(draw.choice(LETTERS) for _ in range(draw.randint(1, 9)))
        known[draw.choice(("", "\u2581")) + word] = -12 * draw.random()
    return list(known.items())


def taken(kind: str, folder: Path) -> dict[str, int]:
    """In this process: bytes more than before, while it is open, at most, and when it has been given up."""
    import transformers

    from stages.memory.imports import light_imports
    from stages.models.tokenizers import read_tokenizer

    with light_imports("transformers"):
        getattr(transformers, CLASSES[kind][0])
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = usage(os.getpid()).rss
    opened: Any = read_tokenizer(CLASSES[kind][0], folder)
    opened("a lighthouse on a cliff at sunset")
    held, most = usage(os.getpid()).rss, own_peak_rss()
    del opened
    gc.collect()
    return_freed()
    return {"held": held - before, "opening": most - before, "left": usage(os.getpid()).rss - before}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--of", nargs=2, metavar=("KIND", "FOLDER"), help="one, in this process")
    given = made.parse_args()
    if given.of:
        print("RESULT " + json.dumps(taken(given.of[0], Path(given.of[1]))))
        return 0
    import transformers

    config = OmegaConf.create({"device": "cpu", "launch": {"threads": None}})
    own, rows, checks = environment(config, "text_encode"), [], {}
    with tempfile.TemporaryDirectory() as root:
        for kind, (name, count) in CLASSES.items():
            folder, whole = Path(root) / kind, Path(root) / f"{kind}-whole"
            tokenizer: Any = getattr(transformers, name)
            if kind != "t5":
                pairs(folder, count, kind == "clip")
            (tokenizer(vocab=words(count)) if kind == "t5" else tokenizer.from_pretrained(folder)).save_pretrained(
                whole
            )
            for one in (folder, whole) if kind != "t5" else (whole,):
                command = [sys.executable, "-m", "benchmarks.vocabularies", "--of", kind, str(one)]
                done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
                took = json.loads(done.stdout.rpartition("RESULT ")[2])
                planned = room(one, kind == "t5")
                rows.append({"kind": one.name, **took, "planned": planned._asdict()})
                checks[f"{one.name}: no more than planned"] = all(
                    took[part] <= getattr(planned, part) for part in ("held", "opening")
                )
                checks[f"{one.name}: at most {mb(LEFT)} stay"] = took["left"] <= LEFT
    parts = ("held", "opening", "left")
    cells = [(row["kind"], *(f"{mb(row[part])} ({mb(row['planned'][part])})" for part in parts)) for row in rows]
    table(("tokenizer", "open (planned)", "while it is opened", "given up"), cells)
    return finish("vocabularies", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
