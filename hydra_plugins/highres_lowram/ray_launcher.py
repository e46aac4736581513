"""``hydra/launcher=ray``: every job a Ray task that asks for the memory which its plan says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from hydra_plugins.highres_lowram._jobs import lost, pipeline_of, predicted

WORKER = 120_000_000  # bytes: what a worker of Ray's takes beside what a runner does


class RayLauncher(Launcher):
    """Tasks of Ray: a worker that dies is replaced, and its job goes on from what lies in the store.

    Args:
        init: what ``ray.init`` is given: ``address`` of a cluster, or ``num_cpus``, ``_memory`` of this machine.
        num_cpus: of each job.
        max_retries: of a job whose worker died.
    """

    def __init__(self, init: DictConfig, num_cpus: float, max_retries: int) -> None:
        self._init = {str(key): value for key, value in init.items()}
        self._num_cpus, self._retries = num_cpus, max_retries
        self._held: tuple[HydraContext, TaskFunction, DictConfig] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._held = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import ray  # type: ignore[import-not-found]

        assert self._held is not None
        context, function, config = self._held
        setup_globals()
        Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        if not ray.is_initialized():
            ray.init(log_to_driver=True, include_dashboard=False, **self._init)
        sizes = [predicted(context, config, one, pipeline_of(function)) + WORKER for one in job_overrides]
        task = ray.remote(_run)
        waiting = []
        for number, (size, one) in enumerate(zip(sizes, job_overrides, strict=True), initial_job_idx):
            how = task.options(
                memory=size, num_cpus=self._num_cpus, max_retries=self._retries, name=f"job {number + 1}"
            )
            waiting.append(how.remote(number, list(one), context, config, function, Singleton.get_state()))
        return [_result(one) for one in waiting]


def _result(waiting: Any) -> JobReturn:
    import ray  # type: ignore[import-not-found]
    from ray.exceptions import RayError  # type: ignore[import-not-found]

    try:
        return ray.get(waiting)
    except RayError as error:  # its worker, its node, or its memory is gone
        print(str(error).partition("\n")[0], file=sys.stderr, flush=True)
        return lost()


def _run(
    number: int, overrides: list[str], context: HydraContext, config: DictConfig, function: TaskFunction, state: Any
) -> JobReturn:
    """One job, in a worker."""
    setup_globals()
    Singleton.set_state(state)
    of_job = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(of_job):
        of_job.hydra.job.id, of_job.hydra.job.num = str(number), number
    return run_job(
        hydra_context=context,
        task_function=function,
        config=of_job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
