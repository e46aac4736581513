"""A small picture of the regions, for a look before the work."""

from __future__ import annotations

import colorsys
import io

from PIL import Image, ImageDraw

from stages.regions.config import Regions

SIDE = 640  # pixels of the drawing's longer side
_CAPTION = 28  # characters


def sketch(regions: Regions) -> bytes:
    """A PNG of the canvas with every region's box, number and first words; ``replace`` regions have a solid frame."""
    scale = SIDE / max(regions.size)
    extent = (max(1, round(regions.size.width * scale)), max(1, round(regions.size.height * scale)))
    picture = Image.new("RGB", extent, "white")
    for index, region in enumerate(regions.regions):
        color = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(index * 0.381966 % 1, 0.65, 0.85))
        left, top, right, bottom = (
            round(edge * scale) for edge in (region.box.left, region.box.top, region.box.right, region.box.bottom)
        )
        layer = Image.new("RGBA", extent, (0, 0, 0, 0))
        draw = ImageDraw.Draw(layer)
        frame = 5 if region.mode == "replace" else 2
        box = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(box, fill=(*color, 70), outline=(*color, 255), width=frame)
        words = region.prompt if len(region.prompt) <= _CAPTION else region.prompt[: _CAPTION - 1] + "..."
        # the built-in bitmap font has Latin letters only; the number says which region it is
        caption = f"{index + 1} {words}".encode("ascii", "replace").decode()
        draw.text((left + 6, top + 6 + 12 * (index % 4)), caption, fill=(0, 0, 0, 255))
        picture.paste(layer, mask=layer)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
