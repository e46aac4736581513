"""What surrounds the stages: the store, the plan, processes, progress and the report. Nothing here imports torch."""
