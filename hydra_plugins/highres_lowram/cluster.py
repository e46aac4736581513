"""hydra-submitit-launcher with ``--mem`` as the planner predicts, and a sweep that outlives a job that is lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from hydra_plugins.highres_lowram._jobs import lost, pipeline_of, predicted

try:
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
except ImportError:  # Hydra looks at every plugin, also where this one's library is not there
    BaseSubmititLauncher = None

_MEMORY = ("mem_gb", "mem_per_gpu", "mem_per_cpu")  # a person's own word for it

if BaseSubmititLauncher is not None:

    class Planned(BaseSubmititLauncher):
        """Jobs as one array, each with the memory that the largest of them needs."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            import submitit

            assert self.config is not None
            params = dict(self.params)
            folder, timeouts = params.pop("submitit_folder"), params.pop("max_num_timeout", None)
            if self._EXECUTOR == "slurm" and not any(params.get(key) for key in _MEMORY):
                size = -(-self._largest(job_overrides) // 2**20)
                params["additional_parameters"] = {"mem": f"{size}M", **(params.get("additional_parameters") or {})}
                print(f"asks for {size} MiB a job, as planned", file=sys.stderr, flush=True)
            init = {} if timeouts is None else {f"{self._EXECUTOR}_max_num_timeout": timeouts}
            executor = submitit.AutoExecutor(cluster=self._EXECUTOR, folder=folder, **init)
            shared = set(OmegaConf.structured(BaseQueueConf).keys())
            executor.update_parameters(
                **{key if key in shared else f"{self._EXECUTOR}_{key}": value for key, value in params.items()}
            )
            Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            state = Singleton.get_state()
            jobs = [(list(one), "hydra.sweep.dir", n, f"job {n}", state) for n, one in zip(numbers, job_overrides)]  # noqa: B905
            return [_result(one) for one in executor.map_array(self, *zip(*jobs))]  # noqa: B905

        def _largest(self, job_overrides: Sequence[Sequence[str]]) -> int:
            assert self.hydra_context is not None and self.config is not None
            pipeline = pipeline_of(self.task_function)
            return max(predicted(self.hydra_context, self.config, one, pipeline) for one in job_overrides)

    def _result(job: Any) -> JobReturn:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return job.results()[0]
        except (FailedJobError, UncompletedJobError) as error:
            print(str(error).partition("\n")[0], file=sys.stderr, flush=True)
            return lost()

    class Slurm(Planned):
        """``hydra/launcher=submitit_slurm``"""

        _EXECUTOR = "slurm"

    class Local(Planned):
        """``hydra/launcher=submitit_local``: the same on this machine."""

        _EXECUTOR = "local"
