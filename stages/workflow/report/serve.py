"""``stage=serve``: the runs of an output folder in a browser of this machine. It reads and never writes."""

from __future__ import annotations

import mimetypes
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from omegaconf import DictConfig

from stages.config import ConfigError
from stages.paths import anchored
from stages.workflow.report.gallery import gallery

HOST = "127.0.0.1"  # the loopback: nobody else's machine
_SHOWN = {".yaml": "text/plain", ".log": "text/plain", ".json": "application/json", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'self' 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PIECE = 1 << 20  # bytes of a file at a time


def serve(config: DictConfig) -> None:
    """Serve ``output_dir`` on the loopback until Ctrl-C.

    Raises:
        ConfigError: the port is taken, or there is no such folder.
    """
    root = anchored(config.output_dir).resolve()
    if not root.is_dir():
        raise ConfigError("output_dir", str(root), "a folder of runs")
    try:
        server = Server(root, config.serve.port)
    except (OSError, OverflowError) as error:
        hint = "serve.port=0 takes any that is free."
        raise ConfigError("serve.port", config.serve.port, f"a free port ({error})", hint) from None
    print(f"serves {root} at http://{HOST}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nno longer served", flush=True)
    finally:
        server.server_close()


class Server(ThreadingHTTPServer):
    """Of one output folder. Port 0: any that is free (``server_port``)."""

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        super().__init__((HOST, port), Handler)

    def find(self, path: str) -> Path | None:
        """The file or folder that a request's path means; None where it means nothing that may be read.

        Links lead into the store; none leads out of the output folder. Names that begin with a dot are ours
        (``.store``) or somebody's own; only pages of sweeps lie below one.
        """
        parts = [part for part in unquote(path).split("/") if part]
        if any(part.startswith(".") and (part, at) != (".sweeps", 0) for at, part in enumerate(parts)):
            return None
        if any("\0" in part or "\\" in part for part in parts):
            return None
        try:
            found = self.root.joinpath(*parts).resolve(strict=True)
        except (OSError, RuntimeError):  # not there, too long a name, links in a circle
            return None
        return found if found.is_relative_to(self.root) else None


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; what else a browser may ask for is refused by the base class (501)."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "highres-lowram", ""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        name = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if name not in (HOST, "localhost"):  # another site's name that leads here
            return self._send(HTTPStatus.FORBIDDEN, b"only for this machine\n", "text/plain")
        try:
            path = urlsplit(self.path).path
        except ValueError:  # no address
            return self._send(HTTPStatus.BAD_REQUEST, b"no address\n", "text/plain")
        if path == "/":
            return self._send(HTTPStatus.OK, gallery(self.server.root, time.time()).encode(), "text/html")
        found = self.server.find(path)
        if found is not None and found.is_dir() and (found / "report.html").is_file():
            return self._send(HTTPStatus.FOUND, b"", "text/plain", Location=f"/{path.strip('/')}/report.html")
        if found is None or not found.is_file():
            return self._send(HTTPStatus.NOT_FOUND, b"not here\n", "text/plain")
        kind = _SHOWN.get(found.suffix) or mimetypes.guess_type(found.name)[0] or "application/octet-stream"
        try:
            file = found.open("rb")
        except OSError:  # gone since, or not ours to read
            return self._send(HTTPStatus.NOT_FOUND, b"not here\n", "text/plain")
        with file:
            self._send(HTTPStatus.OK, file, kind)

    def _send(self, status: HTTPStatus, body: bytes | BinaryIO, kind: str, **headers: Any) -> None:
        size = len(body) if isinstance(body, bytes) else body.seek(0, 2)
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(size))
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        # a page of another site may name 127.0.0.1 too, and would load what a run says as a script of its own
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", _POLICY)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(body, bytes):
            self.wfile.write(body)
            return
        body.seek(0)
        while size and (piece := body.read(min(size, _PIECE))):  # no more than was said: a log grows meanwhile
            self.wfile.write(piece)
            size -= len(piece)
        self.close_connection |= bool(size)

    def log_message(self, format: str, *args: Any) -> None:
        """Not said: a page that lives asks every second."""

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError) as error:
            del error  # the browser went away in the middle of a file
