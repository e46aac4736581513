"""``stage=list``: runs and stored results, with size and age."""

from __future__ import annotations

from collections import defaultdict

from omegaconf import DictConfig

from stages.paths import anchored
from stages.workflow.upkeep import survey


def listing(config: DictConfig) -> None:
    """Print two tables: the runs, and what the store holds by stage."""
    from rich.console import Console
    from rich.table import Table

    output_dir, console = anchored(config.output_dir), Console(soft_wrap=True)
    table = Table("run", "status", "stages", "size", "age", title=f"runs in {output_dir}")
    for run in survey.runs(output_dir):
        stages = ", ".join(run.stages)
        table.add_row(run.path.name, run.status, stages, survey.size(run.bytes), survey.age(run.changed))
    console.print(table)
    by_stage = defaultdict(list)
    for result in survey.results(output_dir):
        by_stage[result.stage].append(result)
    table = Table("stage", "results", "begun", "size", "linked to", "oldest", title="stored results")
    for stage, found in sorted(by_stage.items()):
        linked = [one for one in found if one.runs]
        begun, total = sum(not one.whole for one in found), survey.size(sum(one.bytes for one in found))
        used = f"{len(linked)} ({survey.size(sum(one.bytes for one in linked))})"
        table.add_row(stage, str(len(found)), str(begun), total, used, survey.age(found[0].changed))
    console.print(table)
    free = sum(one.bytes for found in by_stage.values() for one in found if not one.runs)
    console.print(f"stage=gc would free up to {survey.size(free)}; stage=gc dry=true says of what")
