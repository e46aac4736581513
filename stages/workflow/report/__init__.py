"""What a run and a sweep leave for people and programs: ``report.html`` that lives while the run does, ``run.json``."""

from stages.workflow.report.live import Live
from stages.workflow.report.sweep import sweep

__all__ = ["Live", "sweep"]
