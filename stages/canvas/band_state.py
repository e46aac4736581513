"""What the remaining steps depend on, on disk: one file a band with its latents and the scheduler's history of it.

Two sets of files take turns: a step is written beside the one it came from, so that a kill at any moment leaves a
whole set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.files import Syncs, atomic_path
from stages.memory.tensors import read_checked, read_tensors, write_tensors

_PLAIN = (int, float, str, bool, type(None))
_STATE = "state"  # name of the byte tensor that holds everything that is no tensor


class BandState(NamedTuple):
    """After ``step`` steps: latents ``[1, C, h, W]`` float32, the generator's state, the scheduler's attributes."""

    step: int
    latents: Tensor
    generator: Tensor
    scheduler: dict[str, Any]


def attributes(scheduler: Any) -> dict[str, Any]:
    """All that a diffusers scheduler keeps between steps."""
    return {name: value for name, value in vars(scheduler).items() if name != "_internal_dict"}


def adopt(scheduler: Any, kept: Mapping[str, Any]) -> None:
    """Give a scheduler the attributes that ``attributes`` returned; from now on they are its own."""
    for name, value in kept.items():
        setattr(scheduler, name, value)


def copied(value: Any) -> Any:
    """``value`` with tensors and lists of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value.copy() if type(value).__module__ == "numpy" else value


class BandStates:
    """The states of all bands of a canvas, in ``folder``.

    Args:
        folder: named as a checkpoint, so that it vanishes when the stage commits.
        shapes: ``(1, C, h, W)`` of each band's latents.
        period: the steps that work may be taken up after are its multiples; those between have files of their own.
    """

    def __init__(self, folder: Path, shapes: list[tuple[int, ...]], period: int = 1) -> None:
        self.folder, self._shapes, self._period = folder, shapes, period
        self.damaged = ""  # why the newer of two sets cannot be used, where ``last_step`` found the older one
        self._syncs, self._synced = Syncs(), 0  # step that is on the disk, or on its way
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._writing: Future[None] | None = None

    def _file(self, step: int, band: int) -> Path:
        whole, rest = divmod(step, self._period)
        turn = "odd" if (rest or whole) % 2 else "even"
        return self.folder / f"{'between_' if rest else ''}{turn}_{band:03d}.safetensors"

    def write(self, band: int, state: BandState, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Keep a band's state after a step: written while the next band is stepped (``settle`` waits for the last one),
        and brought to the disk while the next step runs. ``meanwhile`` is called once the state is copied:
        the scheduler may change.

        Until a step is there, the files of the one before it stay: of two sets a power cut leaves one whole.

        Raises:
            TypeError: a scheduler that keeps what is no tensor, list or plain value: nothing is left out.
            OSError: the disk is full; the band before this one may be the one that did not fit.
        """
        tensors = {"latents": state.latents, "generator": state.generator}
        plain: dict[str, Any] = {"step": state.step, "scheduler": {}}
        for name, value in state.scheduler.items():
            plain["scheduler"][name] = _flatten(value, f"scheduler.{name}", tensors)
        tensors[_STATE] = torch.frombuffer(bytearray(json.dumps(plain, sort_keys=True).encode()), dtype=torch.uint8)
        meanwhile()
        self.settle()
        if state.step != self._synced:
            self._syncs.wait()
            self._synced = state.step
        self._writing = self._thread.submit(self._write, self._file(state.step, band), tensors)

    def _write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        with atomic_path(file, self._syncs) as temporary:
            write_tensors(temporary, tensors, checked=True)

    def settle(self) -> None:
        """Until what was given to ``write`` can be read. OSError: the disk is full."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def read(self, step: int, band: int) -> BandState:
        """The state after ``step`` steps. ValueError if the file is no such state, OSError if there is none."""
        file = self._file(step, band)
        try:
            tensors = read_tensors(file)
            plain = json.loads(bytes(tensors[_STATE].numpy()))
            kept = {name: _unflatten(value, tensors) for name, value in plain["scheduler"].items()}
            state = BandState(plain["step"], tensors["latents"], tensors["generator"], kept)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file.name} is not a checkpoint of this canvas ({error!r})") from error
        if state.step != step or state.latents.shape != self._shapes[band]:
            got = f"step {state.step} of latents {tuple(state.latents.shape)}"
            raise ValueError(f"{file.name} is not a checkpoint of this canvas ({got})")
        return state

    def last_step(self) -> int:
        """The last step that is whole, 0 if none is; every byte of it is checked.

        Raises:
            ValueError: there are files of a step, but none that is whole and of this canvas.
        """
        found, reason = [], ""
        for turn in (0, self._period):
            try:
                steps = {self._step_of(turn, band) for band in range(len(self._shapes))}
                if len(steps) == 1:
                    found += steps
            except FileNotFoundError:
                continue  # killed while this set was written for the first time
            except ValueError as error:
                reason = str(error)
        if reason and not found:
            raise ValueError(reason)
        self.damaged = reason
        return max(found, default=0)

    def _step_of(self, turn: int, band: int) -> int:
        file = self._file(turn, band)
        try:
            tensors = read_checked(file)
            plain = json.loads(bytes(tensors[_STATE].numpy()))
            step, shape = plain["step"], tuple(tensors["latents"].shape)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file.name} is not a checkpoint of this canvas ({error!r})") from error
        if not isinstance(step, int) or step < 1 or self._file(step, band) != file or shape != self._shapes[band]:
            raise ValueError(f"{file.name} is not a checkpoint of this canvas (step {step} of latents {shape})")
        return step

    def clear(self) -> None:
        """Remove all of them."""
        for pattern in ("even_*.safetensors", "odd_*.safetensors", "between_*.safetensors"):
            for file in self.folder.glob(pattern):
                file.unlink()


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``; tensors in it go to ``tensors``. TypeError for anything else, never silently left out."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        # a scheduler may keep the canvas itself, or one tensor twice: each name gets its own bytes
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    if type(value).__module__ == "numpy":
        tensors[name] = torch.as_tensor(value).clone()
        return {"array": name}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    raise TypeError(f"{name}: cannot keep a {type(value).__name__} in a checkpoint.")


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    items = [_unflatten(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
