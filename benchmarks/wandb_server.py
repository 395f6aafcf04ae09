"""A stand-in for W&B's server, with as much of its protocol as the real client needs for a run.

It listens on 127.0.0.1 only and needs no login. `fault` makes it answer with errors, or not at all; `stop` ends it, and
`start` brings it back on the same port.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from benchmarks.wandb_backend import Backend


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def handle_request(self) -> None:
        host, path = self.server.host, unquote(urlsplit(self.path).path)
        body = self.body()
        if host.broken == "hang":
            self.close_connection = True
            host.stopping.wait()
        elif host.broken:
            self.reply(
                int(host.broken), {"error": "broken", "errors": [{"message": "broken"}]}
            )
        else:
            with host.lock:
                self.reply(200, self.answer(host.backend, path, body))

    do_GET = do_POST = do_PUT = handle_request  # noqa: N815 - the base class's names

    def answer(self, backend: Backend, path: str, body: bytes) -> Any:
        if path == "/graphql":
            query = json.loads(body)
            match = re.search(r"\b(?:query|mutation)\s+(\w+)", query["query"])
            operation = getattr(
                backend, f"on_{match[1].lower()}" if match else "", None
            )
            if operation is None:
                backend.unknown.append(query["query"])
                return {"data": None, "errors": [{"message": "unknown operation"}]}
            return {"data": operation(query.get("variables") or {})}
        if path.endswith("/file_stream"):
            return backend.stream(path.split("/")[-2], json.loads(body or b"{}"))
        backend.store(path.removeprefix("/storage/"), body)
        return {}

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            size = int(self.rfile.readline().split(b";")[0], 16)
            data += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return (
            gzip.decompress(data)
            if self.headers.get("Content-Encoding") == "gzip"
            else data
        )

    def reply(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: WandbServer) -> None:
        super().__init__(("127.0.0.1", host.port), Handler)
        self.host = host
        self.connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, *_: Any) -> None:
        pass  # a client that has disconnected


class WandbServer:
    """`with WandbServer() as server:`; `server.environment` points the real client to it."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend or Backend()
        self.lock = threading.RLock()
        self.port = 0  # any free one, at the first start
        self.broken = ""  # the current fault
        self._listener: _Listener | None = None

    def __enter__(self) -> WandbServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.stopping = threading.Event()
        self._listener = _Listener(self)
        self.port = self._listener.server_address[1]
        self.backend.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(
            target=self._listener.serve_forever, args=(0.05,), daemon=True
        ).start()

    def stop(self) -> None:
        """Cut every connection, as if the server died."""
        if self._listener is not None:
            self.stopping.set()
            self._listener.shutdown()
            self._listener.server_close()
            for connection in list(self._listener.connections):
                self._listener.shutdown_request(connection)
            self._listener = None

    def let_go(self) -> None:
        """In a forked process: close the inherited sockets, or the port stays open when the server stops."""
        if self._listener is not None:
            for socket in (self._listener.socket, *self._listener.connections):
                socket.close()

    def fault(self, kind: str) -> None:
        """Answer every request with an HTTP status, or not at all (`hang`); `""` ends the fault."""
        self.broken = kind
        if not kind:
            self.stopping.set()
            self.stopping = threading.Event()

    @property
    def environment(self) -> dict[str, str]:
        key = "0123456789" * 4
        return {
            "WANDB_BASE_URL": self.backend.url,
            "WANDB_API_KEY": key,
            "NO_PROXY": "127.0.0.1",
        }

    def wait_for_step(self, run: str, step: int, seconds: float = 20) -> None:
        """Return once a row of `step` or a later one has arrived."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with self.lock:
                if any(
                    row.get("step", -1) >= step for row in self.backend.history(run)
                ):
                    return
            time.sleep(0.05)
        raise TimeoutError(f"step {step} of {run} never arrived")
