"""From a profile and a budget to a choice: what stays in memory, what is streamed, how many samples go at once.

No torch: the profile (:mod:`stages.profile`) was made on the meta device. Sizes are bytes, times are seconds. A
choice changes speed and memory, never the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stages.plans import ModelPlan

MARGIN = 0.015  # of the budget, left free: what the profile cannot see
READ_RATE = 1.0e9  # bytes a second from a common SSD; only ranks plans
PINNED_RATE = 5.2e10  # bytes a second between a GPU and pinned memory (an H200)
COPY_RATE = 6.0e9  # bytes a second out of the page cache, on a core that could compute
# Bytes a second of what units give and of what is made between them, of the whole group: it lies in new pages, and no
# lanes share its operations. Of Z-Image's feed-forwards, cut into leaves and whole (``benchmarks streaming z_image``).
GIVEN_RATE = 7.5e8


@dataclass(frozen=True, kw_only=True)
class Line:
    """Peak of activations while a unit runs: ``fixed + slope * micro_batches + workspace``; where there are several
    ``gathered`` for each of them too, of the result that waits for the last."""

    unit: str
    fixed: int
    slope: int
    workspace: int
    gathered: int = 0

    def peak(self, micro_batches: int) -> int:
        gathered = self.gathered * micro_batches if micro_batches > 1 else 0
        return self.fixed + self.slope * micro_batches + self.workspace + gathered


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model cut into units of at most ``limit`` bytes (:mod:`stages.memory.units`): what one pass does, in order."""

    limit: int
    stage_limit: int = 0
    parked: tuple[str, ...] = ()  # units whose skip connections wait in host memory, of a GPU
    parked_bytes: int = 0  # of one micro-batch
    given: int = 0  # bytes of what its units give and of what is made between them, of one micro-batch
    order: tuple[str, ...]
    nbytes: Mapping[str, int]
    flops: Mapping[str, int]  # of one micro-batch
    lines: tuple[Line, ...]
    kept: tuple[str, ...] = ()  # units that every pass needs, where some passes leave the others out

    @property
    def largest(self) -> int:
        return max(self.nbytes.values())

    @property
    def working(self) -> int:
        """Bytes that a unit takes for one micro-batch besides what is there all along or waits for its turn."""
        units = [line for line in self.lines if line.unit]  # without one: between units
        least = min((line.fixed for line in units), default=0)
        return max((line.fixed - least + line.workspace + line.gathered for line in units), default=0)

    def peak(self, micro_batches: int) -> int:
        return max(line.peak(micro_batches) for line in self.lines)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Cut:
        lines = tuple(Line(**line) for line in data["lines"])
        names = {key: tuple(data[key]) for key in ("order", "parked", "kept")}
        return cls(**{**data, **names, "lines": lines})


def joined(cuts: Sequence[Cut]) -> Cut:
    """Cuts of parts of one model that run one after the other."""
    return Cut(
        limit=max(cut.limit for cut in cuts),
        given=sum(cut.given for cut in cuts),
        order=tuple(name for cut in cuts for name in cut.order),
        nbytes={name: size for cut in cuts for name, size in cut.nbytes.items()},
        flops={name: count for cut in cuts for name, count in cut.flops.items()},
        lines=tuple(line for cut in cuts for line in cut.lines),
    )


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """What is known of one model of a stage before it runs: ``micro_batches`` go through it in each of ``steps``.

    Without ``streams`` all weights stay. ``ordered``: every pass calls the same units in the same order. Units of at
    most ``keep`` bytes are not worth a copy. ``group``: the most micro-batches that the stage hands over at once (0:
    any number), ``together``: the least (both halves of a guided tile). ``quantised``: its files hold fewer bits
    than it computes with, and are read at their size.
    ``cached`` of the steps run a cut's ``kept`` units only, with ``state`` bytes that a sample left for them.
    """

    component: str
    weights: int
    micro_batch: int
    micro_batches: int
    steps: int
    cuts: tuple[Cut, ...] = field(repr=False)
    streams: bool = True
    ordered: bool = True
    keep: int = 0
    group: int = 0
    together: int = 1
    quantised: bool = False
    cached: int = 0
    state: int = 0
    placement: Mapping[str, int] = field(default_factory=dict)
    gpus: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def single_pass(self) -> bool:
        return self.steps * self.micro_batches == 1

    @property
    def working(self) -> int:
        """Bytes that come and go with a unit's micro-batch, where these are most, in whatever cut."""
        return max((cut.working for cut in self.cuts), default=0)

    def holding(self, nbytes: int) -> ModelProfile:
        """With so many bytes more, whichever unit runs."""

        def more(cut: Cut) -> Cut:
            return replace(cut, lines=tuple(replace(line, fixed=line.fixed + nbytes) for line in cut.lines))

        return replace(self, cuts=tuple(map(more, self.cuts)))

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ModelProfile:
        return cls(**{**data, "cuts": tuple(Cut.of(cut) for cut in data["cuts"])})


@dataclass(frozen=True, kw_only=True)
class StageProfile:
    """What is known of a stage before it runs.

    ``models`` are open one after the other; ``base`` is the process without weights, ``imports`` its peak on the way
    there; ``extra`` is what the stage holds besides (canvas, pixels). On a GPU (:mod:`stages.workflow.device`) rates
    differ, and starting a pass takes time.
    """

    name: str
    base: int
    imports: int
    extra: int
    models: tuple[ModelProfile, ...]
    rate: float  # flops a second
    seconds: float  # besides the models: imports, files
    read_rate: float = READ_RATE
    copy_rate: float = COPY_RATE
    given_rate: float = GIVEN_RATE
    start_seconds: float = 0.0
    disk: int = 0  # bytes of scratch files while it runs

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> StageProfile:
        """From what :meth:`as_json` gave."""
        return cls(**{**data, "models": tuple(ModelProfile.of(model) for model in data["models"])})

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one model could run: its plan, ``group`` micro-batches at a time, and what that takes."""

    model: ModelPlan
    group: int
    peak: int  # bytes, runner and stage
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a stage runs with: a choice for each of its models, by component."""

    stage: str
    choices: Mapping[str, Choice]
    seconds: float  # all of it

    @property
    def peak(self) -> int:
        """Bytes: models are open one after the other."""
        return max(choice.peak for choice in self.choices.values())


class OverBudget(RuntimeError):
    """Nothing fits; ``least`` takes the least memory that there is."""

    def __init__(self, stage: str, least: Chosen, fastest: Chosen, budget: int) -> None:
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


def choices(model: ModelProfile, stage: StageProfile, runner: int) -> Iterator[Choice]:
    """All ways to run one model of a stage."""

    def peak(held: int) -> int:
        return runner + max(stage.imports, stage.base + stage.extra + held)

    def again(cut: Cut) -> float:
        """Seconds of one micro-batch in a step that runs what is kept only."""
        return sum(cut.flops.get(name, 0) for name in cut.kept) / stage.rate

    total, full = model.micro_batches, model.steps - model.cached
    whole = model.cuts[0]
    compute = total * (sum(whole.flops.values()) * full / stage.rate + again(whole) * model.cached)
    for group in _groups(model) if stage.start_seconds else [model.together]:
        starts = model.steps * -(-total // group) * stage.start_seconds
        yield Choice(
            model=ModelPlan(unit_limit=whole.limit, stage_limit=whole.stage_limit, order=whole.order),
            group=group,
            peak=peak(model.weights + whole.peak(group)),
            seconds=compute + model.weights / READ_RATE + starts + total * full * whole.given / stage.given_rate,
        )
    for cut in model.cuts if model.streams else ():
        kept = tuple(name for name in cut.order if cut.nbytes[name] <= model.keep or name in cut.kept)
        pair = max(
            cut.nbytes[a] + cut.nbytes[b] for a, b in zip(cut.order, (*cut.order[1:], cut.order[0]), strict=True)
        )
        more = (3 * cut.largest, 4 * cut.largest) if stage.start_seconds else ()
        moved = total * (2 * cut.parked_bytes / PINNED_RATE + cut.given / stage.given_rate)
        for ring in dict.fromkeys((cut.largest, pair, 2 * cut.largest, *more)):
            for group in _groups(model):
                rounds, rest = divmod(total, group)  # the last round has what is left
                rates = stage.rate, stage.read_rate, stage.copy_rate
                seconds = rounds * pass_seconds(cut, group, ring, *rates) if rounds else 0.0
                seconds += pass_seconds(cut, rest, ring, *rates) if rest else 0.0
                starts = (rounds + bool(rest)) * stage.start_seconds
                cached = starts + total * again(cut)
                yield Choice(
                    model=ModelPlan(
                        resident=kept,
                        unit_limit=cut.limit,
                        stage_limit=cut.stage_limit,
                        parked=cut.parked,
                        ring_bytes=ring,
                        order=cut.order,
                    ),
                    group=group,
                    peak=peak(ring + sum(cut.nbytes[name] for name in kept) + cut.peak(group)),
                    seconds=full * (seconds + starts + moved) + model.cached * cached,
                )


def _groups(model: ModelProfile) -> list[int]:
    """Group sizes worth a try: the smallest that makes each number of rounds."""
    total = -(-model.micro_batches // model.together)
    found = {-(-total // rounds) * model.together for rounds in range(1, total + 1)}
    return sorted(size for size in found if not model.group or size <= model.group)


def plan_stage(stage: StageProfile, budget: int, runner: int, weights: str = "auto") -> Chosen:
    """The fastest way whose predicted peak fits ``budget`` (runner and stage together).

    Of ways within 1% of the fastest, the one that takes least memory. ``weights``: ``streamed`` or ``resident`` leaves
    only such ones; a model that cannot stream stays resident all the same.

    Raises:
        OverBudget: nothing fits.
    """
    best: dict[str, Choice] = {}
    least: dict[str, Choice] = {}
    fastest: dict[str, Choice] = {}
    for model in stage.models:
        found = list(choices(model, stage, runner))
        if weights == "resident" or (weights == "streamed" and model.streams):
            found = [one for one in found if (one.model.resident == "all") == (weights == "resident")]
        least[model.component] = min(found, key=lambda one: one.peak)
        fastest[model.component] = min(found, key=lambda one: one.seconds)
        fitting = [one for one in found if one.peak <= budget * (1 - MARGIN)]
        if fitting:
            near = min(one.seconds for one in fitting) * 1.01
            best[model.component] = min((one for one in fitting if one.seconds <= near), key=lambda one: one.peak)

    def chosen(each: Mapping[str, Choice]) -> Chosen:
        seconds = stage.seconds + sum(one.seconds for one in each.values())
        return Chosen(stage=stage.name, choices=dict(each), seconds=seconds)

    if len(best) < len(stage.models):
        raise OverBudget(stage.name, chosen(least), chosen(fastest), budget)
    return chosen(best)


def plan_run(stages: Sequence[StageProfile], budget: int, runner: int, weights: str = "auto") -> dict[str, Chosen]:
    """For every stage, see ``plan_stage``.

    Raises:
        OverBudget: of the stage that needs most, so that its ``least`` is enough for all.
    """
    found, failures = {}, []
    for stage in stages:
        try:
            found[stage.name] = plan_stage(stage, budget, runner, weights)
        except OverBudget as error:
            failures.append(error)
    if failures:
        raise max(failures, key=lambda error: error.least.peak)
    return found
