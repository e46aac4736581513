"""What a finished run is worth, for a sweeper that looks for the best one (``score=``)."""

from __future__ import annotations

import importlib
from pathlib import Path

from stages.config import ConfigError
from stages.files import read_object


def score(wanted: str, run_dir: Path) -> float:
    """A number of the run in ``run_dir``.

    Args:
        wanted: ``seconds`` (of its stages, when they were computed), ``peak`` (MB), ``seams`` (how visible the borders
            of its tiles are: 1 as anything else in the picture), or ``module:function``, called with the folder.

    Raises:
        ConfigError: none of these.
    """
    stages = read_object(run_dir / "run.json").get("stages", [])
    if wanted == "peak":
        return max(one["peak_rss_bytes"] for one in stages) / 1e6
    if wanted == "seconds":
        stats = run_dir.parent / ".store" / ".stats"
        return sum(read_object(stats / f"{one['name']}-{one['fingerprint']}.json").get("seconds", 0) for one in stages)
    if wanted == "seams":
        return max((one["local_ratio"] for one in read_object(run_dir / "stitch" / "seams.json").values()), default=1.0)
    module, _, function = wanted.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("score", wanted, f"seconds, peak, seams, or module:function ({error})") from None
    return float(call(run_dir))
