"""A proxy before an object store, on loopback, that answers wrongly when it is told to."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEPT = {"connection", "transfer-encoding", "keep-alive"}


@dataclass
class Trouble:
    """What happens to requests of a method whose path matches `at`, after the first `skip`.

    A status such as 503, or `reset`, `hang` for `seconds`, `truncate` the answer, or `deaf`: the
    store does what it is asked to, and the answer is lost.
    """

    method: str
    at: str
    kind: int | str
    skip: int = 0
    times: int = 1
    seconds: float = 3.0
    n_met: int = field(default=0, init=False)

    def meets(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.at, path):
            return False
        self.n_met += 1
        return self.skip < self.n_met <= self.skip + self.times

    @property
    def n_suffered(self) -> int:
        return max(0, min(self.n_met - self.skip, self.times))


class Proxy:
    """Hands requests on to the store at `target` port; a context manager."""

    def __init__(self, target: int) -> None:
        self.troubles: list[Trouble] = []
        self.requests: Counter[tuple[str, str]] = Counter()
        self.target = target
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def suffer(self, *troubles: Trouble) -> None:
        """From now on these, and counting anew."""
        with self.lock:
            self.troubles = list(troubles)
            self.requests.clear()

    def meet(self, method: str, path: str) -> Trouble | None:
        with self.lock:
            self.requests[method, path.partition("?")[0]] += 1
            # All of them count the request; the first that is due is suffered.
            met = [trouble for trouble in self.troubles if trouble.meets(method, path)]
            return met[0] if met else None


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _handle(self) -> None:
        body = self._body()
        trouble = self.proxy.meet(self.command, self.path)
        kind = trouble.kind if trouble else None
        if isinstance(kind, int):
            self._answer(kind, {}, _explanation(kind))
        elif kind == "reset":
            self._reset()
        elif kind == "hang":
            assert trouble is not None
            time.sleep(trouble.seconds)
            self._reset()
        else:
            status, headers, answer = self._ask(body)
            if kind == "deaf":
                self._reset()
            else:
                self._answer(status, headers, answer, cut=kind == "truncate")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while n := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(n))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.target, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in KEPT}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in KEPT | {"content-length"}:
                self.send_header(name, value)
        # Of an answer to HEAD it is the length of what GET would give.
        length = headers.get("Content-Length", headers.get("content-length"))
        n_bytes = length if self.command == "HEAD" and length else str(len(content))
        self.send_header("Content-Length", n_bytes)
        self.end_headers()
        if cut:
            self.wfile.write(content[: len(content) // 2])
            self._reset()
        elif self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        self.wfile.flush()
        # Without a pause for what is not read yet: the other side sees a broken connection.
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def _explanation(status: int) -> bytes:
    code = {403: "AccessDenied", 429: "SlowDown", 503: "SlowDown"}.get(status, "InternalError")
    return f"<Error><Code>{code}</Code><Message>as planned</Message></Error>".encode()
