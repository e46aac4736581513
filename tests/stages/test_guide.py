"""The guide: the low-res picture or the user's own, enlarged to the canvas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import flip
from in_process import Work, look
from opening import opened_vae
from PIL import Image
from torch import Tensor

from stages.config import ConfigError
from stages.context import Progress
from stages.events import Start
from stages.memory.monitor import Usage
from stages.memory.tensors import read_tensors
from stages.tiles import Tile, latent_grid
from stages.vae import encoding, rolling_schedule
from stages.vae import tiled as vae
from stages.vae.tiled import from_vae, to_uint8, to_vae


def guide(work: Work, **values: object) -> tuple[Path, Tensor]:
    folder = work.run(values, until="guide")["guide"]
    return folder, read_tensors(folder / "latents.safetensors")["latents"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    ramp = np.linspace(0, 255, 90 * 70 * 3).reshape(70, 90, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "my photo.png")
    return tmp_path / "my photo.png"


@pytest.mark.parametrize("upscale", ["lanczos", "latent"])
@pytest.mark.parametrize("size", [(128, 96), (264, 520), (32, 32), (512, 32)])
def test_latents_of_the_canvas_and_a_preview(work: Work, size: tuple[int, int], upscale: str) -> None:
    options = {"guide.upscale": upscale, "guide.phases": []}
    folder, latents = guide(work, width=size[0], height=size[1], **options)
    assert latents.shape == (1, 4, size[1] // 8, size[0] // 8) and latents.dtype == torch.float32
    assert latents.isfinite().all()
    config = work.config({"width": size[0], "height": size[1]})
    with Image.open(folder / "lowres.png") as preview:
        assert preview.size == (config.lowres.width, config.lowres.height)
    assert work.notes == [f"preview: {work.output_dir / 'test' / 'guide' / 'lowres.png'}"]


def test_the_preview_is_the_low_res_latents_decoded(work: Work) -> None:
    found = work.run(until="guide")
    latents = read_tensors(found["lowres"] / "latents.safetensors")["latents"]
    with opened_vae(work.checkpoint) as vae:
        pixels = vae.decode(to_vae(vae, latents), return_dict=False)[0]
        expected = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round()
    with Image.open(found["guide"] / "lowres.png") as preview:
        got = torch.from_numpy(np.array(preview)).permute(2, 0, 1)
    assert (got.float() - expected).abs().max() <= 1


def test_latent_upscaling_is_bicubic(work: Work) -> None:
    found = work.run({"guide.upscale": "latent"}, until="guide")
    small = read_tensors(found["lowres"] / "latents.safetensors")["latents"]
    expected = torch.nn.functional.interpolate(small, size=(12, 16), mode="bicubic")
    assert torch.equal(read_tensors(found["guide"] / "latents.safetensors")["latents"], expected)


def test_one_tile_is_the_whole_picture_encoded(work: Work, picture: Path) -> None:
    """A picture of the canvas' size in one tile: the VAE's mode of the whole, nothing else."""
    with Image.open(picture) as image:
        image.resize((128, 96)).save(picture)
    _, latents = guide(work, **{"guide.image": str(picture), "guide.tile_size": 128})
    with Image.open(picture) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with opened_vae(work.checkpoint) as vae:
        expected = from_vae(vae, vae.encode(pixels, return_dict=False)[0].mode())
    assert torch.allclose(latents, expected, atol=1e-4)


def test_the_users_picture_needs_no_low_res_pass(work: Work, picture: Path) -> None:
    folder, latents = guide(work, **{"guide.image": str(picture)})
    assert latents.shape == (1, 4, 12, 16)
    assert not (work.output_dir / ".store" / "lowres").exists()
    found = work.run({"guide.image": str(picture)})
    with Image.open(found["stitch"] / "image.png") as image:
        assert image.size == (128, 96)
        assert "my photo" not in str(image.info)
    assert (folder / "lowres.png").is_file()


def test_the_users_picture_guides_the_first_phase_alone(work: Work, picture: Path) -> None:
    values = {"guide.image": str(picture), "guide.phases": [64]}
    found = work.run(values, until="guide")
    assert "lowres" not in found
    alone = {"guide.image": str(picture), "width": 64, "height": 48, "run": "alone"}
    first = work.run(alone, until="denoise")
    for stage, file in (("guide", "latents"), ("denoise", "canvas")):
        got, expected = (
            read_tensors(folder / f"{file}.safetensors")["latents"] for folder in (found[f"{stage}_64"], first[stage])
        )
        assert torch.equal(got, expected)
    with opened_vae(work.checkpoint) as vae, Image.open(found["guide"] / "previous.png") as previous:
        shown = vae.decode(to_vae(vae, expected), return_dict=False)[0]
        assert np.abs(np.asarray(previous).astype(float) - to_uint8(shown)[0].permute(1, 2, 0).numpy()).max() <= 1
    config = work.config(values)
    seen = {name: state.payload["parameters"].get("guide.image") for name, state in work.states(config).items()}
    assert seen["guide_64"] and seen["guide"] is None
    cut = look(config, "guide")["guide"].models[0].cuts[0]
    assert {name.partition(".")[0] for name in cut.order} >= {"encoder", "decoder"}


def test_another_picture_in_the_same_file_is_another_guide(work: Work, picture: Path) -> None:
    _, first = guide(work, **{"guide.image": str(picture)})
    guide(work, **{"guide.image": str(picture), "run": "again"})
    assert work.status == "reused"
    Image.new("RGB", (40, 40), (200, 30, 30)).save(picture)
    _, second = guide(work, **{"guide.image": str(picture)})
    assert work.status == "ran" and not torch.equal(first, second)


def test_a_picture_that_was_deleted_is_not_needed_any_more(work: Work, picture: Path) -> None:
    values = {"guide.image": str(picture)}
    guide(work, **values)
    picture.unlink()
    work.run({**values, "decode.tile_size": 48})
    assert work.status == "ran"
    guide(work, **values, run="again")
    assert work.status == "reused"
    with pytest.raises(ConfigError, match=r"guide.image: got .*my photo.png', expected a file with a picture"):
        guide(work, **values, **{"guide.tile_size": 32})  # another guide would need it
    with pytest.raises(ConfigError, match=r"guide.image: got .*another.png', expected a picture that can be read"):
        guide(work, **{"guide.image": str(picture.with_name("another.png"))})


def test_a_square_on_a_wide_canvas_is_cut_not_stretched(work: Work, picture: Path) -> None:
    wide, middle = {"guide.image": str(picture), "width": 256, "height": 64}, picture.with_name("middle.png")
    ramp = np.linspace(0, 255, 80 * 80 * 3).reshape(80, 80, 3).astype(np.uint8)
    Image.fromarray(ramp).save(picture)
    Image.fromarray(ramp[30:50]).save(middle)
    _, cut = guide(work, **wide)
    assert any("80x80, of which 80x20 in the middle have the canvas' shape" in note for note in work.notes)
    _, same = guide(work, **{**wide, "guide.image": str(middle)})
    assert not any("in the middle" in note for note in work.notes)
    assert torch.equal(cut, same)
    _, stretched = guide(work, **wide, **{"guide.fit": "stretch"})
    assert not torch.equal(cut, stretched) and not any("in the middle" in note for note in work.notes)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK", "1"])
def test_pictures_of_any_kind(work: Work, tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("p.tiff" if mode in ("CMYK", "I;16") else "p.png")
    Image.new("RGB" if mode in ("RGBA", "P", "CMYK") else "L", (33, 21), 90).convert(mode).save(file)
    _, latents = guide(work, **{"guide.image": str(file)})
    assert latents.isfinite().all()


def test_16_bit_pictures_keep_their_greys(work: Work, tmp_path: Path) -> None:
    grey = np.full((32, 32), 30_000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray((grey // 257).astype(np.uint8)).save(tmp_path / "plain.png")
    _, deep = guide(work, **{"guide.image": str(tmp_path / "deep.png")})
    _, plain = guide(work, **{"guide.image": str(tmp_path / "plain.png")})
    assert torch.allclose(deep, plain, atol=0.05)


def test_a_photo_on_its_side_stands_up(work: Work, tmp_path: Path) -> None:
    """Cameras write the turn to EXIF; viewers and this program follow it."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "side.png", exif=turned)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "up.png")
    _, side = guide(work, **{"guide.image": str(tmp_path / "side.png")})
    _, up = guide(work, **{"guide.image": str(tmp_path / "up.png")})
    assert torch.equal(side, up)


def test_what_is_no_picture_is_refused(work: Work, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("not a picture")
    with pytest.raises(ConfigError, match=r"guide\.image: got .*words\.png"):
        guide(work, **{"guide.image": str(tmp_path / "words.png")})


@pytest.mark.parametrize("what", ["words", "too many pixels"])
def test_the_plan_counts_the_users_picture_and_refuses_what_is_none(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    file = tmp_path / "p.png"
    values = {"guide.image": str(file)}
    Image.new("RGB", (3000, 2000)).save(file)
    monkeypatch.setattr("stages.profile.own_peak_rss", lambda: 0)  # what this process happens to hold
    monkeypatch.setattr("stages.profile.usage", lambda pid: Usage(0, 0))
    plain = look(work.config(values), "guide")["guide"]
    Image.new("RGBA", (3000, 2000)).save(file)
    alpha = look(work.config(values), "guide")["guide"]
    assert alpha.imports > plain.imports and alpha.extra == plain.extra  # it is gone when the model comes
    if what == "words":
        file.write_text("not a picture")
    else:
        monkeypatch.setattr("stages.picture.header.PIXELS", 1000)
    with pytest.raises(ConfigError, match=r"guide\.image: got"):
        look(work.config(values))
    with pytest.raises(ConfigError, match=r"guide\.image: got"):
        guide(work, **values)


@pytest.mark.parametrize("calls", [3, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6, 17))])
def test_a_killed_guide_goes_on_in_its_row_of_tiles(work: Work, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    values = {"width": 264, "height": 256, "guide.phases": [], "guide.vae_mode": "independent"}
    _, expected = guide(work, **values)
    second = Work(work.output_dir.with_name("second"), work.checkpoint)
    done, original = 0, vae.encode_tile

    def fails(*arguments: Any) -> Tensor:
        nonlocal done
        done += 1
        if done > calls:
            raise RuntimeError("pulled the plug")
        return original(*arguments)

    monkeypatch.setattr(vae, "encode_tile", fails)
    with pytest.raises(RuntimeError, match="plug"):
        guide(second, **values)
    across = len(latent_grid(264, 256, 64, 16, 8)) // len(latent_grid(64, 256, 64, 16, 8))
    rows, done = calls // across, -1000
    folder, latents = guide(second, **values)
    assert torch.equal(latents, expected)
    assert second.status == ("resumed" if rows else "ran")
    assert done + 1000 == len(latent_grid(264, 256, 64, 16, 8)) - max(0, rows - 1) * across
    assert not list(folder.glob("checkpoint*"))


@pytest.mark.parametrize(
    "damage", ["a row", *(pytest.param(n, marks=pytest.mark.slow) for n in ("torn", "the picture", "the mark"))]
)
def test_a_damaged_guide_is_named_and_made_again(work: Work, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    values = {"width": 264, "height": 256, "guide.phases": [], "guide.vae_mode": "independent"}
    _, expected = guide(work, **values)
    second, done, original = Work(work.output_dir.with_name("second"), work.checkpoint), 0, vae.encode_tile

    def fails(*arguments: Any) -> Tensor:
        nonlocal done
        done += 1
        if done > 17:
            raise RuntimeError("pulled the plug")
        return original(*arguments)

    monkeypatch.setattr(vae, "encode_tile", fails)
    with pytest.raises(RuntimeError, match="plug"):
        guide(second, **values)
    monkeypatch.setattr(vae, "encode_tile", original)
    folder = second.states(second.config(values))["guide"].entry.path / "checkpoint"
    latents = folder / "latents.safetensors"
    if damage == "a row":
        flip(latents, 0.01)
    elif damage == "torn":
        latents.write_bytes(latents.read_bytes()[:1000])
    elif damage == "the mark":
        (folder / "rows.json").write_text("[1")
    else:
        flip(folder / "picture.safetensors")
    assert torch.equal(guide(second, **values)[1], expected)
    said = {
        "a row": "row 0 of latents.safetensors is damaged",
        "torn": "latents.safetensors cannot be used",
        "the picture": "picture.safetensors is damaged; it is decoded again",
        "the mark": "",
    }[damage]
    assert said in " ".join(second.notes)


def test_a_mark_without_its_file_counts_for_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the finished file was about to get its name; and again, before the first row."""
    values = {"width": 264, "height": 256, "guide.phases": [], "guide.vae_mode": "independent"}
    _, expected = guide(work, **values)
    second = Work(work.output_dir.with_name("second"), work.checkpoint)
    second.run(values, until="lowres")
    folder = second.states(second.config(values))["guide"].entry.path / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text('{"rows": 3}')
    with monkeypatch.context() as patch:
        patch.setattr(vae, "encode_tile", None)
        with pytest.raises(TypeError):
            guide(second, **values)
    assert torch.equal(guide(second, **values)[1], expected) and second.status == "ran"


@pytest.mark.parametrize("damage", ["", *(pytest.param(n, marks=pytest.mark.slow) for n in ("a row", "torn"))])
def test_a_guide_killed_between_strips_goes_on(work: Work, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(rolling_schedule, "PIECE_BYTES", 4_000)
    values = {"width": 264, "height": 256, "guide.phases": []}
    _, expected = guide(work, **values)
    second, add, done = Work(work.output_dir.with_name("second"), work.checkpoint), encoding._Kept.add, 0

    def fails(self: Any, box: Tile) -> None:
        nonlocal done
        done += 1
        if done == 4:
            raise RuntimeError("pulled the plug")
        add(self, box)

    monkeypatch.setattr(encoding._Kept, "add", fails)
    with pytest.raises(RuntimeError, match="plug"):
        guide(second, **values)
    latents = second.states(second.config(values))["guide"].entry.path / "checkpoint" / "latents.safetensors"
    if damage == "a row":
        flip(latents, 0.01)
    elif damage == "torn":
        latents.write_bytes(latents.read_bytes()[:1000])
    done = 10
    folder, found = guide(second, **values)
    assert torch.equal(found, expected) and not list(folder.glob("checkpoint*"))
    boxes = next(event.total for event in second.events if isinstance(event, Start))
    assert done - 10 == boxes - (0 if damage else 3) > 3
    assert second.status == ("ran" if damage else "resumed")
    said = {"": "", "a row": "row 0 of latents.safetensors is damaged", "torn": "latents.safetensors cannot be used"}
    assert said[damage] in " ".join(second.notes)


def whole_guide(work: Work, found: dict[str, Path], canvas: tuple[int, int]) -> Tensor:
    """The low-res latents decoded whole, enlarged by Pillow, encoded whole."""
    latents = read_tensors(found["lowres"] / "latents.safetensors")["latents"]
    with opened_vae(work.checkpoint) as model:
        pixels = to_uint8(model.decode(to_vae(model, latents), return_dict=False)[0])
        picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize(canvas, Image.Resampling.LANCZOS)
        enlarged = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        return from_vae(model, model.encode(enlarged, return_dict=False)[0].mode())


def test_the_exact_guide_is_the_whole_pictures(work: Work) -> None:
    values = {"width": 264, "height": 200, "guide.phases": [], "guide.vae_mode": "exact"}
    found = work.run(values, until="guide")
    exact = read_tensors(found["guide"] / "latents.safetensors")["latents"]
    assert [note for note in work.notes if "scratch space" in note][1].startswith("exact encode: up to 0.0 GB")
    assert not list(found["guide"].glob("checkpoint*"))
    expected = whole_guide(work, found, (264, 200))
    distance = dict.fromkeys(("exact", "shared", "independent"), 0.0)
    for mode in distance:
        other = work.run({**values, "guide.vae_mode": mode}, until="guide")["guide"] / "latents.safetensors"
        distance[mode] = float((read_tensors(other)["latents"] - expected).square().mean().sqrt())
    assert torch.isfinite(exact).all() and distance["exact"] < 0.02  # a level of 8 bits here and there
    assert distance["exact"] < distance["shared"] and distance["exact"] < distance["independent"]


@pytest.mark.slow
def test_an_exact_guide_killed_while_it_encodes_goes_on(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"width": 264, "height": 200, "guide.phases": [], "guide.vae_mode": "exact"}
    whole = read_tensors(work.run(values, until="guide")["guide"] / "latents.safetensors")["latents"]
    ran: list[str] = []

    def mark(progress: Progress, name: str) -> None:
        if name.startswith(("encoder.", "decoder.")):
            ran.append(name)
        if name == "encoder.mid_block.attentions.0" and ran.count(name) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "mark", mark)
    other = Work(work.output_dir / "other", work.checkpoint)
    with pytest.raises(KeyboardInterrupt):
        other.run(values, until="guide")
    first = len(ran)
    found = other.run(values, until="guide")["guide"]
    assert other.status == "resumed"
    again = [name for name in ran[first:] if name in ran[: first - 1]]
    assert not again, again  # neither the decoder's layers nor the encoder's first ones
    assert torch.equal(read_tensors(found / "latents.safetensors")["latents"], whole)
