"""A person's picture: what is read of it, how it is turned, cut and shrunk, and that it takes no more than planned."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from stages.config import ROOT, ConfigError
from stages.picture import opening
from stages.picture.opening import check_whole, look_at, open_picture, opening_bytes
from stages.tiles import Size

HUGE = Size(4096, 4096)  # a canvas that nothing is shrunk for
RANDOM = np.random.default_rng(1)


def smooth(height: int = 90, width: int = 130) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8))


def pixels(file: Path, tmp_path: Path, canvas: Size = HUGE, fit: str = "stretch", unit: int = 8) -> np.ndarray:
    picture = open_picture(file, tmp_path / "rows", canvas, fit, unit)
    assert not list(tmp_path.glob("stored-*"))
    return picture.pixels.read(0, picture.height)[0].permute(1, 2, 0).numpy()


@pytest.fixture(params=["whole", "streamed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How they are read; strips are a few rows."""
    monkeypatch.setattr("stages.picture.reading.SMALL", 1 << 30 if request.param == "whole" else 0)
    monkeypatch.setattr(opening, "_STRIP", 1000)
    monkeypatch.setattr(opening, "_TURN", 900)
    return request.param


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "rgb.png": ("RGB", {}),
    "grey.png": ("L", {}),
    "palette.png": ("P", {}),
    "rgb.jpg": ("RGB", {"quality": 90}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "grey.jpg": ("L", {}),
    "ink.jpg": ("CMYK", {}),
    "rgb.webp": ("RGB", {"lossless": True}),
    "rgb.tiff": ("RGB", {}),
    "packed.tiff": ("RGB", {"compression": "tiff_lzw"}),
    "ink.tiff": ("CMYK", {}),
    "rgb.bmp": ("RGB", {}),
    "line.png": ("1", {}),
    "rgb.gif": ("P", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_that_fits_is_what_pillow_reads(name: str, way: str, tmp_path: Path) -> None:
    mode, options = FILES[name]
    smooth().convert(mode).save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"))
    streamed = way == "streamed" and name.partition(".")[2] in ("png", "jpg", "webp", "tiff")
    assert look_at(tmp_path / name).streamed == (streamed and mode in ("RGB", "L", "P"))
    assert np.array_equal(pixels(tmp_path / name, tmp_path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
def test_pictures_are_turned_as_their_exif_says(orientation: int, kind: str, way: str, tmp_path: Path) -> None:
    exif, file = Image.Exif(), tmp_path / f"p.{kind}"
    exif[0x0112] = orientation
    smooth().save(file, exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert look_at(file).shown == Size(*expected.shape[:2])
    assert np.array_equal(pixels(file, tmp_path), expected)


def late_exif(image: Image.Image, orientation: int) -> bytes:
    """A PNG with its ``eXIf`` behind the pixels, as some programs write it."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, "PNG")
    content = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return file.getvalue()[:-12] + chunk + file.getvalue()[-12:]


def test_exif_behind_the_pixels_is_found_and_nothing_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.png").write_bytes(late_exif(smooth(), 6))
    expected = np.asarray(smooth().transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(pixels(tmp_path / "p.png", tmp_path), expected)
    Image.new("RGBA", (200, 100)).save(tmp_path / "plain.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert look_at(tmp_path / "p.png").orientation == 6
    assert opening_bytes(tmp_path / "plain.png", HUGE, "crop", 8) > 80_000


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp", "bmp"])
def test_a_large_picture_is_shrunk_while_it_is_read(kind: str, way: str, tmp_path: Path) -> None:
    file = tmp_path / f"p.{kind}"
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    smooth(310, 470).save(file, **options)
    got = pixels(file, tmp_path, Size(64, 96))
    assert got.shape[0] in (77, 78) and got.shape[1] in (117, 118)  # a quarter, never below the canvas
    expected = np.asarray(Image.open(file).convert("RGB").reduce(4))[: got.shape[0], : got.shape[1]].astype(int)
    inside = np.abs(got[:70, :55].astype(int) - expected[:70, :55])  # where blue does not wrap around
    assert np.abs(got[..., :2].astype(int) - expected[..., :2]).max() <= 3 and inside.mean() < 2


@pytest.mark.parametrize(
    ("size", "canvas", "expected"),
    [
        ((100, 100), (400, 100), (100, 25)),
        ((200, 100), (64, 64), (100, 100)),
        ((130, 90), (130, 90), (130, 90)),
        ((1004, 1000), (512, 512), (1004, 1000)),  # four of 1000 are two pixels of the canvas: within a latent
        ((1040, 1000), (512, 512), (1000, 1000)),
        ((3, 1000), (512, 512), (3, 3)),
    ],
)
def test_the_middle_is_cut_to_the_shape_of_the_canvas(
    size: tuple[int, int], canvas: tuple[int, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    image, notes, target = smooth(*size[::-1]), [], Size(*canvas[::-1])
    image.save(tmp_path / "p.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening.Seen, "shrink", lambda *_: 1)
        picture = open_picture(tmp_path / "p.png", tmp_path / "rows", target, "crop", 8, notes.append)
        stretched = open_picture(tmp_path / "p.png", tmp_path / "other", target, "stretch", 8, notes.append)
    assert (picture.width, picture.height) == expected and (stretched.width, stretched.height) == size
    left, top = (size[0] - expected[0]) // 2, (size[1] - expected[1]) // 2
    middle = np.asarray(image)[top : top + expected[1], left : left + expected[0]]
    assert np.array_equal(picture.pixels.read(0, picture.height)[0].permute(1, 2, 0).numpy(), middle)
    said = f"of which {expected[0]}x{expected[1]} in the middle have the canvas' shape; guide.fit=stretch takes all"
    assert len(notes) == (expected != size) and all(said in note for note in notes)


@pytest.mark.parametrize("orientation", [1, 6, 8, 3])
def test_what_is_cut_is_the_middle_of_what_is_shown(orientation: int, way: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(100, 160).save(tmp_path / "p.png", exif=exif)
    got = pixels(tmp_path / "p.png", tmp_path, Size(128, 640), "crop")
    with Image.open(tmp_path / "p.png") as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    top = (shown.shape[0] - got.shape[0]) // 2
    assert got.shape[1] == shown.shape[1] == 5 * got.shape[0]
    assert np.array_equal(got, shown[top : top + got.shape[0]])


def transparent(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """Left half opaque grey 90, right half a hidden 30 that nobody is to see."""
    grey, alpha = np.full((40, 60), 90, np.uint8), np.full((40, 60), 255, np.uint8)
    grey[:, 30:], alpha[:, 30:] = 30, 0
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    if mode in ("RGB", "L", "P"):
        plain = Image.fromarray(grey).convert(mode)
        return plain, {"transparency": (30, 30, 30) if mode == "RGB" else 30}
    return image.convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_white(mode: str, way: str, tmp_path: Path) -> None:
    image, options = transparent(mode)
    image.save(tmp_path / "p.png", **options)
    notes: list[str] = []
    picture = open_picture(tmp_path / "p.png", tmp_path / "rows", HUGE, "stretch", 8, notes.append)
    got = picture.pixels.read(0, 40)[0]
    assert bool((got[:, :, :30] == 90).all()) and bool((got[:, :, 30:] == 255).all())
    assert notes == ["guide.image: its transparent parts are shown on white"]


def test_half_transparent_and_opaque(tmp_path: Path) -> None:
    colours = RANDOM.integers(0, 256, (20, 30, 4), np.uint8)
    colours[:10, :, 3], colours[10:, :, 3] = 255, 128
    Image.fromarray(colours).save(tmp_path / "p.png")
    got = pixels(tmp_path / "p.png", tmp_path).astype(float)
    assert np.array_equal(got[:10], colours[:10, :, :3])
    assert np.abs(got[10:] - (colours[10:, :, :3] * (128 / 255) + 255 * (127 / 255))).max() <= 0.5


@pytest.mark.parametrize(
    ("name", "values", "grey"),
    [
        ("float.tiff", np.full((20, 20), 0.5, np.float32), 128),
        ("wide.tiff", np.full((20, 20), 0x80000000, np.uint32), 128),
        ("deep.tiff", np.full((20, 20), 30_000, np.uint16), 117),
        ("deep.png", np.full((20, 20), 30_000, np.uint16), 117),
    ],
)
def test_numbers_of_other_kinds_are_scaled(name: str, values: np.ndarray, grey: int, way: str, tmp_path: Path) -> None:
    signed = values.view(np.int32) if values.dtype == np.uint32 else values
    Image.fromarray(signed).save(tmp_path / name)
    if values.dtype == np.uint32:  # Pillow writes them with a sign: SampleFormat, one short, 2
        entry, content = struct.pack("<HHIH", 339, 3, 1, 2), (tmp_path / name).read_bytes()
        assert content.count(entry) == 1
        (tmp_path / name).write_bytes(content.replace(entry, struct.pack("<HHIH", 339, 3, 1, 1)))
    assert (pixels(tmp_path / name, tmp_path) == grey).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.linspace(0, 255, 400, dtype=np.float32).reshape(20, 20), "floating-point numbers from 0 to 255"),
        (np.full((20, 20), np.nan, np.float32), "floating-point numbers from nan"),
        (np.full((20, 20), 70, np.int32), "whole numbers with a sign"),
    ],
)
def test_numbers_without_a_scale_are_refused(values: np.ndarray, said: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "p.tiff")
    with pytest.raises(ConfigError, match=rf"guide.image: .*{said}"):
        pixels(tmp_path / "p.tiff", tmp_path)


@pytest.mark.parametrize("key", ["workflow", "über"])  # tEXt, and iTXt that is compressed
def test_a_workflow_of_megabytes_is_no_obstacle(key: str, way: str, tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    text = "".join(map(str, RANDOM.integers(0, 10, 3_000_000)))
    texts.add_itxt("workflow", text, zip=True) if key == "über" else texts.add_text(key, text)
    smooth().save(tmp_path / "p.png", pnginfo=texts)
    assert np.array_equal(pixels(tmp_path / "p.png", tmp_path), np.asarray(smooth()))


def test_too_many_pixels_are_our_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")  # Pillow would refuse it
    assert look_at(tmp_path / "large.png").size == (10_000, 20_000)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "p.png")
    with pytest.raises(ConfigError, match=r"20000x20000 pixels.*at most 268435456 pixels"):
        look_at(tmp_path / "p.png")
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


def test_what_is_no_picture_is_refused(tmp_path: Path, way: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.png").write_text("a cat")
    RANDOM_PIXELS = Image.fromarray(RANDOM.integers(0, 256, (300, 300, 3), np.uint8))
    for kind in ("png", "jpg", "tiff", "webp"):
        RANDOM_PIXELS.save(tmp_path / f"torn.{kind}")
        content = (tmp_path / f"torn.{kind}").read_bytes()
        (tmp_path / f"torn.{kind}").write_bytes(content[: len(content) // 2])
    for path in [tmp_path, *tmp_path.iterdir()]:
        with pytest.raises(ConfigError, match=rf"guide\.image: got '{path}"):
            pixels(path, tmp_path)


MEASURED = """
import sys
from pathlib import Path
from stages.memory.monitor import peak_rss, usage
from stages.picture.opening import open_picture, opening_bytes
from stages.tiles import Size
path, side = Path(sys.argv[1]), int(sys.argv[2])
planned = opening_bytes(path, Size(side, side), "crop", 8)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak_rss()
open_picture(path, path.with_suffix(".rows"), Size(side, side), "crop", 8)
print(planned, peak_rss() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("side", [512, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        *("a.jpg", "alpha.png", "strip.tiff"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("progressive.jpg", "a.png", "a.webp", "a.tiff", "ink.jpg")),
    ],
)
def test_opening_takes_no_more_than_planned(name: str, side: int, tmp_path: Path) -> None:
    mode = {"alpha.png": "RGBA", "ink.jpg": "CMYK"}.get(name, "RGB")
    options: dict[str, Any] = {"progressive": True} if name.startswith("progressive") else {}
    if name == "strip.tiff":
        options = {"compression": "tiff_lzw", "tiffinfo": {278: 3000}}
    smooth(3000, 4000).convert(mode).save(tmp_path / name, **options)
    found = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / name), str(side)], capture_output=True, text=True, cwd=ROOT
    )
    planned, taken = map(int, found.stdout.split())
    assert taken < planned, (name, side)
    assert name in ("ink.jpg", "a.webp", "progressive.jpg", "strip.tiff") or planned < 4000 * 3000 * 8


def test_the_plan_grows_with_the_canvas_not_with_the_picture(tmp_path: Path) -> None:
    for name, factor in (("small", 1), ("large", 3)):
        Image.new("RGB", (3000, 2000 * factor)).save(tmp_path / f"{name}.png")
    planned = [opening_bytes(tmp_path / f"{name}.png", Size(256, 256), "crop", 8) for name in ("small", "large")]
    assert planned[0] == planned[1]


@pytest.mark.parametrize("name", ["torn.png", "torn.jpg", "torn.tif", "torn.webp"])
def test_a_torn_picture_is_refused_before_work(tmp_path: Path, name: str) -> None:
    whole, torn, canvas = tmp_path / f"whole{Path(name).suffix}", tmp_path / name, Size(64, 64)
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    check_whole(whole, canvas, "crop", 8)
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"guide\.image: got .*torn.*, expected a picture that can be read"):
        check_whole(torn, canvas, "crop", 8)


def test_a_whole_picture_is_not_read_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.picture.opening.strips", lambda *_: pytest.fail("read"))
    for name in ("whole.png", "whole.jpg"):
        Image.new("RGB", (300, 200)).save(tmp_path / name)
        check_whole(tmp_path / name, Size(64, 64), "crop", 8)
