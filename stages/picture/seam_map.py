"""A seam report for people: a table of its borders, a picture of them, and plain values for a JSON file."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from stages.picture.seams import SeamReport


def plain(report: SeamReport) -> dict[str, Any]:
    """The ratios, and every border from the most to the least visible."""
    ratios = {name: round(getattr(report, name), 4) for name in ("ratio", "local_ratio", "lattice_ratio")}
    borders = [
        {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in border._asdict().items()
            if key != "pieces"
        }
        for border in sorted(report.borders, key=lambda border: -border.ratio)
    ]
    return {**ratios, "borders": borders}


def table(report: SeamReport, most: int = 20) -> str:
    """The borders with the highest ratios, as a Markdown table."""
    lines = ["| border | at | gradient | nearby | ratio | worst piece |", "|---|---|---|---|---|---|"]
    for border in sorted(report.borders, key=lambda b: -b.ratio)[:most]:
        values = f"{border.gradient:.2f} | {border.nearby:.2f} | {border.ratio:.3f} | {border.worst:.2f}"
        lines.append(f"| {border.axis} | {border.position} | {values} |")
    return "\n".join(lines)


def heat_map(report: SeamReport, side: int = 768) -> bytes:
    """A PNG: the picture's gradients in grey, and every border in pieces from blue (no step) over white to red (2x)."""
    gradients = report.gradients
    scale = side / max(gradients.size)
    extent = (max(1, round(gradients.size.width * scale)), max(1, round(gradients.size.height * scale)))
    texture = np.minimum(255, 40 + np.sqrt(gradients.columns) * 60).astype(np.uint8)
    picture = np.array(Image.fromarray(texture).resize(extent).convert("RGB")) // 2
    for border in report.borders:
        along = extent[1 if border.axis == "column" else 0]
        places = (np.arange(along) + 0.5) / along * len(border.pieces) - 0.5
        line = _colors(np.interp(places, np.arange(len(border.pieces)), border.pieces))
        at = min(round(border.position * scale), (extent[0] if border.axis == "column" else extent[1]) - 1)
        if border.axis == "column":
            picture[:, at] = line
        else:
            picture[at] = line
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _colors(ratios: np.ndarray) -> np.ndarray:
    """``[n, 3]`` uint8: blue at 0, white at 1, red from 2 on."""
    high, low = np.clip(ratios - 1, 0, 1), np.clip(1 - ratios, 0, 1)
    return np.stack([255 * (1 - low), 255 * (1 - high - low), 255 * (1 - high)], axis=-1).clip(0, 255).astype(np.uint8)
