"""The ranks of a stage: processes that share its tiles, each with the same model, and what they tell each other.

The first one (rank 0) keeps the canvas, the checkpoint and the progress; the others predict. What a rank predicted
reaches the first one as it is, and is summed there in the order of a single process: the picture has the same bits for
any number of ranks. No torch before ranks meet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

LISTENING = "HIGHRES_LISTENING"  # in a rank's environment: descriptor of the socket at MASTER_PORT, for the first one
LOST = 75  # exit code of a rank that waited for another one in vain
_MEETING = timedelta(days=7)  # the others may wait for the first one's lock; they end with whoever started them

Item = TypeVar("Item")


class LostRank(RuntimeError):
    """Another rank ended, or was silent for ``launch.timeout`` seconds."""


class Place(NamedTuple):
    """Which rank of how many a process is; ``local`` counts on its host."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def told(cls) -> Place:
        """As ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` say: those of ``torchrun``, and of :mod:`stages.ranks`."""
        return cls(*(int(os.environ.get(name, usual)) for name, usual in zip(NAMES, (0, 1, 0), strict=True)))

    def take_gpu(self) -> None:
        """Have this process see one GPU only: its own. To be called before CUDA begins."""
        if self.size > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = [str(self.local)] * (self.local + 1) if visible is None else visible.split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = names[self.local] if self.local < len(names) else ""


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Ranks:
    """What one rank says to the others; alone it says nothing.

    Args:
        device: where tensors that are exchanged have to lie: ``cpu`` (gloo) or ``cuda`` (nccl).
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self._device = rank, size, device

    @classmethod
    def meet(cls, place: Place, device: str, launch: Any, token: int = 0) -> Ranks:
        """All ranks of a stage, once all are there; ``launch`` is the config's node.

        Args:
            token: of what they were started for; that of the first one has to be everybody's.

        Raises:
            LostRank: not all came, or one that was started for something else.
            ValueError: a rank without a GPU.
        """
        if place.size == 1:
            return ALONE
        import torch.distributed as dist

        on_gpu = device != "cpu"
        if on_gpu and not _gpus():
            raise ValueError(f"launch.nproc: rank {place.rank} of {place.size} has no GPU; expected as many as ranks.")
        backend = launch.backend
        if backend == "auto":
            backend = "nccl" if on_gpu and dist.is_nccl_available() else "gloo"
        if sys.platform == "linux" and os.environ.get("MASTER_ADDR") == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever name the host has
        ranks = cls(place.rank, place.size, "cuda" if backend == "nccl" else "cpu")
        timeout = timedelta(seconds=launch.timeout)
        with ranks._hearing("all others"):
            meeting = timeout if ranks.first else _MEETING
            store = _meeting_place(place, meeting)
            store.set_timeout(timeout)
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        if (first := ranks.agreed(token)) != token:
            raise LostRank(f"rank {place.rank} of {place.size} was started for an earlier try ({token}, not {first})")
        return ranks

    @property
    def first(self) -> bool:
        """Whether this rank keeps the canvas."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of ``items``: of all of them one run each, as long as the others' or one longer."""
        count = len(items)
        return items[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.agreed(0)

    def agreed(self, number: int) -> int:
        """The first one's ``number``."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        said = torch.tensor([number if self.first else 0], device=self._device)
        with self._hearing("all others"):
            dist.all_reduce(said)
            return int(said)

    @contextmanager
    def first_one_first(self) -> Iterator[None]:
        """The others enter when the first one has left."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def broadcast(self, values: Tensor) -> Tensor:
        """The first one's ``values``; the others give a tensor of that shape and dtype."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        moved = values.contiguous().to(self._device)
        with self._hearing("all others" if self.first else "rank 0"):
            dist.broadcast(moved, 0)
            return moved.cpu()

    def ordered(
        self, items: Sequence[Item], make: Callable[[Item], Tensor], shape: Callable[[Item], Sequence[int]]
    ) -> Iterator[tuple[Item, Tensor]]:
        """(item, ``make(item)``) of all items in their order on the first rank; nothing on the others.

        Items are dealt out in turns, so that what waits to be added is one item a rank. Of each turn the first rank,
        which has more to do than predict, makes the last item. ``make`` gives float32 tensors of ``shape(item)`` on
        the CPU.
        """
        sent: tuple[Any, Tensor] | None = None
        for start in range(0, len(items), self.size):
            turn = items[start : start + self.size]
            last = len(turn) - 1
            mine = last if self.first else self.rank - 1
            own = make(turn[mine]) if self.first or mine < last else None
            if self.first:
                assert own is not None
                for source, item in enumerate(turn[:last], 1):
                    yield item, self._received(source, shape(item))
                yield turn[last], own
            elif own is not None:
                self._ended(sent)
                sent = self._sent(own)
        self._ended(sent)

    def _sent(self, values: Tensor) -> tuple[Any, Tensor]:
        import torch.distributed as dist

        moved = values.contiguous().to(self._device)
        with self._hearing("rank 0"):
            return dist.isend(moved, 0), moved

    def _ended(self, sent: tuple[Any, Tensor] | None) -> None:
        if sent is not None:
            with self._hearing("rank 0"):
                sent[0].wait()

    def _received(self, source: int, shape: Sequence[int]) -> Tensor:
        import torch
        import torch.distributed as dist

        found = torch.empty(tuple(shape), device=self._device)
        with self._hearing(f"rank {source}"):
            dist.recv(found, source)
            return found.cpu()

    @contextmanager
    def _hearing(self, whom: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of torch.distributed, of all its kinds
            raise LostRank(f"rank {self.rank} of {self.size} waited in vain for {whom}: {error}") from error


def _meeting_place(place: Place, timeout: timedelta) -> Any:
    """The store that ranks meet at, as torch's ``env://`` makes it; the first one serves it at the socket that it was
    handed, if it was."""
    from torch.distributed import TCPStore
    from torch.distributed.rendezvous import rendezvous

    listening = os.environ.get(LISTENING)
    if place.rank or not listening:
        return next(rendezvous("env://", place.rank, place.size, timeout=timeout))[0]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, place.size, True, timeout, multi_tenant=True, master_listen_fd=int(listening))


ALONE = Ranks()  # a stage of one process


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def processors() -> int:
    """That this process may use, and share with other ranks."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
