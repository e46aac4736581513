"""Starts the ranks of a stage on this host and ends them together: ``python -m stages.ranks --nproc N STAGE RUN_DIR``.

Each rank is ``python -m stages STAGE RUN_DIR`` with the environment of ``torchrun``, which does the same by hand. This
one holds no torch (which would cost as much memory as half a rank), hands the runner's descriptors on, and names the
rank that was lost. No rank outlives it.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from stages.distributed import LISTENING, LOST, processors
from stages.events import Error, to_line
from stages.workflow import signals
from stages.workflow.errors import ended

_PATIENCE = 5.0  # seconds for the others to end by themselves: when one is lost, and when the first is done
_PERIOD = 0.05


def environment(local: int, size: int, endpoint: str, nodes: int = 1, node: int = 0) -> dict[str, str]:
    """Of rank ``local`` of ``size`` on host ``node`` of ``nodes``, which meet at ``endpoint`` (HOST:PORT). A value that
    the user set stays."""
    usual = {
        "OMP_NUM_THREADS": str(max(1, processors() // size)),
        "NCCL_NVLS_ENABLE": "0",  # multicast over NVLink is not to be had everywhere
        "NCCL_MAX_NCHANNELS": "2",  # buffers of the exchange lie on the device: a tile is small
    }
    place = {"RANK": node * size + local, "LOCAL_RANK": local, "WORLD_SIZE": nodes * size, "LOCAL_WORLD_SIZE": size}
    host, _, port = endpoint.rpartition(":")
    meeting = {"MASTER_ADDR": host.strip("[]"), "MASTER_PORT": port}  # an address of IPv6 stands in brackets
    return {**usual, **os.environ, **{key: str(value) for key, value in place.items()}, **meeting}


def started_here(command: Sequence[str], size: int) -> list[subprocess.Popen[bytes]]:
    """All ranks, which meet on this host: the first one is handed the socket that it serves. A free port that is only
    named may be taken until then, by any connection that begins."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        environments = [environment(local, size, f"127.0.0.1:{server.getsockname()[1]}") for local in range(size)]
        server.set_inheritable(True)
        own = environments[0] | {LISTENING: str(server.fileno())}
        first = subprocess.Popen(command, env=own, close_fds=False)
        server.set_inheritable(False)
        return [first, *(subprocess.Popen(command, env=each, close_fds=False) for each in environments[1:])]


def watch(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """(number here, exit code) of the one that failed, when one did; None once the first is done and the others had
    time.

    A rank that waited in vain for another one is not the cause, if there is another one.
    """
    since = 0.0
    while True:
        codes = {rank: process.poll() for rank, process in enumerate(processes)}
        failed = sorted((code == LOST, rank) for rank, code in codes.items() if code)
        if failed and not failed[0][0]:
            return failed[0][1], codes[failed[0][1]] or 1
        if set(codes.values()) == {0}:
            return None
        if failed or codes[0] == 0:
            since = since or time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                return (failed[0][1], LOST) if failed else None
        time.sleep(_PERIOD)


def main(argv: list[str] | None = None) -> int:
    """Start, watch, end; returns the exit code: 0 done, 1 a rank failed."""
    parser = argparse.ArgumentParser(prog="python -m stages.ranks", description=__doc__)
    parser.add_argument("--nproc", type=int, required=True, help="ranks on this host")
    parser.add_argument("--nnodes", type=int, default=1, help="hosts that do the same, with the same folders")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this one is")
    parser.add_argument("--rdzv-endpoint", help="HOST:PORT of the first one")
    parser.add_argument("--events", type=int, help="descriptor for events (given by runner.py)")
    parser.add_argument("--parent", type=int, help="process to live and die with (given by runner.py)")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.parent:
        signals.tie_to_parent(arguments.parent)
        signals.ignore()
    command = [sys.executable, "-m", "stages", *rest, "--parent", str(os.getpid())]
    command += [] if arguments.events is None else ["--events", str(arguments.events)]
    nodes, node, size = arguments.nnodes, arguments.node_rank, arguments.nproc
    if arguments.rdzv_endpoint:
        environments = [environment(local, size, arguments.rdzv_endpoint, nodes, node) for local in range(size)]
        processes = [subprocess.Popen(command, env=each, close_fds=False) for each in environments]
    else:
        processes = started_here(command, size)
    try:
        failed = watch(processes)
        silent = [rank for rank, process in enumerate(processes) if process.poll() is None]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    if failed is None:
        return 0
    (local, code), first = failed, node * size
    names = " and ".join(f"rank {first + one}" for one in silent) or "another one"
    how = f"waited in vain for {names}: see launch.timeout" if code == LOST else ended(code)
    message = f"rank {first + local} of {nodes * size} {how}"
    if arguments.events is None:
        print(message, file=sys.stderr)
    else:
        os.write(arguments.events, to_line(Error(message, expected=False)).encode())
    return 1


if __name__ == "__main__":
    sys.exit(main())
