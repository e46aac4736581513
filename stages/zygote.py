"""A process that has imported what stages need and computed nothing: stages are forked from it (``launch.fork``).

``python -m stages.zygote`` is for the runner: requests come over a socket, with the descriptors of a stage's log,
events and marks (:mod:`stages.workflow.launch.zygote`). What is forked becomes a child of the runner, as a fresh
process would be: it outlives this one, and its end is told to the runner by the kernel.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from stages import __main__ as process
from stages.documents import load
from stages.families import family_of
from stages.families.facts import facts_of
from stages.memory.imports import light_imports, light_torch
from stages.memory.monitor import usage
from stages.memory.trim import drop_clean_pages, return_freed
from stages.workflow import signals
from stages.workflow.launch.zygote import MESSAGE, Files


def warm(run_dir: Path, pipeline: str, modules: Sequence[str]) -> None:
    """Import the stages' modules and, where they use torch, the classes of the run's denoiser, VAE and scheduler.

    What one stage alone needs stays out: transformers, 30 MB.
    """
    with light_torch():
        for name in modules:
            importlib.import_module(f"{pipeline}.{name}")
    if "torch" in sys.modules:
        config = load(run_dir / "config.yaml")
        facts, _ = facts_of(config), family_of(config)
        with light_imports("diffusers"):
            importlib.import_module("accelerate")
            diffusers = importlib.import_module("diffusers")
            for name in (facts.classes[facts.denoiser], facts.vae, config.scheduler.class_name):
                getattr(diffusers, name or "", None)  # they are imported when they are asked for
    gc.freeze()
    drop_clean_pages()
    return_freed()


def threads() -> int:
    """Of this process, once those that libraries end before a fork are gone (OpenBLAS, which makes them again)."""
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    return len(os.listdir("/proc/self/task"))


def serve(runner: socket.socket, pid: int) -> None:
    """Fork a stage for each request, until the runner closes its end."""
    while True:
        request, files, _, _ = socket.recv_fds(runner, MESSAGE, len(Files._fields))
        if not request:
            return
        try:
            child = fork(json.loads(request), Files(*files), runner, pid)
        finally:
            for file in files:
                os.close(file)
        runner.send(json.dumps({"pid": child}).encode())


def fork(request: dict[str, Any], files: Files, runner: socket.socket, pid: int) -> int:
    """The process id of a new child of the runner, ``pid``; 0 where there can be none.

    The one between ends at once: its child goes to the runner, which adopts what is left behind below it, and begins
    when the runner says so.
    """
    reader, writer = os.pipe()
    between = os.fork()
    if not between:
        os.close(reader)
        _between(request, files, runner, pid, writer)
    os.close(writer)
    said = os.read(reader, 32)
    os.close(reader)
    os.waitpid(between, 0)
    return int(said or 0)


def _between(request: dict[str, Any], files: Files, runner: socket.socket, pid: int, writer: int) -> NoReturn:
    code = 1
    try:
        if child := os.fork():
            os.write(writer, str(child).encode())
            code = 0
        else:
            os.close(writer)
            runner.close()
            if os.read(files.go, 1):  # else the runner has not heard of this process, and starts another
                code = become(request, files, pid)
    except SystemExit as end:  # argparse
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def become(request: dict[str, Any], files: Files, runner: int) -> int:
    """Be the stage that was asked for; returns its exit code. Nothing of the process before is left but what it
    imported: Python seeds its random numbers anew, others have none that were drawn from."""
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(files.log, 1)
    os.dup2(files.log, 2)
    os.close(files.log)
    os.close(files.go)
    if group := request["enter"]:
        _enter(Path(group))
    for name in request["without"]:
        os.environ.pop(name, None)
    os.environ.update(request["environment"])
    told = ["--events", str(files.events), "--marks", str(files.marks), "--parent", str(runner)]
    arguments = [*request["arguments"], *told]
    sys.argv = [str(process.__file__), *arguments]
    gc.enable()
    code = process.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _enter(group: Path) -> None:
    """Be counted in a cgroup from now on; one that cannot be entered is said in the log, and the watchdog watches."""
    try:
        group.write_text("0")
    except OSError as error:
        print(f"{group}: {error.strerror}", file=sys.stderr)


def main() -> int:
    """Import, say how large that is, fork; the exit code is 0 when the runner has no more use for it."""
    parser = argparse.ArgumentParser(prog="python -m stages.zygote", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="outputs/<run>, with the config.yaml that runner.py wrote")
    parser.add_argument("modules", nargs="+", help="of stages: text_encode, denoise ...")
    parser.add_argument("--pipeline", required=True, help="the package that holds PIPELINE and the stage modules")
    parser.add_argument("--socket", type=int, required=True, help="descriptor on which requests come")
    parser.add_argument("--parent", type=int, required=True, help="process to live and die with")
    given = parser.parse_args()
    signals.tie_to_parent(given.parent)
    signals.ignore()
    gc.disable()  # while half a million objects are made that stay
    with socket.socket(fileno=given.socket) as runner:
        os.set_inheritable(given.socket, False)
        try:
            warm(given.run_dir, given.pipeline, given.modules)
        except Exception as error:  # of whatever kind: a stage will say it in its own words
            traceback.print_exc()
            runner.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()[:MESSAGE])
            return 1
        runner.send(json.dumps({"rss": usage(os.getpid()).rss, "threads": threads()}).encode())
        serve(runner, given.parent)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
