"""From a profile to a plan: the fastest that fits, and an honest refusal."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.memory.planner import (
    MARGIN,
    Choice,
    Cut,
    Line,
    ModelProfile,
    OverBudget,
    StageProfile,
    choices,
    pass_seconds,
    plan_run,
    plan_stage,
)

MB = 1_000_000


def cut(sizes: list[int], flops: list[int], limit: int, activations: int) -> Cut:
    names = tuple(f"u{index}" for index in range(len(sizes)))
    return Cut(
        limit=limit,
        order=names,
        nbytes=dict(zip(names, sizes, strict=True)),
        flops=dict(zip(names, flops, strict=True)),
        lines=tuple(
            Line(unit=name, fixed=activations, slope=activations // 4, workspace=size)
            for name, size in zip(names, sizes, strict=True)
        ),
    )


def profile(
    blocks: list[int], *, flops: int = 10**10, rate: float = 1e11, micro_batches: int = 6, name: str = "denoise"
) -> StageProfile:
    """Blocks of the given sizes, each of which can be cut in four."""
    leaves = [size // 4 for size in blocks for _ in range(4)]
    return StageProfile(
        name=name,
        base=300 * MB,
        imports=0,
        extra=5 * MB,
        models=(
            ModelProfile(
                component="unet",
                weights=sum(blocks),
                micro_batch=2,
                micro_batches=micro_batches,
                steps=10,
                cuts=(
                    cut(blocks, [flops] * len(blocks), sum(blocks), 20 * MB),
                    cut(leaves, [flops // 4] * len(leaves), max(leaves), 20 * MB),
                ),
            ),
        ),
        rate=rate,
        seconds=2.5,
    )


def chosen(one: StageProfile, budget: int, runner: int, weights: str = "auto") -> Choice:
    return plan_stage(one, budget, runner, weights).choices["unet"]


def test_resident_where_it_fits_streamed_where_not_leaf_by_leaf_where_tight() -> None:
    heavy = profile([80 * MB] * 10, flops=10**10, rate=1e9)  # computing hides reading: streamed costs nothing
    light = profile([80 * MB] * 10, flops=10**7, rate=1e11)  # reading is all there is
    assert chosen(light, 4000 * MB, 40 * MB).model.resident == "all"
    streamed = chosen(light, 900 * MB, 40 * MB)
    assert streamed.model.resident == () and streamed.model.ring_bytes < 800 * MB
    tight = chosen(light, 430 * MB, 40 * MB)
    assert tight.model.unit_limit == tight.model.ring_bytes == 20 * MB
    assert streamed.seconds < tight.seconds
    # of plans that are equally fast the one that takes least
    assert chosen(heavy, 4000 * MB, 40 * MB).peak < 1200 * MB


def test_the_planner_keeps_to_the_weights_that_were_asked_for() -> None:
    light = profile([80 * MB] * 10, flops=10**7, rate=1e11)
    assert chosen(light, 4000 * MB, 40 * MB, "streamed").model.resident == ()
    heavy = profile([80 * MB] * 10, flops=10**10, rate=1e9)
    assert chosen(heavy, 4000 * MB, 40 * MB).model.resident == ()
    assert chosen(heavy, 4000 * MB, 40 * MB, "resident").model.resident == "all"
    with pytest.raises(OverBudget) as refused:
        plan_stage(heavy, 900 * MB, 40 * MB, "resident")
    assert refused.value.least.choices["unet"].model.resident == "all"
    fixed = dataclasses.replace(light, models=(dataclasses.replace(light.models[0], streams=False),))
    assert chosen(fixed, 4000 * MB, 40 * MB, "streamed").model.resident == "all"


def test_weights_are_read_once_for_all_tiles_where_memory_allows() -> None:
    light = profile([80 * MB] * 10, flops=10**7)
    assert chosen(light, 900 * MB, 40 * MB).group == 6


def test_what_units_give_costs_time() -> None:
    """Of two cuts that read and compute alike the one whose units hand less on; on a GPU either."""
    one = profile([80 * MB] * 10, flops=10**10, rate=1e9)
    (model,), leaves = one.models, one.models[0].cuts[1]
    smaller = dataclasses.replace(leaves, lines=tuple(dataclasses.replace(line, fixed=0) for line in leaves.lines))

    def limit(given: int, **more: float) -> int | None:
        both = (dataclasses.replace(leaves, limit=1), dataclasses.replace(smaller, limit=2, given=given))
        stage = dataclasses.replace(one, models=(dataclasses.replace(model, cuts=both),))
        stage = dataclasses.replace(stage, **more)  # type: ignore[arg-type]
        return chosen(stage, 600 * MB, 40 * MB).model.unit_limit

    assert limit(0) == 2
    assert limit(50_000 * MB) == 1
    assert limit(50_000 * MB, given_rate=float("inf")) == 2


def test_too_small_is_refused_and_the_least_is_enough() -> None:
    one = profile([80 * MB] * 10)
    with pytest.raises(OverBudget) as error:
        plan_stage(one, 400 * MB, 40 * MB)
    least = error.value.least
    enough = int(least.peak / (1 - MARGIN)) + 1
    assert plan_stage(one, enough, 40 * MB).peak <= least.peak
    with pytest.raises(OverBudget):
        plan_stage(one, int(least.peak / (1 - MARGIN)) - 1000, 40 * MB)
    assert error.value.fastest.seconds <= least.seconds


def test_the_stage_that_needs_most_is_named() -> None:
    small, large = profile([10 * MB] * 3, name="decode"), profile([200 * MB] * 3, name="denoise")
    with pytest.raises(OverBudget) as error:
        plan_run([small, large], 350 * MB, 40 * MB)
    assert error.value.stage == "denoise"
    assert plan_run([small, large], 2000 * MB, 40 * MB).keys() == {"decode", "denoise"}


def least_of(one: StageProfile) -> int:
    with pytest.raises(OverBudget) as error:
        plan_stage(one, 1, 40 * MB)
    return error.value.least.peak


sizes = st.lists(st.integers(1, 200).map(lambda size: size * MB), min_size=1, max_size=12)


@settings(max_examples=60)
@given(sizes, st.integers(330, 3000), st.integers(1, 9), st.integers(7, 12))
def test_a_plan_keeps_the_budget_and_more_memory_is_never_slower(
    blocks: list[int], budget: int, micro_batches: int, flops: int
) -> None:
    one = profile(blocks, micro_batches=micro_batches, flops=10**flops)
    least = least_of(one)
    if least > budget * MB * (1 - MARGIN):
        with pytest.raises(OverBudget):
            plan_stage(one, budget * MB, 40 * MB)
        budget = -(-int(least / (1 - MARGIN) + 1) // MB)
    plan = chosen(one, budget * MB, 40 * MB)
    assert plan.peak <= budget * MB * (1 - MARGIN)
    more = chosen(one, budget * MB * 2, 40 * MB)
    assert more.seconds <= plan.seconds * 1.0101
    if plan.model.resident != "all":
        used = next(cut for cut in one.models[0].cuts if cut.limit == plan.model.unit_limit)
        assert plan.model.ring_bytes >= used.largest
        assert 1 <= plan.group <= micro_batches


@settings(max_examples=60)
@given(sizes, st.integers(1, 8), st.floats(1e9, 1e13))
def test_a_pass_takes_at_least_its_compute_and_its_reading_and_less_with_a_larger_ring(
    blocks: list[int], group: int, rate: float
) -> None:
    one = cut(blocks, [10**9] * len(blocks), sum(blocks), MB)
    rings = [one.largest, 2 * one.largest, sum(blocks)]
    seconds = [pass_seconds(one, group, ring, rate) for ring in rings]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(seconds))
    assert seconds[-1] >= len(blocks) * 10**9 * group / rate
    assert seconds[-1] >= sum(blocks) / 1e9


def test_without_room_to_read_ahead_disk_and_compute_take_turns() -> None:
    one = cut([100 * MB] * 4, [10**9] * 4, 400 * MB, MB)
    together = pass_seconds(one, 1, 200 * MB, 1e10)
    in_turns = pass_seconds(one, 1, 100 * MB, 1e10)
    assert in_turns == pytest.approx(4 * (0.1 + 0.1 + 0.1 / 6), rel=0.01)
    assert together < 0.75 * in_turns


def test_halves_of_guided_tiles_stay_together() -> None:
    one = profile([80 * MB] * 10, micro_batches=6)
    (model,) = one.models
    pairs = dataclasses.replace(one, models=(dataclasses.replace(model, together=2, group=4),))
    assert {choice.group for choice in choices(pairs.models[0], pairs, 0)} == {2, 4}


def test_the_last_round_takes_as_long_as_what_is_left() -> None:
    """Seven samples in groups of three are seven samples, where reading costs nothing."""
    one = dataclasses.replace(profile([8 * MB] * 4, micro_batches=7), read_rate=1e18, copy_rate=1e18)
    times = {round(found.seconds, 6) for found in choices(one.models[0], one, 0) if found.model.resident != "all"}
    assert len(times) == 1


def test_what_comes_and_goes_with_a_unit_leaves_out_what_is_always_there_or_waits() -> None:
    """Memory that is free may stay below the plan's peak less this: a unit that begins there still fits."""

    def line(unit: str, fixed: int, slope: int, workspace: int = 0, gathered: int = 0) -> Line:
        return Line(unit=unit, fixed=fixed * MB, slope=slope * MB, workspace=workspace * MB, gathered=gathered * MB)

    lines = (line("small", 110, 40), line("large", 180, 35, workspace=5, gathered=3), line("", 300, 90))
    one = dataclasses.replace(cut([MB], [1], MB, 0), lines=lines)
    assert one.working == 78 * MB
    (model,) = profile([8 * MB]).models
    assert dataclasses.replace(model, cuts=(one,)).working == 78 * MB
    assert dataclasses.replace(model, cuts=(one,)).holding(50 * MB).working == 78 * MB
