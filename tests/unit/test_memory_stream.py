"""Streamed weights give the same bits as resident ones, whatever the cut, ring, group and order of calls."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import opening
import pytest
import torch
from dtypes import OTHER
from opening import built
from safetensors.torch import load_file
from torch import Tensor

from stages.memory.layout import Layout
from stages.memory.micro import micro_batched
from stages.memory.prepared import PreparedSource
from stages.memory.source import CheckpointSource
from stages.memory.stream import WeightStreamer
from stages.memory.tensors import write_tensors
from stages.memory.units import split_units
from stages.models.checkpoint import Checkpoint
from stages.models.component import Component
from stages.models.loading import prepared
from stages.vae.shared import SharedStatistics

DTYPES = [torch.float32, OTHER]
RINGS = ["largest", "pair", "all"]


@pytest.fixture(scope="module")
def folder(small: Callable[[str], Path]) -> Path:
    return small("sd15")


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sizes(component: Component, dtype: torch.dtype, cut: str, ring: str) -> tuple[int, int]:
    """(``unit_limit``, ``ring_bytes``) of a plan."""
    network, layout, _, blocks = built(component, dtype)
    leaves = split_units(network, layout, blocks, 0)
    limit = layout.nbytes if cut == "block" else max(unit.nbytes for unit in leaves)
    nbytes = [unit.nbytes for unit in split_units(network, layout, blocks, limit)]
    neighbours = max(a + b for a, b in zip(nbytes, [*nbytes[1:], nbytes[0]], strict=True))
    return limit, {"largest": max(nbytes), "pair": neighbours, "all": layout.nbytes}[ring]


@contextmanager
def opened(component: Component, dtype: torch.dtype, plan: dict[str, Any], micro_batch: int = 2, **more: Any) -> Any:
    with opening.opened(component, dtype, plan, micro_batch=micro_batch, **more) as streamer:
        yield streamer
    assert not [thread for thread in threading.enumerate() if thread.name == "weights"]


def predict(unet: Any, samples: Tensor, embeds: Tensor, group: int) -> Tensor:
    samples, embeds = samples.to(unet.dtype).to(memory_format=torch.channels_last), embeds.to(unet.dtype)
    found = [
        unet(part, torch.tensor(400), encoder_hidden_states=text, return_dict=False)[0]
        for part, text in zip(samples.split(group), embeds.split(group), strict=True)
    ]
    return torch.cat(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", ["block", "leaf"])
def test_unet(folder: Path, cut: str, dtype: torch.dtype) -> None:
    component = Checkpoint.open(str(folder)).component("unet")
    samples, embeds = seeded(6, 4, 16, 16), seeded(6, 77, 32, seed=1)
    with opened(component, dtype, {}) as streamer:
        expected = predict(streamer.model, samples, embeds, 6)
    assert expected.isfinite().all() and expected.std() > 0.01
    for ring in RINGS:
        limit, nbytes = sizes(component, dtype, cut, ring)
        plan = {"resident": [], "unit_limit": limit, "ring_bytes": nbytes}
        with opened(component, dtype, plan) as streamer:
            for group in (6, 4, 2):  # groups that are whole micro-batches meet the same kernels
                assert torch.equal(predict(streamer.model, samples, embeds, group), expected), (ring, group)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_one_by_one_at_every_cut(small: Callable[[str], Path], dtype: torch.dtype) -> None:
    """As of large tiles, whose two halves go one after the other; transformers that begin with a linear layer."""
    component = Checkpoint.open(str(small("sd21"))).component("unet")
    samples, embeds = seeded(4, 4, 16, 16), seeded(4, 77, 32, seed=1)
    with opened(component, dtype, {}, 1) as streamer:
        expected = predict(streamer.model, samples, embeds, 1)
        assert torch.equal(predict(streamer.model, samples, embeds, 4), expected)
    for cut in ("block", "leaf"):
        limit, nbytes = sizes(component, dtype, cut, "pair")
        plan = {"resident": [], "unit_limit": limit, "ring_bytes": nbytes}
        with opened(component, dtype, plan, 1) as streamer:
            for group in (4, 2, 1):
                assert torch.equal(predict(streamer.model, samples, embeds, group), expected), (cut, group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [8, 12])
def test_cuts_and_groups_down_to_feature_maps_of_one_pixel(folder: Path, side: int, dtype: torch.dtype) -> None:
    """There a tensor has two equal layouts, and kernels round by the one that it says it has."""
    component = Checkpoint.open(str(folder)).component("unet")
    samples, embeds = seeded(6, 4, side, side), seeded(6, 77, 32, seed=1)
    with opened(component, dtype, {}) as streamer:
        expected = predict(streamer.model, samples, embeds, 6)
        for group in (2, 4):
            assert torch.equal(predict(streamer.model, samples, embeds, group), expected), group
    for cut in ("block", "leaf"):
        limit, nbytes = sizes(component, dtype, cut, "pair")
        with opened(component, dtype, {"resident": [], "unit_limit": limit, "ring_bytes": nbytes}) as streamer:
            for group in (2, 4, 6):
                assert torch.equal(predict(streamer.model, samples, embeds, group), expected), (cut, group)


def test_some_units_resident_others_streamed(folder: Path) -> None:
    component = Checkpoint.open(str(folder)).component("unet")
    samples, embeds = seeded(4, 4, 8, 8), seeded(4, 77, 32, seed=1)
    limit, nbytes = sizes(component, torch.float32, "block", "largest")
    marks: list[str] = []
    with opened(component, torch.float32, {}) as streamer:
        expected = predict(streamer.model, samples, embeds, 4)
    plan = {"resident": ["conv_in", "mid_block.resnets.0"], "unit_limit": limit, "ring_bytes": nbytes}
    with opened(component, torch.float32, plan, mark=marks.append) as streamer:
        assert streamer.model.conv_in.weight.device.type == "cpu"
        assert streamer.model.conv_out.weight.is_meta
        assert torch.equal(predict(streamer.model, samples, embeds, 4), expected)
        assert streamer.model.conv_out.weight.is_meta  # given back
    assert {"conv_in", "mid_block.resnets.0", "conv_out"} <= set(marks)


@pytest.mark.parametrize("cut", ["block", "leaf"])
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_text_encoder(small: Callable[[str], Path], kind: str, cut: str) -> None:
    component = Checkpoint.open(str(small(kind))).component("text_encoder")
    ids = torch.arange(154).view(2, 77)
    with opened(component, torch.float32, {}, 0, channels_last=False) as streamer:
        expected = streamer.model(ids, output_hidden_states=True)
    for ring in RINGS:
        limit, nbytes = sizes(component, torch.float32, cut, ring)
        plan = {"resident": [], "unit_limit": limit, "ring_bytes": nbytes}
        with opened(component, torch.float32, plan, 0, channels_last=False) as streamer:
            got = streamer.model(ids, output_hidden_states=True)
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", ["block", "leaf"])
def test_vae(folder: Path, cut: str, dtype: torch.dtype) -> None:
    """Encode and decode, alone, with statistics applied, and under ``hold``."""
    component = Checkpoint.open(str(folder)).component("vae")
    latents, pixels = seeded(1, 4, 8, 12).to(dtype), seeded(1, 3, 64, 96, seed=1).clamp(-1, 1).to(dtype)

    def passes(streamer: WeightStreamer) -> list[Tensor]:
        vae: Any = streamer.model
        statistics = SharedStatistics()
        with statistics.collect(vae):
            collected = vae.decode(latents[..., :4], return_dict=False)[0]
        with statistics.applied(vae):
            applied = vae.decode(latents, return_dict=False)[0]
        encoded = vae.encode(pixels, return_dict=False)[0].mode()
        decoded = vae.decode(latents, return_dict=False)[0]
        with streamer.hold(vae.decoder):
            held = [vae.decode(latents, return_dict=False)[0] for _ in range(2)]
            assert not vae.decoder.conv_out.weight.is_meta
        values = [
            tensor for pairs in (statistics.norms, statistics.attentions) for pair in pairs.values() for tensor in pair
        ]
        return [collected, applied, encoded, decoded, *held, vae.decode(latents, return_dict=False)[0], *values]

    with opened(component, dtype, {}, 0) as streamer:
        expected = passes(streamer)
        assert torch.equal(expected[3], expected[4])
        assert not torch.equal(expected[1], expected[3])
    for ring in RINGS:
        limit, nbytes = sizes(component, dtype, cut, ring)
        with opened(component, dtype, {"resident": [], "unit_limit": limit, "ring_bytes": nbytes}, 0) as streamer:
            got = passes(streamer)
            assert streamer.model.decoder.conv_out.weight.is_meta
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), ring


def test_units_called_out_of_order_and_twice(folder: Path) -> None:
    component = Checkpoint.open(str(folder)).component("unet")
    limit, nbytes = sizes(component, torch.float32, "leaf", "largest")
    image, time = seeded(2, 4, 8, 8), seeded(2, 16)
    features = seeded(2, 16, 8, 8)

    def calls(unet: Any) -> list[Tensor]:
        return [
            *(unet.conv_out(features), unet.conv_in(image), unet.conv_in(image), unet.time_embedding(time)),
            *(unet.conv_norm_out(features), unet.conv_in(image), unet.conv_out(features)),
        ]

    with opened(component, torch.float32, {}) as streamer:
        expected = calls(streamer.model)
    with opened(component, torch.float32, {"resident": [], "unit_limit": limit, "ring_bytes": nbytes}) as streamer:
        for _ in range(3):
            got = calls(streamer.model)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_pass_that_fails_leaves_the_streamer_usable(folder: Path) -> None:
    component = Checkpoint.open(str(folder)).component("unet")
    limit, nbytes = sizes(component, torch.float32, "block", "pair")
    samples, embeds = seeded(2, 4, 8, 8), seeded(2, 77, 32, seed=1)
    with opened(component, torch.float32, {"resident": [], "unit_limit": limit, "ring_bytes": nbytes}) as streamer:
        expected = predict(streamer.model, samples, embeds, 2)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            predict(streamer.model, samples, embeds[..., :7], 2)
        assert torch.equal(predict(streamer.model, samples, embeds, 2), expected)


def test_time_that_a_pass_stands_still_for_weights_is_counted(folder: Path) -> None:
    """A reader that takes its time; weights that are there are not waited for."""
    component = Checkpoint.open(str(folder)).component("unet")
    limit, nbytes = sizes(component, torch.float32, "block", "largest")
    with opened(component, torch.float32, {"resident": [], "unit_limit": limit, "ring_bytes": nbytes}) as streamer:
        streamer.source = Slow(streamer.source)
        units = len(streamer._streamed)
        predict(streamer.model, seeded(2, 4, 16, 16), seeded(2, 77, 32), 2)
        assert streamer.waited > 0.02 * (units - 2)  # the first may have been read before
    with opened(component, torch.float32, {}) as streamer:
        predict(streamer.model, seeded(2, 4, 16, 16), seeded(2, 77, 32), 2)
        assert streamer.waited == 0


class Slow:
    """A source that takes its time."""

    def __init__(self, source: CheckpointSource) -> None:
        self.source = source

    def read(self, *arguments: Any) -> None:
        time.sleep(0.02)
        self.source.read(*arguments)

    def close(self) -> None:
        self.source.close()


class Broken:
    """A source whose third read fails."""

    def __init__(self, source: CheckpointSource) -> None:
        self.source, self.count = source, 0

    def read(self, *arguments: Any) -> None:
        self.count += 1
        if self.count == 3:
            raise OSError("the disk is gone")
        self.source.read(*arguments)

    def close(self) -> None:
        self.source.close()


def test_a_reader_that_fails_is_heard_by_name(folder: Path) -> None:
    component = Checkpoint.open(str(folder)).component("vae")
    model, layout, _, blocks = built(component)
    units = split_units(model, layout, blocks, layout.nbytes)
    source = Broken(CheckpointSource(component.tensors))
    streamer = WeightStreamer(model, layout=layout, units=units, source=source, ring_bytes=layout.nbytes)
    failing = units[2].name
    with torch.inference_mode(), streamer, pytest.raises(RuntimeError, match=rf"{failing} failed: the disk is gone"):
        model.encode(seeded(1, 3, 64, 64))
    assert not [thread for thread in threading.enumerate() if thread.name == "weights"]


def test_an_error_inside_is_not_hidden_by_closing(folder: Path, tmp_path: Path) -> None:
    component = Checkpoint.open(str(folder)).component("unet")
    limit, nbytes = sizes(component, torch.float32, "block", "pair")
    plan = {"resident": [], "unit_limit": limit, "ring_bytes": nbytes, "prepared": str(tmp_path / "unet.bin")}

    def fails() -> None:
        with opened(component, torch.float32, plan) as streamer:
            streamer.close()  # a second close, at the end of the block, has nothing to do
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()


def test_a_ring_that_cannot_hold_the_largest_unit_is_refused(folder: Path) -> None:
    component = Checkpoint.open(str(folder)).component("unet")
    limit, nbytes = sizes(component, torch.float32, "block", "largest")
    plan = {"resident": [], "unit_limit": limit, "ring_bytes": nbytes - 1}
    said = f"the ring holds {nbytes - 1} bytes, but the largest unit has {nbytes}"
    with pytest.raises(ValueError, match=said), opened(component, torch.float32, plan):
        raise AssertionError("it was opened")


def bytes_of(source: CheckpointSource | PreparedSource, layout: Layout) -> Tensor:
    packed = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for slot in layout.slots.values():
        end = slot.offset + slot.nbytes
        source.read([slot], slot.offset, packed[slot.offset : end])
    return packed


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["fp32", "fp16"])
def test_a_prepared_copy_is_the_checkpoints_bytes(
    small: Callable[[str], Path], tmp_path: Path, stored: str, dtype: torch.dtype, channels_last: bool
) -> None:
    folder = small("sd15") if stored == "fp32" else halves(tmp_path / "model", small("sd15"))
    component = Checkpoint.open(str(folder)).component("unet")
    made = built(component, dtype, channels_last=channels_last)
    layout = made.layout
    source = CheckpointSource(component.tensors)
    expected = bytes_of(source, layout)
    source.close()
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, slot in layout.slots.items():
        assert torch.equal(slot.view(expected, 0), weights[name].to(dtype))
    file = prepared(made, (), tmp_path / "copies" / "unet.bin")
    copy = PreparedSource(file, layout)
    assert torch.equal(bytes_of(copy, layout), expected)
    copy.close()


def halves(to: Path, folder: Path) -> Path:
    """The same checkpoint, stored in float16."""
    shutil.copytree(folder, to)
    file = to / "unet" / "diffusion_pytorch_model.safetensors"
    write_tensors(file, {name: tensor.half() for name, tensor in load_file(file).items()})
    return to


def test_a_prepared_copy_that_is_torn_is_made_again(folder: Path, tmp_path: Path) -> None:
    component = Checkpoint.open(str(folder)).component("unet")
    made = built(component, OTHER)
    layout = made.layout
    file = prepared(made, (), tmp_path / "unet.bin")
    whole = file.read_bytes()
    written = file.stat().st_mtime_ns
    assert prepared(made, (), file).stat().st_mtime_ns == written  # kept
    file.write_bytes(whole[:-64])
    with pytest.raises(ValueError, match="Delete it"):
        PreparedSource(file, layout)
    assert prepared(made, (), file).read_bytes() == whole


@pytest.mark.parametrize("place", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("piece", [1 << 20, 4096])
def test_a_flipped_bit_in_a_prepared_copy_is_seen_and_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: float, piece: int
) -> None:
    monkeypatch.setattr("stages.memory.prepared.PIECE", piece)
    component = Checkpoint.open(str(folder)).component("unet")
    samples, embeds = seeded(4, 4, 8, 8), seeded(4, 77, 32, seed=1)
    limit, nbytes = sizes(component, OTHER, "block", "pair")
    with opened(component, OTHER, {}) as streamer:
        expected = predict(streamer.model, samples, embeds, 2)
    file, said = tmp_path / "unet.bin", []
    plan = {"resident": [], "unit_limit": limit, "ring_bytes": nbytes, "prepared": str(file)}
    with opened(component, OTHER, plan, note=said.append):
        pass
    whole = bytearray(file.read_bytes())
    whole[int(place * built(component, OTHER).layout.nbytes)] ^= 0x40
    file.write_bytes(whole)
    with opened(component, OTHER, plan, note=said.append) as streamer:
        for _ in range(2):
            assert torch.equal(predict(streamer.model, samples, embeds, 2), expected)
    assert len(said) == 1 and "unet.bin is damaged" in said[0] and not file.exists()
    with opened(component, OTHER, plan, note=said.append) as streamer:  # made again
        assert torch.equal(predict(streamer.model, samples, embeds, 2), expected)
    assert len(said) == 1 and file.exists()


def test_a_model_streamed_from_its_prepared_copy(folder: Path, tmp_path: Path) -> None:
    component = Checkpoint.open(str(folder)).component("unet")
    samples, embeds = seeded(4, 4, 8, 8), seeded(4, 77, 32, seed=1)
    limit, nbytes = sizes(component, OTHER, "leaf", "pair")
    with opened(component, OTHER, {}) as streamer:
        expected = predict(streamer.model, samples, embeds, 4)
    plan = {"resident": [], "unit_limit": limit, "ring_bytes": nbytes, "prepared": str(tmp_path / "unet.bin")}
    for _ in range(2):  # made, then read
        with opened(component, OTHER, plan) as streamer:
            assert torch.equal(predict(streamer.model, samples, embeds, 4), expected)


def test_micro_batches_slice_what_has_the_batch_and_pass_on_the_rest() -> None:
    seen = []

    def forward(x: Tensor, scale: Tensor, flag: bool, *, row: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(x.shape))
        assert row.shape == (1, 3) and flag
        return x * scale[:, None], x + row

    x, scale, row = seeded(5, 3), seeded(5), seeded(1, 3)
    product, total = micro_batched(forward, (x, scale, True), {"row": row}, 2)
    assert seen == [(2, 3), (2, 3), (1, 3)]
    assert torch.equal(product, x * scale[:, None]) and torch.equal(total, x + row)


def test_a_permuted_sample_of_a_group_lies_as_one_that_is_alone() -> None:
    """A layer that is a unit of its own gets it out of a group, one inside a larger unit gets it alone: the same
    kernel, or the picture hangs on where the budget cuts (SDXL's ``proj_in``)."""
    seen: list[tuple[int, ...]] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.stride())
        return x + 1

    def sequence(pictures: Tensor) -> Tensor:  # as transformers in UNets make it
        return pictures.permute(0, 2, 3, 1).reshape(len(pictures), -1, pictures.shape[1])

    pictures = seeded(2, 6, 4, 4)
    gathered = micro_batched(forward, (sequence(pictures),), {}, 1)
    assert torch.equal(gathered, torch.cat([forward(sequence(one)) for one in pictures.split(1)]))
    assert len(set(seen)) == 1 and len(seen) == 4, seen
