"""What a stage is handed: its config, where its inputs lie, where its output goes, and how it reports progress."""

from __future__ import annotations

import mmap
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from stages import Stage
from stages.distributed import Place, Ranks
from stages.events import Advance, Event, Note, Resumed, Start
from stages.mask import UndeclaredRead
from stages.plans import StagePlan

if TYPE_CHECKING:
    from stages.regions.types import Regions

BEGUN = "begun.json"  # of a run over several hosts: the stage that the first one has begun, and a name for this try
MARK_BYTES = 256
_DEVICE = struct.Struct("<Q")  # at the end of the marks: bytes that the GPU's allocator holds
_NAME = MARK_BYTES - 1 - _DEVICE.size
_PERIOD = 0.1  # seconds between two 'advance' events: a stage may call advance() as often as it likes


class Progress:
    """A stage's voice. Events go to ``emit``; ``mark`` writes to a shared 256-byte map only."""

    def __init__(self, emit: Callable[[Event], None] | None = None, mark: mmap.mmap | None = None) -> None:
        self._emit = emit or (lambda event: None)
        self._mark = mark
        self._pending, self._sent = 0, 0.0
        self.resumed_because = ""
        self.waited = 0.0  # seconds that passes stood still for weights

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """Announce ``total`` pieces of work named ``unit`` ('steps', 'tiles'), ``done`` of them finished before."""
        self.flush()
        self._emit(Start(int(total), unit, int(done)))

    def advance(self, n: int = 1) -> None:
        """``n`` more pieces are finished."""
        self._pending += n
        if time.monotonic() - self._sent >= _PERIOD:
            self.flush()

    def flush(self) -> None:
        """Send what ``advance`` held back."""
        if self._pending:
            self._emit(Advance(self._pending))
            self._pending, self._sent = 0, time.monotonic()

    def note(self, text: str) -> None:
        """A line that the person sees: a warning, or 'preview: PATH'."""
        self._emit(Note(str(text)))

    def resumed(self, reason: str) -> None:
        """The stage goes on from a checkpoint; ``reason`` says from where ('step 7 of 20')."""
        self.resumed_because = reason
        self._emit(Resumed(reason))

    def mark(self, module: str) -> None:
        """Name the module that runs now, for the memory timeline. One memory write: fit for every block of a pass."""
        if self._mark is not None:
            name = module.encode("utf-8", "replace")[:_NAME]
            self._mark[0 : len(name) + 1] = bytes((len(name),)) + name

    def device_bytes(self, nbytes: int) -> None:
        """What the GPU's allocator holds now, for the memory timeline."""
        if self._mark is not None:
            _DEVICE.pack_into(self._mark, MARK_BYTES - _DEVICE.size, nbytes)


def read_device_bytes(view: mmap.mmap) -> int:
    """What ``Progress.device_bytes`` said last; 0 before the first."""
    return _DEVICE.unpack_from(view, MARK_BYTES - _DEVICE.size)[0]


def read_mark(view: mmap.mmap) -> str:
    """The module that ``Progress.mark`` named last; '' before the first."""
    length = view[0]
    return bytes(view[1 : 1 + length]).decode("utf-8", "replace")


@dataclass(kw_only=True)
class StageContext:
    """The argument of every stage's ``run``; the dict that ``run`` returns goes into the manifest's ``info``.

    ``output`` is this result's folder in the store; partial results of an earlier, killed try may lie in it (whole
    files: everything is written through ``files.atomic_path``). ``inputs`` maps each upstream stage to its folder; an
    upscaling phase (``guide_512``) stands under the stage that it is one of. ``plan`` is the stage's part of
    ``<run_dir>/plan.json``. ``config`` is masked to what the stage declares (``stages.mask``).
    ``place``: which rank this process is; a stage with several writes results on the first.
    """

    stage: Stage
    config: DictConfig
    run_dir: Path
    output: Path
    inputs: dict[str, Path] = field(default_factory=dict)
    plan: StagePlan = field(default_factory=StagePlan)
    progress: Progress = field(default_factory=Progress)
    layout: Regions | None = None  # None: the stage does not declare ``regions``
    place: Place = Place()  # noqa: RUF009 - frozen

    @property
    def name(self) -> str:
        """Of the stage; an upscaling phase has its own (``guide_512``)."""
        return self.stage.name

    def ranks(self) -> Ranks:
        """All ranks of this stage, once all are there; of several hosts those that the same try started."""
        begun = self.run_dir / BEGUN
        token = zlib.crc32(begun.read_bytes()) if begun.is_file() else 0
        return Ranks.meet(self.place, str(self.config.device), self.config.launch, token)

    @property
    def regions(self) -> Regions:
        """The regions on this stage's canvas."""
        if self.layout is None:
            raise UndeclaredRead.of(self.name, "regions")
        return self.layout
