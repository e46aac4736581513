"""Latent tiles to pixel tiles: modes, halos, resumed work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import flip
from in_process import Work, look
from PIL import Image
from small_models import write_tiny

import stages.decode
from stages.config import ConfigError
from stages.events import Start
from stages.memory.tensors import read_tensors
from stages.models.tiny_vae import open_tiny
from stages.tiles import latent_grid
from stages.vae.tiled import to_uint8

QUICK = {"guide.mode": "none", "denoise.num_inference_steps": 1, "width": 160, "height": 104}


def tiles(work: Work, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder = work.run({**QUICK, **values}, until="decode")["decode"] / "tiles"
    return {path.stem: read_tensors(path)["pixels"] for path in folder.iterdir()}


@pytest.mark.parametrize("mode", ["shared", "independent", "exact"])
def test_every_tile_has_its_pixels(work: Work, mode: str) -> None:
    found = tiles(work, {"decode.mode": mode})
    grid = latent_grid(160, 104, 64, 16, 8)
    assert found.keys() == {tile.name for tile in grid}
    for tile in grid:
        assert found[tile.name].shape == (3, *tile.scaled(8).size)
        assert found[tile.name].dtype == torch.uint8


def test_modes_differ_and_tiles_of_shared_agree_in_their_overlap(work: Work) -> None:
    found = {mode: tiles(work, {"decode.mode": mode}) for mode in ("shared", "independent", "exact")}
    name = "r00_c01"
    assert not torch.equal(found["shared"][name], found["independent"][name])
    assert not torch.equal(found["shared"][name], found["exact"][name])

    def disagreement(mode: str) -> float:
        left, right = found[mode]["r00_c00"], found[mode]["r00_c01"]
        grid = {tile.name: tile.scaled(8) for tile in latent_grid(160, 104, 64, 16, 8)}
        shared = grid["r00_c00"].right - grid["r00_c01"].left
        return float((left[:, :, -shared:].float() - right[:, :, :shared].float()).abs().mean())

    assert disagreement("exact") == 0
    assert disagreement("shared") < disagreement("independent")


def test_exact_in_tiles_is_the_picture_decoded_whole(work: Work) -> None:
    whole = work.run({**QUICK, "decode.mode": "independent", "decode.tile_size": 160})
    exact = work.run({**QUICK, "decode.mode": "exact"})
    first, second = (np.asarray(Image.open(found["stitch"] / "image.png")).astype(int) for found in (whole, exact))
    assert np.abs(first - second).max() <= 1


@pytest.mark.parametrize("mode", ["shared", "independent"])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_interrupted_between_tiles(work: Work, monkeypatch: pytest.MonkeyPatch, mode: str, stop: int) -> None:
    values = {"decode.mode": mode}
    expected = tiles(work, values)
    second = Work(work.output_dir.with_name("second"), work.checkpoint)
    original, calls = stages.decode.write_tensors, 0

    def fails(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise RuntimeError("pulled the plug")
        original(*arguments, **options)

    monkeypatch.setattr(stages.decode, "write_tensors", fails)
    with pytest.raises(RuntimeError, match="plug"):
        tiles(second, values)
    done: list[int] = []
    monkeypatch.setattr(stages.decode, "write_tensors", lambda *a, **o: done.append(1) or original(*a, **o))
    got = tiles(second, values)
    assert second.status == ("resumed" if stop else "ran")
    assert len(done) == len(expected) - stop
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    folder = second.states(second.config({**QUICK, **values}))["decode"].entry.path
    assert not list(folder.glob("checkpoint*"))


def test_damaged_files_of_an_earlier_try_are_named_and_made_again(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, original, calls = tiles(work, {}), stages.decode.write_tensors, 0
    second = Work(work.output_dir.with_name("second"), work.checkpoint)

    def fails(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("pulled the plug")
        original(*arguments, **options)

    monkeypatch.setattr(stages.decode, "write_tensors", fails)
    with pytest.raises(RuntimeError, match="plug"):
        tiles(second, {})
    monkeypatch.setattr(stages.decode, "write_tensors", original)
    folder = second.states(second.config(QUICK))["decode"].entry.path
    flip(folder / "tiles" / "r00_c01.safetensors")
    flip(folder / "checkpoint_statistics.safetensors")
    got = tiles(second, {})
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    notes = " ".join(second.notes)
    assert "r00_c01.safetensors cannot be used" in notes and "damaged" in notes and "r00_c00" not in notes
    assert "checkpoint_statistics.safetensors cannot be used" in notes


def test_torn_files_of_an_earlier_try_are_made_again(work: Work) -> None:
    expected = tiles(work, {})
    second = Work(work.output_dir.with_name("second"), work.checkpoint)
    second.run(QUICK, until="denoise")
    first, folder = (w.states(w.config(QUICK))["decode"].entry.path for w in (work, second))
    (folder / "tiles").mkdir(parents=True)
    names = sorted(expected)
    (folder / "tiles" / f"{names[0]}.safetensors").write_bytes(b"torn")
    (folder / "tiles" / f"{names[1]}.safetensors").write_bytes(
        (first / "tiles" / f"{names[1]}.safetensors").read_bytes()
    )
    (folder / "checkpoint_statistics.safetensors").write_bytes(b"torn too")
    got = tiles(second, {})
    assert second.status == "resumed"
    assert [event.done for event in second.events if isinstance(event, Start)] == [1]
    assert any("checkpoint_statistics.safetensors cannot be used" in note for note in second.notes)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_mode_and_the_tiles_are_part_of_the_result_the_budget_is_not(work: Work) -> None:
    tiles(work, {})
    tiles(work, {"memory.budget": "4GB", "memory.prepared": False, "launch.threads": 1})
    assert work.status == "reused"
    for change in ({"decode.mode": "independent"}, {"decode.tile_size": 48}, {"decode.halo": 8}):
        tiles(work, change)
        assert work.status == "ran"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_a_draft_is_decoded_by_the_tiny_vae(work: Work, tiny: Path, tmp_path: Path) -> None:
    values = {"decode.mode": "taesd", "preview.vae": str(tiny), "decode.halo": 96}
    found = tiles(work, values)
    vae = open_tiny(tiny)
    latents = read_tensors(work.run(QUICK, until="denoise")["denoise"] / "canvas.safetensors")["latents"]
    expected = to_uint8(vae.decode(latents, return_dict=False)[0])[0]
    for tile in latent_grid(160, 104, 64, 16, 8):
        assert int((found[tile.name].int() - expected[tile.scaled(8).index].int()).abs().max()) <= 1
    tiles(work, values)
    assert work.status == "reused"
    tiles(work, {**values, "preview.vae": str(write_tiny(tmp_path / "other", seed=1))})
    assert work.status == "ran"
    look_at = look(work.config({**QUICK, **values}), "decode")["decode"].models[0]
    assert (look_at.component, look_at.micro_batches) == ("taesd", 6) and look_at.cuts[0].peak(1) > look_at.weights > 0
    with pytest.raises(ConfigError, match=r"model\.preview_vae: got None, expected a folder with decode\.mode=taesd"):
        work.config({"decode.mode": "taesd"})
    with pytest.raises(ConfigError, match=r"guide\.vae_mode: got 'taesd'"):
        work.config({"guide.vae_mode": "taesd", "preview.vae": str(tiny)})
