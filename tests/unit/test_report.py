"""run.json and report.html: what they say while a run lives and when it has ended, and that the page stands alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from stages import PIPELINE
from stages.config import ConfigError
from stages.events import Advance, Note, Start
from stages.job import Job
from stages.memory.monitor import Sample
from stages.plans import StagePlan
from stages.workflow.graph import StageState
from stages.workflow.launch import StageFailed, StageResult, reused
from stages.workflow.report import Live, rows, summary
from stages.workflow.store import Store

Make = Callable[..., Live]


def result(name: str, status: str = "ran", peak: int = 500_000_000) -> StageResult:
    timeline = tuple(Sample(t / 10, peak - abs(t - 20) * 10**6, peak // 2, peak // 4, f"unet.{t}") for t in range(50))
    marks = ((1.5, "step 7 </script>"),)
    return StageResult(
        name, status, "no result yet", 5.0, peak, 0, "f" * 64, "unet.20", (("unet.20", peak),), timeline, marks=marks
    )


class Process:
    """Of a stage that runs."""

    timeline = result("x").timeline[:30]


@pytest.fixture
def make(make_config: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(summary, "own_peak_rss", lambda: 40_000_000)  # this process has run other tests before

    def made(*names: str, prompt: str = "a cat") -> Live:
        stages = [stage for stage in PIPELINE if stage.name in names]
        store = Store(tmp_path / ".store")
        states = [
            StageState(stage=one, needs=(), payload={}, fingerprint="f", entry=store.entry(one.name, "f"), status="run")
            for one in stages
        ]
        job = Job.of(make_config({"run": "x", "prompt": prompt}))
        return Live(tmp_path, job, states, "python runner.py run=x", f"python runner.py 'prompt={prompt}'")

    return made


def embedded(html: str, name: str) -> dict:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.DOTALL)
    assert found, name
    return json.loads(found[1])


def said(folder: Path) -> dict:
    text = (folder / "report" / "live.js").read_text()
    return json.loads(text.removeprefix("live(").removesuffix(");\n"))


def test_both_files(make: Make, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"png")
    live = make("lowres", "denoise", prompt="<script>alert(1)</script> & ${x}")
    live.planned({"denoise": StagePlan(predicted_peak_rss_bytes=123_000_000, predicted_seconds=7.0)})
    live.end(result("lowres"))
    live.end(result("denoise", peak=700_000_000))
    told = live.finish()
    assert json.loads((tmp_path / "run.json").read_text()) == told
    assert told["image"] == "image.png"
    assert told["peak_rss_bytes"] == 700_000_000
    assert told["budget_bytes"] == 800_000_000
    needed = {"name", "status", "reason", "seconds", "peak_rss_bytes", "predicted_peak_rss_bytes", "peak_vram_bytes"}
    assert all(needed | {"fingerprint"} <= set(stage) for stage in told["stages"])
    assert [stage["predicted_peak_rss_bytes"] for stage in told["stages"]] == [None, 123_000_000]
    html = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in html and "step 7 </script>" not in html
    assert not re.search(r"""(?:src|href)=["'](?:https?:|/)""", html)
    assert embedded(html, "picture")["image"] == "image.png"
    lines = embedded(html, "lines")
    assert lines["budget"] == 800_000_000 and [stage["name"] for stage in lines["stages"]] == ["lowres", "denoise"]
    assert lines["stages"][1]["line"]["rss"][20] == 700 and lines["stages"][1]["marks"] == [[1.5, "step 7 </script>"]]
    assert said(tmp_path)["state"] == "finished"


def test_a_reused_stage_has_the_seconds_of_when_it_was_computed(make: Make, tmp_path: Path) -> None:
    live = make("lowres")
    state = live._states[0]
    state.entry.write_stats(result("lowres")._replace(seconds=83.0).stats())
    live.end(reused(state))
    (stage,) = live.finish()["stages"]
    assert (stage["seconds"], stage["computed_seconds"], stage["status"]) == (0.0, 83.0, "reused")
    html = (tmp_path / "report.html").read_text()
    assert "1 min 23 s" in html and "those of when it was computed" in html
    assert embedded(html, "lines")["stages"][0]["marks"] == [[1.5, "step 7 </script>"]]


def test_the_page_lives(make: Make, tmp_path: Path) -> None:
    with make("lowres", "denoise") as live:
        html = (tmp_path / "report.html").read_text()
        assert 'data-state="running"' in html and "report/live.js" in html and "python runner.py run=x" in html
        live.planned({"denoise": StagePlan(predicted_seconds=100.0)})
        live.begin("lowres")
        live.watch(Process())  # type: ignore[arg-type]
        for event in (Start(20, "steps", 5), Advance(3), Note("warning: hot")):
            live.event(event)
        live._say("running")
        told = said(tmp_path)
        assert told["state"] == "running" and told["updated"] >= told["began"]
        now = told["now"]
        assert (now["stage"], now["done"], now["total"], now["note"]) == ("lowres", 8, 20, "warning: hot")
        assert now["rss"] == Process.timeline[-1].rss and now["module"] == "unet.29"
        assert now["all_left"] == pytest.approx(now["left"] + 100)
        assert [stage["status"] for stage in told["stages"]] == ["running", "waits"]
        assert len(told["stages"][0]["line"]["rss"]) == 30
        (tmp_path / "report" / "preview_lowres.png").write_bytes(b"png")
        live._say("running")
        assert said(tmp_path)["preview"]["src"].startswith("report/preview_lowres.png?")
        live.finish("lowres: it broke")
    html = (tmp_path / "report.html").read_text()
    assert 'data-state="failed"' in html and "lowres: it broke" in html and "live.js" not in html
    assert 'class="last"><img src="report/preview_lowres.png?' in html
    assert '<td data-is="status">failed</td>' in html and '<td data-is="status">waits</td>' in html
    assert json.loads((tmp_path / "run.json").read_text())["error"] == "lowres: it broke"


@pytest.mark.parametrize(
    ("error", "state", "kept"),
    [
        (ConfigError("width", 3, "8"), "failed", True),
        (StageFailed("profile: it broke"), "failed", False),
        (KeyboardInterrupt(), "stopped", False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_that_ends_before_its_stages_do_is_final(make: Make, tmp_path: Path, error, state, kept) -> None:
    with pytest.raises(type(error)), make("lowres"):
        raise error
    html = (tmp_path / "report.html").read_text()
    assert f'data-state="{state}"' in html and said(tmp_path)["state"] == state
    assert str(error).partition(":")[0] in html
    assert ("Mend that in the command:" if kept else "Go on with:") in html
    assert (tmp_path / "run.json").exists() != kept


def test_a_line_keeps_its_peak_and_stays_short() -> None:
    samples = [Sample(t / 50, 10**8 + (5 * 10**8 if t == 777 else t), 10**7, 0, f"m{t % 3}") for t in range(2000)]
    drawn = rows.line(samples, 100)
    assert len(drawn["rss"]) <= 100 and max(drawn["rss"]) == 600 and drawn["vram"] == []
    assert drawn["modules"][drawn["module"][drawn["rss"].index(600)]] == "m0"


def test_what_the_gpu_holds_is_told_where_there_is_one(make: Make, tmp_path: Path) -> None:
    live, on_gpu = make("lowres", "denoise"), result("denoise")
    live.end(result("lowres"))
    live.end(
        on_gpu._replace(peak_vram_bytes=6, timeline=tuple(one._replace(vram=6 * 10**8) for one in on_gpu.timeline))
    )
    live.finish()
    html = (tmp_path / "report.html").read_text()
    lines = embedded(html, "lines")["stages"]
    assert lines[0]["line"]["vram"] == [] and set(lines[1]["line"]["vram"]) == {600} and "GPU, MB" in html


def test_the_seams_that_stitch_measured_are_shown(make: Make, tmp_path: Path) -> None:
    border = {"axis": "column", "position": 256, "gradient": 3.0, "nearby": 2.0, "aligned": 2.0, "ratio": 1.5}
    borders = [{**border, "worst": 2.5, "position": 8 * index} for index in range(40)]
    found = {"decode": {"ratio": 1.01, "local_ratio": 1.02, "lattice_ratio": 0.99, "borders": borders}}
    (tmp_path / "stitch").mkdir()
    (tmp_path / "stitch" / "seams.json").write_text(json.dumps(found))
    make("stitch").finish()
    html = (tmp_path / "report.html").read_text()
    assert 'src="stitch/seams_decode.png"' in html
    assert html.count("<td>column</td>") == 10
    assert all(text in html for text in ("1.010", "1.020", "0.990"))


def test_the_viewer_knows_tiles_grids_and_regions(make: Make, make_config, tmp_path: Path) -> None:
    from stages.workflow.report.page import picture

    (tmp_path / "image.png").write_bytes(b"png")
    (tmp_path / "stitch" / "zoom").mkdir(parents=True)
    (tmp_path / "stitch" / "zoom" / "zoom.json").write_text(json.dumps({"levels": 3, "tile": 512, "format": "jpg"}))
    regions = [{"prompt": "sea", "box": [0, 0, 2048, 2048]}]
    found = picture(tmp_path, Job.of(make_config({"run": "x", "prompt": "", "regions": regions})))
    assert found is not None and found["zoom"] == {"levels": 3, "tile": 512, "format": "jpg", "folder": "stitch/zoom"}
    assert found["regions"] == [{"box": [0, 0, 2048, 2048], "prompt": "sea"}]
    for grid in found["grids"].values():
        assert grid["rows"][0][0] == 0 and grid["rows"][-1][1] == 2048 and len(grid["cols"]) > 1
