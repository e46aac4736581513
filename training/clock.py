"""Wall-clock budgets: phases that span several commands, a guard for this command, progress lines."""

import math
import time

from .ranks import agree, rank, world


class Clock:
    """elapsed: seconds that each phase has used so far, all commands together. stop_after: seconds of this command."""

    def __init__(self, budgets: dict[str, float], elapsed: dict[str, float], stop_after: float):
        self.budgets = budgets
        self.elapsed = {name: elapsed.get(name, 0.0) for name in budgets}
        self.born, self.stop_after = time.monotonic(), stop_after

    @property
    def left(self) -> float:
        """Seconds left of this command."""
        return self.stop_after - (time.monotonic() - self.born)

    def done(self, phase: str) -> bool:
        """Whether the phase has used its budget."""
        return self.elapsed[phase] >= self.budgets[phase]


class Phase:
    """The loop of one phase: ``while phase.go():`` ... ``phase.tick(loss, images)``. share runs from 0 to 1.

    finish: this command is the phase's last, so the budget ends with it.
    """

    def __init__(self, clock: Clock, name: str, every: float = 10.0, *, finish: bool = False):
        self.clock, self.name, self.every = clock, name, every
        if finish:
            clock.budgets[name] = clock.elapsed[name] + max(clock.left, 0.0)
        self.start, self.before = time.monotonic(), clock.elapsed[name]
        self.steps, self._images, self._mark, self._mark_images = 0, 0, self.start, 0

    @property
    def share(self) -> float:
        """How much of the phase's whole budget is used."""
        return min(1.0, self.clock.elapsed[self.name] / self.clock.budgets[self.name])

    def go(self) -> bool:
        """Account for the time; False when the phase's budget or the command's time is over, by rank 0's clock."""
        now = self.before + time.monotonic() - self.start
        now, left, budget = agree(now, self.clock.left, self.clock.budgets[self.name])
        self.clock.elapsed[self.name], self.clock.budgets[self.name] = now, budget
        return not self.clock.done(self.name) and left > 0

    def tick(self, images: int, **losses) -> None:
        """Count a step; print every ``every`` seconds (reads the losses, tensors, only then)."""
        self.steps += 1
        self._images += images * world()
        now = time.monotonic()
        if rank() or (now - self._mark < self.every and self.steps != 1):
            return
        rate = (self._images - self._mark_images) / max(now - self._mark, 1e-6)
        eta = min(self.clock.budgets[self.name] - self.clock.elapsed[self.name], self.clock.left)
        said = "  ".join(f"{k} {float(v):.4f}" for k, v in losses.items())
        print(f"[{self.name}] step {self.steps}  {said}  {rate:.0f} img/s  ETA {eta:.0f} s", flush=True)
        self._mark, self._mark_images = now, self._images

    def lr(self, peak: float, warmup: int, floor: float = 0.02) -> float:
        """Warm-up by steps, then a cosine by time down to ``floor * peak``."""
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.share))
        return peak * cosine * min(1.0, (self.steps + 1) / warmup)
