"""The table of techniques: rows that exist, the Pareto front, ratios to fp32. Names of benchmarks."""

from __future__ import annotations

import sys
from importlib.metadata import packages_distributions
from typing import Any

from benchmarks.__main__ import benchmarks
from benchmarks._techniques_rows import ROWS, WORKS
from benchmarks._techniques_ways import speed
from benchmarks.techniques import front, markdown
from stages.workflow.keys import known_keys


def row(name: str, reserved_mb: int, it_s: float, **more: Any) -> dict[str, Any]:
    common = {"kind": "stock", "work": "512", "published": "", "run_steps": 4, "full_steps": 50}
    return {**common, "name": name, "reserved_mb": reserved_mb, "it_s": it_s, **more}


RESULTS = [
    row("fp32", 8000, 10.0),
    row("fp16", 4000, 20.0),
    row("slow", 4000, 15.0),
    row("small", 800, 5.0),
    row("large", 100, 99.0, work="4k"),
    {"name": "gone", "kind": "stock", "work": "512", "published": "", "error": "a line\nnot installed"},
]


def test_no_other_row_is_better_than_those_of_the_front() -> None:
    assert front(RESULTS, "reserved_mb") == ["fp16", "small"]


def test_ratios_are_to_fp32_of_the_same_work() -> None:
    lines = {
        line.split(" | ")[0].strip("|* "): line for line in markdown(RESULTS, "a card", "reserved_mb").splitlines()
    }
    assert "| 0.50 | 2.00x |" in lines["fp16"] and "| 0.10 | 0.50x |" in lines["small"]
    assert "x |" not in lines["large"] and "not installed" in lines["gone"]


def test_rows_ask_for_what_there_is() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    known = {*known_keys(), "budget"}
    for one in ROWS:
        assert one.work in WORKS and one.devices
        assert one.kind == "stock" or set(one.options) <= known, one.name


def test_steps_of_an_interval_count_together() -> None:
    ends = [0.0, 1, 2, 7, 8, 9, 14, 15]  # of steps 0 to 7, every third as long as five
    assert speed(ends)["step_seconds"] == 1
    assert speed(ends, 3) == {"step_seconds": round(7 / 3, 5), "steps": 3}


def test_no_benchmark_hides_a_package() -> None:
    """A script of the folder, such as ``random_checkpoint.py``, finds its neighbours before installed packages."""
    assert not benchmarks().keys() & {*packages_distributions(), *sys.stdlib_module_names}
