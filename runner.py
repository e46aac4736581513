"""HighRes-LowRAM: text to a high-resolution picture within a memory budget. ``python runner.py --help``."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def _too_early(number: int, frame: Any) -> None:
    """A signal before the libraries are there."""
    os.write(2, b"\nstopped before anything began\n")
    os._exit(128 + number)


if __name__ == "__main__":
    for early in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(early) != signal.SIG_IGN:
            signal.signal(early, _too_early)

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from stages.config import ROOT, ConfigError
from stages.schema import Config
from stages.workflow import overrides, signals, sweep
from stages.workflow.errors import explain

PIPELINE = "stages"  # the package that holds the stages
EXPECTED = (ConfigError, HydraException, OmegaConfBaseException, OSError)  # said in one message
ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def job(config: DictConfig) -> float | None:
    """One run: the only one, or one job of a sweep (which may be on another machine)."""
    return sweep.job(config, PIPELINE, sweeps=HydraConfig.get().mode == RunMode.MULTIRUN)


def main() -> int:
    """The exit code: 0 done, 1 refused or failed (the reason is on stderr), 128 + a signal's number: 130 for Ctrl-C."""
    signals.listen()
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know every letter of a prompt
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    traceback_wanted = "1" in (os.environ.get("HIGHRES_TRACEBACK"), os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HIGHRES_TRACEBACK"] = str(int(traceback_wanted))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us whole; we say them in one message
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(search)  # for stage processes and sweep jobs
    os.environ[sweep.RUNNER] = str(os.getpid())
    jobs = None
    try:
        sys.argv[1:] = overrides.prepare(sys.argv[1:])
        with sweep.of(sys.argv[1:]) as jobs:
            job()
    except signals.Stopped as stop:
        if not stop.said:
            print("\nstopped" if jobs else "\nstopped before the work began", file=sys.stderr, flush=True)
        return stop.code
    except Exception as error:
        if traceback_wanted or not isinstance(error, EXPECTED):
            raise
        print(error if isinstance(error, ConfigError) else explain(error), file=sys.stderr)
        return _failed()
    return _failed() if sweep.failed or (jobs and not jobs.all_well) else 0


def _failed() -> int:
    """1, but for what failed as it was told to stop."""
    stop = signals.asked()
    return stop.code if stop else 1


if __name__ == "__main__":
    sys.exit(main())
