"""From a profile and a budget to a plan: what stays in memory, what is streamed, how many samples go at once.

No torch: the profile (:mod:`stages.profile`) was made on the meta device. Sizes are bytes, times are seconds. A
plan changes speed and memory, never the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MARGIN = 0.015  # of the budget, left free: what the profile cannot see
READ_RATE = 1.0e9  # bytes a second from a common SSD; only ranks plans
PINNED_RATE = 4.0e10  # bytes a second between a GPU and pinned memory
COPY_RATE = 6.0e9  # bytes a second out of the page cache, on a core that could compute


@dataclass(frozen=True, kw_only=True)
class Line:
    """Peak of activations while a unit runs: ``fixed + slope * micro_batches + workspace``."""

    unit: str
    fixed: int
    slope: int
    workspace: int

    def peak(self, micro_batches: int) -> int:
        return self.fixed + self.slope * micro_batches + self.workspace


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model cut into units of at most ``limit`` bytes (see ``split_units``): what one pass does, in order."""

    limit: int
    stage_limit: int = 0
    parked: tuple[str, ...] = ()  # units whose skip connections wait in host memory, of a GPU
    parked_bytes: int = 0  # of one micro-batch
    order: tuple[str, ...]
    nbytes: Mapping[str, int]
    flops: Mapping[str, int]  # of one micro-batch
    lines: tuple[Line, ...]

    @property
    def largest(self) -> int:
        return max(self.nbytes.values())

    def peak(self, micro_batches: int) -> int:
        return max(line.peak(micro_batches) for line in self.lines)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Cut:
        lines = tuple(Line(unit=u, fixed=f, slope=s, workspace=w) for u, f, s, w in data["lines"])
        order = tuple(data["order"])
        more: Any = {name: data[name] for name in ("stage_limit", "parked_bytes") if name in data}
        more["parked"] = tuple(data.get("parked", ()))
        return cls(limit=data["limit"], order=order, nbytes=data["nbytes"], flops=data["flops"], lines=lines, **more)


@dataclass(frozen=True, kw_only=True)
class StageProfile:
    """What is known of a stage before it runs.

    ``micro_batches`` go through the model in each of ``steps``; ``base`` is the process without weights, ``imports``
    its peak on the way there; ``extra`` is what the stage holds besides (canvas, pixels). On a GPU
    (:mod:`stages.workflow.device`) rates differ, starting a pass takes time, and units of at most ``keep`` bytes are
    not worth a copy. Without ``streams`` all weights stay.
    """

    name: str
    base: int
    imports: int
    extra: int
    weights: int
    micro_batch: int
    micro_batches: int
    steps: int
    cuts: tuple[Cut, ...] = field(repr=False)
    rate: float  # flops a second
    seconds: float  # besides the model: imports, files
    read_rate: float = READ_RATE
    copy_rate: float = COPY_RATE
    start_seconds: float = 0.0
    keep: int = 0
    streams: bool = True
    disk: int = 0  # bytes of scratch files while it runs

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> StageProfile:
        return cls(**{**data, "cuts": tuple(Cut.of(cut) for cut in data["cuts"])})

    @property
    def single_pass(self) -> bool:
        return self.steps * self.micro_batches == 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a stage will run. ``group`` is in micro-batches; see ``models.loading.open_model`` for the rest."""

    resident: str | tuple[str, ...]
    unit_limit: int
    stage_limit: int
    parked: tuple[str, ...]
    ring_bytes: int
    group: int
    order: tuple[str, ...]
    predicted_peak_rss_bytes: int
    predicted_seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class OverBudget(RuntimeError):
    """No plan fits; ``least`` is the smallest plan there is."""

    def __init__(self, stage: str, least: Plan, fastest: Plan, budget: int) -> None:
        self.stage, self.least, self.fastest, self.budget = stage, least, fastest, budget
        super().__init__(stage)


def pass_seconds(
    cut: Cut, group: int, ring: int, rate: float, read_rate: float = READ_RATE, copy_rate: float = COPY_RATE
) -> float:
    """One pass of ``group`` micro-batches with the next units read ahead into a ring of ``ring`` bytes."""
    ready: list[float] = []  # when each unit's weights are there
    done: list[float] = []  # when each unit has run
    disk = now = 0.0
    held, oldest = 0, 0
    for index, unit in enumerate(cut.order):
        size = cut.nbytes[unit]
        held += size
        while held > ring and oldest < index:  # the reader waits until earlier units have given their bytes back
            held -= cut.nbytes[cut.order[oldest]]
            disk = max(disk, done[oldest])
            oldest += 1
        disk += size / read_rate
        ready.append(disk)
        now = max(now, disk) + cut.flops.get(unit, 0) * group / rate + size / copy_rate
        done.append(now)
    return now


def _plans(profile: StageProfile, runner: int) -> Iterator[Plan]:
    def peak(held: int) -> int:
        return runner + max(profile.imports, profile.base + profile.extra + held)

    total = profile.micro_batches
    compute = sum(profile.cuts[0].flops.values()) * total * profile.steps / profile.rate
    whole = profile.cuts[0]
    for group in _groups(total) if profile.start_seconds else [1]:
        starts = profile.steps * -(-total // group) * profile.start_seconds
        yield Plan(
            resident="all",
            unit_limit=whole.limit,
            stage_limit=whole.stage_limit,
            parked=(),
            ring_bytes=0,
            group=group,
            order=whole.order,
            predicted_peak_rss_bytes=peak(profile.weights + whole.peak(group)),
            predicted_seconds=profile.seconds + compute + profile.weights / READ_RATE + starts,
        )
    for cut in profile.cuts if profile.streams else ():
        kept = tuple(name for name in cut.order if cut.nbytes[name] <= profile.keep)
        pair = max(
            cut.nbytes[a] + cut.nbytes[b] for a, b in zip(cut.order, (*cut.order[1:], cut.order[0]), strict=True)
        )
        more = (3 * cut.largest, 4 * cut.largest) if profile.start_seconds else ()
        for ring in dict.fromkeys((cut.largest, pair, 2 * cut.largest, *more)):
            for group in _groups(total):
                rounds = -(-total // group)
                rates = profile.rate, profile.read_rate, profile.copy_rate
                seconds = pass_seconds(cut, min(group, total), ring, *rates) + profile.start_seconds
                seconds = profile.steps * (rounds * seconds + total * 2 * cut.parked_bytes / PINNED_RATE)
                yield Plan(
                    resident=kept,
                    unit_limit=cut.limit,
                    stage_limit=cut.stage_limit,
                    parked=cut.parked,
                    ring_bytes=ring,
                    group=group,
                    order=cut.order,
                    predicted_peak_rss_bytes=peak(ring + sum(cut.nbytes[name] for name in kept) + cut.peak(group)),
                    predicted_seconds=profile.seconds + seconds,
                )


def _groups(total: int) -> list[int]:
    """Group sizes worth a try: the smallest that makes each number of rounds."""
    return sorted({-(-total // rounds) for rounds in range(1, total + 1)})


def plan_stage(profile: StageProfile, budget: int, runner: int, weights: str = "auto") -> Plan:
    """The fastest plan whose predicted peak fits ``budget`` (runner and stage together).

    Of plans within 1% of the fastest, the one that takes least memory. ``weights``: ``streamed`` or ``resident`` leaves
    only such plans; a model that cannot stream stays resident all the same.

    Raises:
        OverBudget: nothing fits; it holds the smallest plan.
    """
    plans = list(_plans(profile, runner))
    if weights == "resident" or (weights == "streamed" and profile.streams):
        plans = [plan for plan in plans if (plan.resident == "all") == (weights == "resident")]
    fitting = [plan for plan in plans if plan.predicted_peak_rss_bytes <= budget * (1 - MARGIN)]
    fastest = min(plans, key=lambda plan: plan.predicted_seconds)
    if not fitting:
        raise OverBudget(profile.name, min(plans, key=lambda plan: plan.predicted_peak_rss_bytes), fastest, budget)
    best = min(plan.predicted_seconds for plan in fitting)
    near = [plan for plan in fitting if plan.predicted_seconds <= best * 1.01]
    return min(near, key=lambda plan: plan.predicted_peak_rss_bytes)


def plan_run(profiles: Sequence[StageProfile], budget: int, runner: int, weights: str = "auto") -> dict[str, Plan]:
    """A plan for every stage, see ``plan_stage``.

    Raises:
        OverBudget: of the stage that needs most, so that its ``least`` is enough for all.
    """
    plans, failures = {}, []
    for profile in profiles:
        try:
            plans[profile.name] = plan_stage(profile, budget, runner, weights)
        except OverBudget as error:
            failures.append(error)
    if failures:
        raise max(failures, key=lambda error: error.least.predicted_peak_rss_bytes)
    return plans
