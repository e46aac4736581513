"""What the launchers share: how much a job will take, and what a job without a word is to Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

MARGIN = 1.05  # of what is predicted
LEAST = 200_000_000  # bytes of a job of which nothing is known: it will be refused, or all of it is there


def predicted(context: HydraContext, config: DictConfig, overrides: Sequence[str], pipeline: str) -> int:
    """Bytes to ask for: the peak of runner and stages that the planner predicts for a job, and a margin."""
    from stages.workflow.run import foresee  # not whenever Hydra looks for plugins

    of_job = context.config_loader.load_sweep_config(config, list(overrides))
    said = [str(text) for text in OmegaConf.to_container(of_job.hydra.overrides.task, resolve=False)]  # type: ignore[union-attr]
    with open_dict(of_job):
        del of_job["hydra"]
    return max(LEAST, int(foresee(of_job, said, pipeline=pipeline) * MARGIN))


def pipeline_of(task: Any) -> str:
    """The package of the stages that the command runs."""
    return str(task.__globals__.get("PIPELINE", "stages"))


def lost() -> JobReturn:
    """Of a job whose process ended without a result: the sweep's table says so, the others go on."""
    gone = JobReturn(status=JobStatus.COMPLETED)
    gone.return_value = None
    return gone
