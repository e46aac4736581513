"""The page of a sweep and its sheet: axes, what failed, from what is on the disk."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.picture.sheet import Block, Cell, sheet
from stages.workflow.report import sweep


def make(root: Path, *jobs: list[str], failed: int = -1) -> Path:
    """A sweep's folder with a run for each job; ``failed``: the number of one that has no picture."""
    folder, told = root / ".sweeps" / "abc", []
    folder.mkdir(parents=True)
    for number, said in enumerate(jobs):
        tile = root / f"r {number}" / "stitch" / "zoom" / "0" / "0_0.jpg"
        tile.parent.mkdir(parents=True)
        Image.new("RGB", (200, 100), (10 * number, 0, 200)).save(tile)
        (tile.parent.parent / "zoom.json").write_text('{"levels": 1, "format": "jpg"}')
        (root / f"r {number}" / "report.html").write_text("x")
        made = {"peak_rss_bytes": 3e8, "stages": [{"computed_seconds": 90.0 - number}]}
        (root / f"r {number}" / "run.json").write_text(json.dumps(made))
        one = {"overrides": said, "run": f"r {number}", "status": "done", "seconds": 1.0}
        told.append({**one, "status": "failed", "error": "denoise: <b>broke</b>"} if number == failed else one)
    (folder / "sweep.json").write_text(json.dumps({"jobs": told}))
    return folder


def test_two_keys_are_the_axes(tmp_path: Path) -> None:
    jobs = [["prompt='a cat'", f"denoise.strength={s}", f"seed={n}"] for s in ("0.2", "0.3") for n in "123"]
    page = sweep(make(tmp_path, *jobs, failed=4))
    assert page is not None
    html = page.read_text()
    assert "Sweep over denoise.strength, seed" in html and "5 of 6 have a picture" in html
    assert html.count("<img") == 5 and "&lt;b&gt;broke" in html and "<b>broke" not in html
    assert 'src="../../r%200/stitch/zoom/0/0_0.jpg"' in html and 'href="../../r%200/report.html"' in html
    assert [html.count(f'<th scope="col">{n}</th>') for n in "123"] == [1, 1, 1] and "1 min 30 s" in html
    with Image.open(page.with_name("sweep.png")) as image:
        assert image.width > 3 * 320 and image.height > 2 * 160
        pixels = np.asarray(image)
    for number in (0, 1, 2, 3, 5):  # each picture is in its place
        col, row = number % 3, number // 3
        across, down = image.width - (3 - col) * 328 + 160, image.height - (2 - row) * 168 + 80
        assert np.abs(pixels[down, across].astype(int) - (10 * number, 0, 200)).max() < 6


@pytest.mark.parametrize(("count", "tables"), [(3, 1), (14, 3)])
def test_one_key_runs_in_rows(tmp_path: Path, count: int, tables: int) -> None:
    page = sweep(make(tmp_path, *[[f"seed={n}"] for n in range(count)]))
    assert page is not None
    html = page.read_text()
    assert html.count('class="sheet"') == tables and html.count("<img") == count


def test_more_keys_are_more_sheets(tmp_path: Path) -> None:
    jobs = [
        [f"scheduler={k}", f"width={w}", f"seed={n}"] for k in ("ddim", "euler") for w in (512, 1024) for n in (1, 2)
    ]
    page = sweep(make(tmp_path, *jobs))
    assert page is not None
    html = page.read_text()
    assert html.count('class="sheet"') == 2 and "<h2>scheduler=ddim</h2>" in html


def test_a_picture_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = make(tmp_path, *[[f"seed={n}"] for n in range(2)])
    (tmp_path / "r 0" / "stitch" / "zoom" / "0" / "0_0.jpg").write_text("no picture")
    assert sweep(folder) is not None
    with Image.open(folder / "sweep.png") as image:
        assert image.height < 320  # of the shape of the other one


def test_without_a_sweep_there_is_no_page(tmp_path: Path) -> None:
    assert sweep(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_sheet_of_many_takes_the_memory_of_one_row(tmp_path: Path) -> None:
    Image.new("RGB", (320, 320), (9, 9, 9)).save(tmp_path / "a.jpg")
    cells = [Cell(tmp_path / "a.jpg")] * 4
    tracemalloc.start()
    sheet(tmp_path / "s.png", [Block("", "abcd", [("r", cells)] * 40)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with Image.open(tmp_path / "s.png") as image:
        assert image.height > 40 * 320
        assert peak < image.width * image.height * 3 / 4


def test_names_of_several_lines_and_of_any_length(tmp_path: Path) -> None:
    said = ["a cat\non a mat", "word " * 20_000]
    jobs = [[f"prompt='{text}'", f"seed={n}"] for text in said for n in "12"]
    began = time.monotonic()
    page = sweep(make(tmp_path, *jobs))
    assert page is not None and time.monotonic() - began < 5
    with Image.open(page.with_name("sweep.png")) as image:
        assert image.height > 2 * 160
