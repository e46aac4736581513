"""A contact sheet: pictures in a table with what they differ by at its edges, as a PNG. One row of it is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stages.picture.png import PngWriter
from stages.tiles import Size

GAP = 8  # pixels between cells
_TEXT, _LINE = 15, 20  # pixels: letters, and from line to line
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PAPER, _INK, _DIM = (255, 255, 255), (20, 24, 32), (240, 242, 246)


class Cell(NamedTuple):
    """A small picture's file, or what stands in its place."""

    file: Path | None
    said: str = ""


class Block(NamedTuple):
    """One table: a heading, names of columns and rows ("" for none), cells row by row (None: nothing there)."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]


def sheet(path: Path, blocks: Sequence[Block], width: int = 320) -> None:
    """Write the PNG; ``width``: of a cell, pixels. Cells have the shape of the first picture."""
    side = _shape([cell.file for block in blocks for _, row in block.rows for cell in row if cell and cell.file], width)
    font = ImageFont.load_default(_TEXT)
    longest = max((font.getlength(_plain(name)[:width]) for block in blocks for name, _ in block.rows), default=0)
    edge = min(int(longest) + 2 * GAP, width) if longest else GAP
    total = edge + max(len(block.columns) for block in blocks) * (width + GAP)
    strips = [strip for block in blocks for strip in _heights(block, side)]
    with open(path, "wb") as file, PngWriter(file, total, sum(strips)) as png:
        for block in blocks:
            for strip in _strips(block, total, edge, side, font):
                png.write(np.asarray(strip))


def _shape(files: Sequence[Path], width: int) -> Size:
    """Of a cell that holds the first picture which can be read, no taller than twice its width."""
    for file in files:
        try:
            with Image.open(file) as image:
                return Size(min(2 * width, max(width // 4, round(width * image.height / image.width))), width)
        except OSError:
            continue
    return Size(width, width)


def _heights(block: Block, side: Size) -> list[int]:
    return [_heading(block), *[side.height + GAP] * len(block.rows)]


def _heading(block: Block) -> int:
    return GAP + _LINE * ((2 if block.heading else 0) + (2 if any(block.columns) else 0))


def _strips(block: Block, width: int, edge: int, side: Size, font: Font) -> Iterator[Image.Image]:
    """The heading, then row after row."""
    head = Image.new("RGB", (width, _heading(block)), _PAPER)
    draw = ImageDraw.Draw(head)
    if block.heading:
        draw.multiline_text((GAP, GAP), _fitted(block.heading, width - 2 * GAP, font), _INK, font)
    for col, name in enumerate(block.columns):
        place = (edge + col * (side.width + GAP) + side.width // 2, head.height - 4)
        draw.multiline_text(place, _fitted(name, side.width, font), _INK, font, anchor="md", align="center")
    yield head
    for name, cells in block.rows:
        strip = Image.new("RGB", (width, side.height + GAP), _PAPER)
        draw = ImageDraw.Draw(strip)
        draw.multiline_text((GAP, side.height // 2), _fitted(name, edge - GAP, font), _INK, font, anchor="lm")
        for col, cell in enumerate(cells):
            if cell is not None:
                _paste(strip, draw, cell, edge + col * (side.width + GAP), side, font)
        yield strip


def _paste(strip: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, side: Size, font: Font) -> None:
    small, said = None, cell.said
    if cell.file is not None:
        try:
            with Image.open(cell.file) as image:
                image.draft("RGB", (side.width, side.height))  # a JPEG's decoder can leave out pixels
                small = image.convert("RGB")
        except OSError as error:
            said = f"cannot be read: {error}"
    if small is None:
        draw.rectangle((left, 0, left + side.width - 1, side.height - 1), _DIM)
        middle = (left + side.width // 2, side.height // 2)
        draw.multiline_text(
            middle, _fitted(said, side.width - 2 * GAP, font, 6), _INK, font, anchor="mm", align="center"
        )
        return
    small.thumbnail((side.width, side.height), Image.Resampling.LANCZOS)
    strip.paste(small, (left + (side.width - small.width) // 2, (side.height - small.height) // 2))


def _plain(text: str) -> str:
    """In one line: the length of several cannot be measured."""
    return " ".join(text.split())


def _fitted(text: str, width: int, font: Font, most: int = 2) -> str:
    """The text in lines of at most ``width`` pixels, ``most`` of them."""
    lines, rest = [], _plain(text)
    while rest and len(lines) < most:
        end = min(len(rest), width)  # no letter is narrower than a pixel
        while end > 1 and font.getlength(rest[:end]) > width:
            end -= 1
        cut = rest.rfind(" ", 1, end) if end < len(rest) else -1
        cut = cut if cut > 0 else end
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    if rest:
        lines[-1] = lines[-1][: max(1, len(lines[-1]) - 3)] + "..."
    return "\n".join(lines)
