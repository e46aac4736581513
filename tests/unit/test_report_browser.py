"""The pages in a real browser: they live, zoom, sort, and write no error to the console."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import browser
import numpy as np
import pytest
from browser import PHONE, Browser
from omegaconf import DictConfig
from PIL import Image
from test_report import Process, result
from test_sweep_page import make as make_sweep

from stages import PIPELINE
from stages.events import Advance, Start
from stages.job import Job
from stages.picture.pyramid import Pyramid
from stages.workflow.graph import StageState
from stages.workflow.report import Live, sweep
from stages.workflow.report.serve import Server
from stages.workflow.store import Store

MIDDLE = """(box => [box.x + box.width / 2, box.y + box.height / 2])(
    document.querySelector('canvas').getBoundingClientRect())"""

pytestmark = pytest.mark.skipif(browser.found() is None, reason=f"no browser: none of {', '.join(browser.NAMES)}")


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_errors(page: Browser) -> Iterator[None]:
    page.errors.clear()
    page.size(1200, 900)
    yield
    assert page.errors == []


@pytest.fixture
def make_live(make_config: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Live]:
    def make(width: int = 1600, height: int = 1200) -> Live:
        store = Store(tmp_path / ".store")
        entries = {stage.name: store.entry(stage.name, "f") for stage in PIPELINE}
        states = [
            StageState(stage=one, needs=(), payload={}, fingerprint="f", entry=entries[one.name], status="run")
            for one in PIPELINE
        ]
        regions = [{"prompt": "sea", "box": [0, 0, width, height]}]
        job = Job.of(
            make_config({"run": "x", "prompt": "a <cat>", "width": width, "height": height, "regions": regions})
        )
        return Live(tmp_path, job, states, "python runner.py run=x", "python runner.py 'prompt=a <cat>'")

    return make


@pytest.fixture
def live(make_live: Callable[..., Live]) -> Live:
    return make_live()


def picture(folder: Path, width: int, height: int) -> None:
    zoom = folder / "stitch" / "zoom"
    zoom.mkdir(parents=True)
    (folder / "image.png").write_bytes(b"png")
    strip = np.zeros((512, width, 3), np.uint8)
    strip[:, ::2] = 200
    with Pyramid(zoom, width, height) as pyramid:
        for top in range(0, height, 512):
            pyramid.write(strip[: height - top])


def test_a_running_page_lives_until_the_run_ends(page: Browser, live: Live, tmp_path: Path) -> None:
    with live:
        page.open((tmp_path / "report.html").as_uri())
        live.begin("denoise")
        live.watch(Process())  # type: ignore[arg-type]
        live.event(Start(20, "steps"))
        live.event(Advance(7))
        page.until("document.getElementById('what').textContent.startsWith('denoise: 7 of 20 steps, about')")
        assert page.js("document.title") == "35% denoise · x"
        assert page.js("document.querySelector('[data-stage=denoise] [data-is=status]').textContent") == "running"
        assert page.js("document.getElementById('level').value") == Process.timeline[-1].rss
        assert page.js("document.querySelectorAll('#timeline polyline').length") == 2
        live.event(Advance(1))
        page.until("document.getElementById('what').textContent.startsWith('denoise: 8 of 20')")  # nobody reloaded it
        live.end(result("denoise"))
        live.finish("decode: it broke")
        page.until("document.body.dataset.state === 'failed'")
    assert "decode: it broke" in page.js("document.querySelector('[role=alert]').textContent")
    assert page.js("document.querySelector('pre.command').textContent") == "python runner.py run=x"


def test_the_page_of_a_killed_run_says_since_when_it_is_old(page: Browser, live: Live, tmp_path: Path) -> None:
    live._write_page("running")
    live._say("running")
    told = tmp_path / "report" / "live.js"
    said = json.loads(told.read_text().removeprefix("live(").removesuffix(");\n"))
    told.write_text(f"live({json.dumps({**said, 'updated': time.time() - 300})});\n")
    page.open((tmp_path / "report.html").as_uri())
    page.until("!document.getElementById('stale').hidden")
    text = page.js("document.getElementById('stale').textContent")
    assert text.startswith("Not updated since") and "5 min" in text and "python runner.py run=x" in text
    assert page.js("document.getElementById('state').textContent") == "no news"


def test_the_picture_zooms_and_shows_what_lies_over_it(page: Browser, live: Live, tmp_path: Path) -> None:
    picture(tmp_path, 1600, 1200)
    live.end(result("stitch"))
    live.finish()
    page.open((tmp_path / "report.html").as_uri())
    whole = page.until("viewer.view && viewer.view.scale")
    assert whole < 1
    page.js("document.querySelector('canvas').focus()")
    for key, expected in (("+", whole * 1.5), ("0", whole), ("1", 1.0)):
        page.press(key)
        page.until(f"Math.abs(viewer.view.scale - {expected}) < 1e-6")
    page.until("document.querySelector('output').textContent === '100%, level 0'")
    x = page.js("viewer.view.x")
    page.press("ArrowRight")
    page.until(f"viewer.view.x > {x}")
    box = page.js(MIDDLE)
    page.wheel(*box, -500)
    page.until("viewer.view.scale > 2")
    page.js("document.querySelector('[data-do=fit]').click()")
    page.until(f"Math.abs(viewer.view.scale - {whole}) < 1e-6")
    assert not shows(page, tmp_path, (255, 59, 48)) and not shows(page, tmp_path, (255, 204, 0))
    for name, color in (("denoise", (255, 59, 48)), ("regions", (255, 204, 0))):
        page.js(f"document.querySelector('[data-show={name}]').click()")
        page.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert shows(page, tmp_path, color)


def shows(page: Browser, folder: Path, color: tuple[int, int, int]) -> bool:
    """Whether the colour is on the screen."""
    page.screenshot(folder / "screen.png", whole=False)
    with Image.open(folder / "screen.png") as image:
        return bool((np.abs(np.asarray(image.convert("RGB")).astype(int) - color).max(axis=2) < 12).sum() > 50)


def test_pinch_on_a_phone(page: Browser, live: Live, tmp_path: Path) -> None:
    picture(tmp_path, 1600, 1200)
    live.finish()
    page.size(**PHONE)
    page.open((tmp_path / "report.html").as_uri())
    whole = page.until("viewer.view && viewer.view.scale")
    assert page.js("document.documentElement.scrollWidth <= window.innerWidth")
    x, y = page.js(MIDDLE)
    for apart, kind in ((20, "touchStart"), (60, "touchMove"), (120, "touchMove")):
        points = [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.until(f"viewer.view.scale > {whole} * 1.5")


def test_the_timeline_says_what_ran(page: Browser, live: Live, tmp_path: Path) -> None:
    live.end(result("lowres"))
    live.end(result("denoise", peak=700_000_000))
    live.finish()
    page.open((tmp_path / "report.html").as_uri())
    page.until("!!document.querySelector('#timeline svg')")
    page.js("document.querySelector('#timeline svg').focus()")
    for _ in range(51):
        page.press("ArrowRight")
    text = page.until("document.querySelector('#timeline .tip').textContent")
    assert text.startswith("denoise 0.0 s: 680 MB, 350 anonymous") and "unet.0" in text
    page.press("ArrowLeft")
    assert "unet.49" in page.until("document.querySelector('#timeline .tip').textContent") and page.js(
        "document.querySelector('#timeline .tip').textContent.includes('step 7')"
    )


def test_the_page_of_a_large_picture_opens_in_two_seconds(
    page: Browser, make_live: Callable[..., Live], tmp_path: Path
) -> None:
    live = make_live(16384, 16384)
    picture(tmp_path, 1024, 1024)  # its levels from 1024 pixels on are all that is looked at as a whole
    zoom = tmp_path / "stitch" / "zoom"
    for level in (1, 0):
        (zoom / str(level)).rename(zoom / str(level + 4))
    (zoom / "zoom.json").write_text(json.dumps({"levels": 6, "tile": 512, "format": "jpg"}))
    for stage in PIPELINE:
        samples = tuple(result("x").timeline[0]._replace(seconds=t / 50, module=f"m{t}") for t in range(2000))
        live.end(result(stage.name)._replace(timeline=samples))
    live.finish()
    assert (tmp_path / "report.html").stat().st_size < 500_000
    assert page.open((tmp_path / "report.html").as_uri()) < 2
    page.until("document.querySelector('output').textContent.endsWith('level 4')")
    page.until("!!document.querySelector('#timeline svg')")


def test_a_sweeps_table_sorts(page: Browser, tmp_path: Path) -> None:
    jobs = [["prompt=x", f"denoise.strength={s}", f"seed={n}"] for s in ("0.2", "0.3") for n in (3, 10, 2)]
    html = sweep(make_sweep(tmp_path, *jobs, failed=1))
    assert html is not None
    page.open(html.as_uri())
    column = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[2].textContent).join()"
    head = "document.querySelectorAll('table.sortable th')[2]"
    for expected, sort in (("2,2,3,3,10,10", "ascending"), ("10,10,3,3,2,2", "descending")):
        page.js(f"{head}.querySelector('button').click()")
        assert page.js(column) == expected and page.js(f"{head}.getAttribute('aria-sort')") == sort
    loaded = "[...document.querySelectorAll('.sheet img')].every(image => image.complete && image.naturalWidth > 0)"
    page.until(loaded)


def test_the_gallery_leads_to_a_report(page: Browser, live: Live, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    picture(tmp_path, 1600, 1200)
    live.finish()
    server = Server(tmp_path.parent.resolve(), 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        page.open(f"http://127.0.0.1:{server.server_port}/")
        page.until("document.querySelector('.runs img').naturalWidth > 0")
        page.js(f"document.querySelector('.runs a[href^=\"{tmp_path.name}\"]').click()")
        page.until("document.body.dataset.state === 'finished' && viewer.view")
        assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.dark(True)
        page.until("getComputedStyle(document.body).backgroundColor === 'rgb(20, 24, 31)'")
        page.dark(False)
    finally:
        server.shutdown()
        server.server_close()
