"""Dropping clean code pages: what counts as clean, and that RES falls while everything still works."""

import ctypes
import os
import subprocess
import sys

import pytest

from stages.config import ROOT
from stages.memory.trim import clean_mappings, drop_clean_pages

SMAPS = """\
7f0000000000-7f0000400000 r-xp 00000000 fe:00 11 /usr/lib/libbig.so
Size:               4096 kB
Rss:                4096 kB
Anonymous:             0 kB
7f0000400000-7f0000800000 r--p 00000000 fe:00 11 /usr/lib/librelocated.so
Rss:                4096 kB
Anonymous:             8 kB
7f0000800000-7f0000c00000 rw-p 00000000 fe:00 11 /usr/lib/libdata.so
Anonymous:             0 kB
7f0000c00000-7f0000c01000 r-xp 00000000 fe:00 11 /usr/lib/libsmall.so
Anonymous:             0 kB
7f0000d00000-7f0001100000 r--s 00000000 fe:00 12 /usr/share/shared
Anonymous:             0 kB
7f0001100000-7f0001500000 r-xp 00000000 00:00 0 [anon]
Anonymous:             0 kB
"""


def test_only_clean_private_file_mappings_that_nothing_can_write_to() -> None:
    assert list(clean_mappings(SMAPS)) == [(0x7F0000000000, 0x400000)]


@pytest.mark.torch
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux'")
def test_a_process_shrinks_and_goes_on_computing() -> None:
    program = (
        "import os, torch\n"
        "from stages.memory.monitor import usage\n"
        "from stages.memory.trim import drop_clean_pages\n"
        "image = torch.arange(48.0).view(1, 3, 4, 4)\n"
        "expected = torch.nn.functional.conv2d(image, torch.ones(2, 3, 3, 3))\n"
        "before = usage(os.getpid()).rss\n"
        "dropped = drop_clean_pages()\n"
        "after = usage(os.getpid()).rss\n"
        "assert torch.equal(torch.nn.functional.conv2d(image, torch.ones(2, 3, 3, 3)), expected)\n"
        "print(before - after, dropped)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    given_back, dropped = map(int, done.stdout.split())
    assert dropped > 100_000_000 and given_back > 30_000_000


def test_twice_is_as_good_as_once() -> None:
    assert drop_clean_pages() == drop_clean_pages()


@pytest.mark.torch
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator")
@pytest.mark.parametrize("above", [0, 1, 1 << 40])
def test_pieces_are_kept_while_a_unit_computes_and_longer_while_there_is_room(above: int) -> None:
    program = (
        "import os, resource, sys, torch\n"
        "from stages.memory.monitor import usage\n"
        "from stages.memory.trim import Pieces\n"
        "def faults(many):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(many):\n"
        "        torch.ones(1 << 18)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(5)\n"
        "without = faults(100)\n"
        "before = usage(os.getpid()).rss\n"
        "pieces = Pieces(int(sys.argv[1]))\n"
        "with pieces.kept():\n"
        "    faults(5)\n"
        "    within = faults(100)\n"
        "    held = [torch.ones(1 << 18) for _ in range(40)]\n"
        "    last = torch.ones(1 << 18)\n"
        "    del held\n"
        "    kept = usage(os.getpid()).rss - before\n"
        "after = usage(os.getpid()).rss - before\n"
        "with pieces.kept():\n"
        "    held = [torch.ones(1 << 18) for _ in range(40)]\n"
        "    del held\n"
        "pieces.give_back()\n"
        "print(without, within, kept, after, usage(os.getpid()).rss - before)\n"
    )
    thresholds = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "131072")
    environment = {**os.environ, **thresholds, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(above)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    without, within, kept, after, end = map(int, done.stdout.split())
    assert without > 10_000 and within < 5_000
    assert kept > 35_000_000 and end < 5_000_000
    assert after > 35_000_000 if above > 1 else after < 5_000_000
