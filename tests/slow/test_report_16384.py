"""The report of a picture of 16384x16384 pixels: its tiles in the planned memory, its page opens in two seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import browser
import numpy as np
import pytest
from browser import Browser
from in_process import small_config
from safetensors.numpy import save_file

from stages.config import ROOT
from stages.documents import save_text
from stages.files import write_text
from stages.job import Job
from stages.tiles import latent_grid
from stages.workflow.launch.local import environment
from stages.workflow.planning import STITCH, STITCH_COLUMN, STITCH_THREAD
from stages.workflow.report import Live

SIDE = 16384

RUN = """
import sys
from pathlib import Path
from stages import PIPELINE, stitch
from stages.context import StageContext
from stages.documents import load
from stages.memory.monitor import own_peak_rss
folder = Path(sys.argv[1])
stitch.run(
    StageContext(
        stage=PIPELINE[-1],
        config=load(folder / "config.yaml"),
        run_dir=folder,
        output=folder / "stitch",
        inputs={"decode": folder / "decode"},
    )
)
print(own_peak_rss())
"""


@pytest.mark.slow
@pytest.mark.skipif(browser.found() is None, reason=f"no browser: none of {', '.join(browser.NAMES)}")
def test_it_opens_in_two_seconds(tmp_path: Path) -> None:
    sizes = {"width": SIDE, "height": SIDE, "launch.threads": 2, "denoise.tile_size": 512, "decode.tile_size": 1024}
    config = small_config(tmp_path, tmp_path / "outputs", sizes)
    (tmp_path / "decode" / "tiles").mkdir(parents=True)
    (tmp_path / "stitch").mkdir()
    noise = np.random.default_rng(0).integers(0, 200, (3, 1200, 1200), np.uint8)
    for tile in latent_grid(SIDE, SIDE, config.decode.tile_size, config.decode.overlap, 8):
        box = tile.scaled(8)
        pixels = np.ascontiguousarray(noise[:, : box.size.height, : box.size.width])
        save_file({"pixels": pixels}, tmp_path / "decode" / "tiles" / f"{box.name}.safetensors")
    write_text(tmp_path / "config.yaml", save_text(config))
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(config), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < STITCH + 2 * STITCH_THREAD + SIDE * STITCH_COLUMN
    told = json.loads((tmp_path / "stitch" / "zoom" / "zoom.json").read_text())
    assert told["levels"] == 6 and len(list((tmp_path / "stitch" / "zoom").rglob("*.jpg"))) == 1365

    (tmp_path / "image.png").symlink_to("stitch/image.png")
    Live(tmp_path, Job.of(config), [], "python runner.py run=x", "python runner.py prompt=x").finish()
    page = Browser()
    try:
        page.size(1200, 900)
        assert page.open((tmp_path / "report.html").as_uri()) < 2
        page.until("document.querySelector('output').textContent.endsWith('level 4')")
        page.js("document.querySelector('canvas').focus()")
        page.press("1")
        page.until("document.querySelector('output').textContent === '100%, level 0'")
        assert page.errors == []
    finally:
        page.close()
