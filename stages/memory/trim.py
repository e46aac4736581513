"""Give memory back: code that only importing needed, nearly a third of what a process holds after ``import torch``, and
what the C library and MKL keep of what was freed.

Libraries are files mapped into the process; a page of them counts in RES from its first touch to the end. Pages that
nothing wrote to can be dropped at any moment: what is needed again comes back from the page cache by itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from stages.memory.monitor import usage

PIECE = 1 << 22  # bytes
_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}  # options of ``mallopt``: <malloc.h>
_DONTNEED = 4
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ \S+ ([0-9]+)")
_LEAST = 1 << 20  # bytes: smaller mappings are not worth the call


def clean_mappings(smaps: str) -> Iterator[tuple[int, int]]:
    """(start, length) of the file mappings in ``/proc/self/smaps`` that nothing can write to and nothing wrote to.

    Read-only data may have been relocated when the library was loaded ("Anonymous" pages): those would be lost.
    """
    start = length = 0
    for line in smaps.splitlines():
        if head := _HEAD.match(line):
            start = int(head[1], 16)
            readable = head[3][0] == "r" and head[3][1] == "-" and head[3][3] == "p"
            length = int(head[2], 16) - start if readable and head[4] != "0" else 0
        elif line.startswith("Anonymous:") and length >= _LEAST and int(line.split()[1]) == 0:
            yield start, length


@cache
def _libc() -> ctypes.CDLL | None:
    """glibc; others have no such calls."""
    library = ctypes.CDLL(None) if platform.system() == "Linux" else None
    return library if all(hasattr(library, name) for name in ("mallopt", "malloc_trim")) else None


def return_freed() -> None:
    """Give the system back what the C library keeps of memory that was freed in small pieces (a tokenizer's)."""
    if library := _libc():
        library.malloc_trim(0)


class Pieces:
    """What is freed in pieces of less than ``PIECE`` bytes while a unit computes: it is there for the next ones.

    Where the thresholds of a stage's environment are set, each such piece would come from the system, page by page,
    and go back. Larger ones still do: in huge pages that costs little, and kept they would leave holes that nothing
    fits in. At the end of a unit MKL's buffers are freed (``free_products``), and all that is free goes back if the
    process' RES is over ``above`` bytes: below that, units that follow need not ask for the same pages again.
    """

    def __init__(self, above: int = 0) -> None:
        self._above, self._library = above, _libc()
        self._before = [os.environ.get(name, "") for name in _THRESHOLDS]
        self._acts = self._library is not None and all(value.isdigit() for value in self._before)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A unit's work."""
        self._set([max(PIECE, int(value)) for value in self._before] if self._acts else ())
        try:
            yield
        finally:
            free_products()
            if not self._above or usage(os.getpid()).rss > self._above:
                self.give_back()

    def give_back(self) -> None:
        """All that is free, and what will be."""
        self._set(list(map(int, self._before)) if self._acts else ())
        if self._acts:
            return_freed()

    def _set(self, thresholds: Sequence[int]) -> None:
        for option, value in zip(_THRESHOLDS.values(), thresholds, strict=False):
            self._library.mallopt(option, value)  # type: ignore[union-attr]


@cache
def torch_library() -> ctypes.CDLL | None:
    """Torch's own, with MKL and oneDNN in it where it has them; None where it is no file of Linux."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.CDLL(str(library)) if library.is_file() else None


@cache
def _mkl() -> Callable[[], object] | None:
    """MKL's own, where torch has MKL in it."""
    return getattr(torch_library(), "mkl_serv_free_buffers", None)


def free_products() -> None:
    """Free the buffers that MKL keeps of its largest product, of every thread: 20 to 40 MB with T5-XXL on two.

    Between units, not after each product (``MKL_DISABLE_FAST_MM``): attention is made of small ones, which would then
    ask the system for memory and give it back, in 2.5 times the processor's time.
    """
    if free := _mkl():
        free()


def drop_clean_pages() -> int:
    """Drop them; returns the bytes of address space they are in. 0 where the system is not Linux."""
    if platform.system() != "Linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    dropped = 0
    for start, length in list(clean_mappings(Path("/proc/self/smaps").read_text())):
        if libc.madvise(start, length, _DONTNEED) == 0:
            dropped += length
    return dropped
