"""run.json and report.html: what they say, and that they stand alone."""

import json
import re

import pytest

from stages.job import Job
from stages.memory.monitor import Sample
from stages.plans import StagePlan
from stages.workflow import report
from stages.workflow.launch import StageResult


def result(name: str, status: str = "ran", peak: int = 500_000_000) -> StageResult:
    timeline = tuple(Sample(t / 10, peak - abs(t - 20) * 10**6, peak // 2, peak // 4, f"unet.{t}") for t in range(50))
    return StageResult(name, status, "no result yet", 5.0, peak, 0, "f" * 64, "unet.20", (("unet.20", peak),), timeline)


def test_both_files(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "own_peak_rss", lambda: 40_000_000)  # this process has run other tests before
    job = Job.of(make_config({"run": "x", "prompt": "<script>alert(1)</script> & ${x}"}))
    (tmp_path / "image.png").write_bytes(b"png")
    predictions = {"denoise": StagePlan(predicted_peak_rss_bytes=123_000_000)}
    summary = report.write(tmp_path, job, [result("lowres"), result("denoise", peak=700_000_000)], predictions)
    assert json.loads((tmp_path / "run.json").read_text()) == summary
    assert summary["image"] == "image.png"
    assert summary["peak_rss_bytes"] == 700_000_000
    assert summary["budget_bytes"] == 800_000_000
    needed = {"name", "status", "reason", "seconds", "peak_rss_bytes", "predicted_peak_rss_bytes", "peak_vram_bytes"}
    assert all(needed | {"fingerprint"} <= set(stage) for stage in summary["stages"])
    assert [stage["predicted_peak_rss_bytes"] for stage in summary["stages"]] == [None, 123_000_000]
    html = (tmp_path / "report.html").read_text()
    assert "<script>" not in html
    assert not re.search(r"""(?:src|href)=["'](?:https?:|/)""", html)
    assert 'src="image.png"' in html
    assert html.count("<polyline") == 4
    assert "budget 800 MB" in html
    assert "700 MB unet.20" in html


def test_what_the_gpu_holds_is_drawn_where_there_is_one(make_config, tmp_path):
    on_gpu = result("denoise")
    on_gpu = on_gpu._replace(timeline=tuple(sample._replace(vram=600_000_000) for sample in on_gpu.timeline))
    html = report.render(tmp_path, Job.of(make_config({"run": "x"})), [result("lowres"), on_gpu], {}, "")
    assert html.count("<polyline") == 5 and "GPU's allocator" in html
    assert "GPU's allocator" not in report.render(
        tmp_path, Job.of(make_config({"run": "x"})), [result("lowres")], {}, ""
    )


def test_a_failed_run_is_reported_too(make_config, tmp_path):
    summary = report.write(tmp_path, Job.of(make_config({"run": "x"})), [], {}, "lowres: it broke")
    assert summary["error"] == "lowres: it broke"
    assert summary["image"] is None
    assert summary["stages"] == []
    assert "lowres: it broke" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("budget", [100, 10**9, 10**12])
def test_the_plot_stays_inside_its_box(budget):
    drawn = report.plot([result("a"), result("b")], budget)
    points = [point.split(",") for lane in drawn["lanes"] for point in lane.points.split()]
    assert all(60 <= float(x) <= 960.1 and 0 <= float(y) <= 230 for x, y in points)
    assert 0 <= drawn["budget"] <= 230
    assert drawn["lanes"][1].left == pytest.approx(510)


def test_the_seams_that_stitch_measured_are_shown(make_config, tmp_path):
    border = {"axis": "column", "position": 256, "gradient": 3.0, "nearby": 2.0, "aligned": 2.0, "ratio": 1.5}
    borders = [{**border, "worst": 2.5, "position": 8 * index} for index in range(40)]
    found = {"decode": {"ratio": 1.01, "local_ratio": 1.02, "lattice_ratio": 0.99, "borders": borders}}
    (tmp_path / "stitch").mkdir()
    (tmp_path / "stitch" / "seams.json").write_text(json.dumps(found))
    report.write(tmp_path, Job.of(make_config({"run": "x"})), [result("stitch")], {})
    html = (tmp_path / "report.html").read_text()
    assert 'src="stitch/seams_decode.png"' in html
    assert html.count("<td>column</td>") == 10
    assert all(text in html for text in ("1.010", "1.020", "0.990"))
