"""``stage=serve``: what may be read, that nothing else can, and that Ctrl-C ends it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Command

from stages.workflow.report.gallery import gallery
from stages.workflow.report.serve import Handler, Server


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    root = tmp_path / "outputs"
    result = root / ".store" / "stitch" / "f"
    for folder in (root / "poster" / "report", root / "empty", result / "zoom" / "0", root / ".sweeps" / "abc"):
        folder.mkdir(parents=True)
    (root / "poster" / "stitch").symlink_to("../.store/stitch/f")
    (root / "poster" / "out").symlink_to(tmp_path / "secret")
    (root / "poster" / "config.yaml").write_text("seed: 1\n")
    (root / "poster" / "report.html").write_text("<h1>poster</h1>")
    said = {"state": "running", "updated": 1000.0, "prompt": "a <cat>", "extent": "512x512"}
    (root / "poster" / "report" / "live.js").write_text(f"live({json.dumps(said)});\n")
    (result / "manifest.json").write_text(json.dumps({"files": {"image.png": {"bytes": 7_000_000}}}))
    (result / "zoom" / "zoom.json").write_text('{"levels": 1, "format": "jpg"}')
    (result / "zoom" / "0" / "0_0.jpg").write_bytes(b"jpeg")
    (root / ".sweeps" / "abc" / "sweep.html").write_text("sweep")
    (root / ".store" / "private.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    return root


@pytest.fixture
def server(outputs: Path) -> Iterator[Server]:
    made = Server(outputs.resolve(), 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.headers)
    connection.close()
    return found


def test_runs_and_what_their_links_lead_to_can_be_read(server: Server) -> None:
    status, body, headers = ask(server, "/")
    assert status == 200 and b"poster" in body and b"a &lt;cat&gt;" in body and b'href=".sweeps/abc/sweep.html"' in body
    assert (
        headers["Content-Type"] == "text/html; charset=utf-8"
        and "default-src 'none'" in headers["Content-Security-Policy"]
        and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    )
    assert ask(server, "/poster/report.html")[:2] == (200, b"<h1>poster</h1>")
    assert ask(server, "/poster")[2]["Location"] == "/poster/report.html"
    status, body, headers = ask(server, "/poster/stitch/zoom/0/0_0.jpg?7")
    assert (status, body, headers["Content-Type"]) == (200, b"jpeg", "image/jpeg")
    assert ask(server, "/poster/report/live.js")[2]["Content-Type"] == "text/javascript; charset=utf-8"
    assert ask(server, "/.sweeps/abc/sweep.html")[1] == b"sweep"
    status, body, headers = ask(server, "/poster/report.html", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "15")


@pytest.mark.parametrize(
    "path",
    [
        *("/../secret", "/poster/../../secret", "/%2e%2e/secret", "/poster/%2e%2e%2f%2e%2e/secret", "/poster/out"),
        *("/.store/private.json", "/poster/..%5csecret", "/poster/%00", "//secret", "/poster/report", "/nothing"),
        *("/.sweeps/../.store/private.json", "/poster/.sweeps", "/" + "a" * 5000, "/empty"),
    ],
)
def test_nothing_else_can(server: Server, path: str) -> None:
    assert ask(server, path)[:2] == (404, b"not here\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_is_written(server: Server, outputs: Path, method: str) -> None:
    before = sorted(outputs.rglob("*"))
    assert ask(server, "/poster/report.html", method)[0] == 501
    assert sorted(outputs.rglob("*")) == before


def test_another_sites_name_that_leads_here_is_refused(server: Server) -> None:
    assert ask(server, "/", Host="evil.example")[0] == 403
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0] == 200
    assert server.server_address[0] == "127.0.0.1"


def test_what_is_no_address_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as link:
        link.sendall(b"GET http://[ HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 400 ")


def test_of_a_file_that_grows_as_much_is_sent_as_was_said(
    server: Server, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = outputs / "poster" / "denoise.log"
    log.write_text("step 1\n")
    end_headers = Handler.end_headers

    def grows(self: Handler) -> None:
        end_headers(self)
        with log.open("a") as file:
            file.write("step 2\n")

    monkeypatch.setattr(Handler, "end_headers", grows)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    for expected in (b"step 1\n", b"step 1\nstep 2\n"):  # of one connection
        connection.request("GET", "/poster/denoise.log")
        assert connection.getresponse().read() == expected
    connection.close()


def test_a_run_that_goes_while_it_is_looked_at(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterdir = Path.iterdir
    gone = outputs / "poster" / "run.json.tmp"
    monkeypatch.setattr(
        Path, "iterdir", lambda path: [*iterdir(path), gone] if path.name == "poster" else iterdir(path)
    )
    monkeypatch.setattr(Path, "is_file", lambda path, own=Path.is_file: path == gone or own(path))
    assert "poster" in gallery(outputs, 1005.0)


def test_the_gallery_says_how_runs_are(outputs: Path) -> None:
    html = gallery(outputs, 1005.0)
    assert ">running</span>" in html and "512x512" in html and "7 MB, now" in html
    assert 'src="poster/stitch/zoom/0/0_0.jpg"' in html and "empty" not in html
    assert ">killed</span>" in gallery(outputs, 1000.0 + 7200) and "2 hours ago" in gallery(outputs, 1000.0 + 7200)
    (outputs / "poster" / "report" / "live.js").unlink()
    (outputs / "poster" / "run.json").write_text(json.dumps({"error": "denoise: it broke\nlog: x"}))
    html = gallery(outputs, time.time())
    assert ">failed</span>" in html and "denoise: it broke" in html and "log: x" not in html


def test_ctrl_c_ends_it_in_one_line(cli: Command) -> None:
    process = cli.start("stage=serve", "serve.port=0")
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith(f"serves {cli.output_dir.resolve()} at http://127.0.0.1:")
    port = int(first.split(":")[2].split("/")[0])
    taken = cli("stage=serve", f"serve.port={port}")
    assert taken.returncode == 1 and f"serve.port: got {port}, expected a free port" in taken.stderr
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.strip(), err) == (0, "no longer served", "")
