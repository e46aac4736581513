"""Samples side by side: what comes of each, who computes it with how many threads, and what that is planned to take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from stages.families.sd import FAMILY
from stages.memory.lanes import Lanes, lanes_for, part_of
from stages.memory.micro import micro_batched
from stages.memory.trace import trace
from stages.memory.units import Unit
from stages.models.checkpoint import Checkpoint
from stages.models.loading import open_model
from stages.techniques.base import Technique
from stages.techniques.channels_last import ChannelsLast
from stages.techniques.quantize import Quantize

pytestmark = pytest.mark.torch


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("micro_batch", "threads", "part", "lanes"),
    [(2, 2, 1, 2), (2, 1, 1, 1), (2, 8, 1, 2), (16, 2, 8, 2), (16, 8, 8, 2), (1, 8, 1, 1), (5, 4, 2, 3), (0, 2, 1, 1)],
)
def test_a_part_is_of_the_micro_batch_and_lanes_of_the_threads(
    micro_batch: int, threads: int, part: int, lanes: int
) -> None:
    assert (part_of(micro_batch), lanes_for(micro_batch, threads)) == (part, lanes)


def test_each_item_is_worked_on_once_with_a_share_of_the_threads(two_threads: None) -> None:
    lanes, seen, together = Lanes(2), [], threading.Barrier(2, timeout=20)

    def work(item: int) -> None:
        if item < 2:
            together.wait()  # both are at it, or this breaks
        seen.append((item, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    with torch.inference_mode():
        lanes.each(range(5), work)
    lanes.close()
    assert sorted(seen) == [(item, 1, True) for item in range(5)]
    assert torch.get_num_threads() == 2


def test_odd_threads_are_shared_out_too() -> None:
    with patch.object(torch, "get_num_threads", return_value=3):
        lanes = Lanes(2)
    assert [lanes.share(0), lanes.share(1)] == [2, 1]
    lanes.close()


def test_what_a_lane_raises_is_raised_when_all_have_ended(two_threads: None) -> None:
    lanes, done, together = Lanes(2), [], threading.Barrier(2, timeout=20)

    def work(item: int) -> None:
        together.wait()
        if threading.current_thread().name.startswith("lane"):
            raise ValueError(f"item {item}")
        done.append(item)

    with pytest.raises(ValueError, match="item"):
        lanes.each(range(2), work)
    assert len(done) == 1 and torch.get_num_threads() == 2
    lanes.close()


def test_results_lie_where_their_samples_do(two_threads: None) -> None:
    first = threading.Event()

    def forward(x: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        if x[0, 0] == 0:
            first.wait(20)  # the lane that began first ends last
        else:
            first.set()
        return x * scale, x.sum(dim=1)

    x, lanes = torch.arange(10.0).view(5, 2), Lanes(2)
    product, total = micro_batched(forward, (x, 3), {}, 2, lanes=lanes)
    lanes.close()
    assert torch.equal(product, 3 * x) and torch.equal(total, x.sum(dim=1))


WAYS: dict[str, Callable[[], tuple[Technique, ...]]] = {
    "plain": lambda: (ChannelsLast(),),
    "int8": lambda: (ChannelsLast(), Quantize("int8")),
}


@pytest.mark.parametrize("way", WAYS)
def test_lanes_give_the_bits_of_one_thread_that_takes_the_same_parts(
    small: Callable[[str], Path], two_threads: None, way: str
) -> None:
    component = Checkpoint.open(str(small("sd15")), components=("unet",)).component("unet")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((6, 4, 16, 16), generator=generator)
    states = torch.randn((6, 77, component.config["cross_attention_dim"]), generator=generator)
    options: dict[str, Any] = {"dtype": torch.float32, "blocks": FAMILY.blocks("unet"), "micro_batch": 2}

    def predicted(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        with open_model(component, techniques=WAYS[way](), **options) as streamer:
            model: Any = streamer.model
            return model(image, torch.tensor(500.0), encoder_hidden_states=states, return_dict=False)[0]

    alone = predicted(1)
    assert torch.equal(predicted(2), alone) and alone.std() > 0


class Widens(nn.Module):
    """Activations of 16 times its input at most."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 16).relu().view(-1, 16, x.shape[1]).mean(dim=1)


def test_activations_of_lanes_are_planned_side_by_side() -> None:
    network = nn.Sequential(Widens())
    units = [Unit(name="0", module=network[0], slots=(), start=0, end=0)]

    def peak(samples: int, part: int, lanes: int) -> int:
        found = trace(network, units, lambda: network(torch.empty(samples, 1000, device="meta")), 2, (), part, lanes)
        return max(event.peak for event in found.events)

    row, inputs = 4000, 4 * 4000
    assert peak(4, 2, 1) == inputs + 2 * 32 * row + 4 * row  # two samples of 16 rows, twice, and the result of all four
    assert peak(4, 1, 2) == peak(4, 2, 1)
    assert peak(4, 1, 1) == inputs + 32 * row + 4 * row
    assert peak(2, 1, 2) == 2 * row + 2 * 32 * row + 2 * row, "there are two parts, so they are gathered"
