"""
A way to an S3 server on which things go wrong: an HTTP proxy whose `trouble` sees each request and decides
what the client gets. Without trouble it changes nothing.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_HEADERS = frozenset({"connection", "transfer-encoding", "content-length", "keep-alive", "server", "date"})
DRIBBLE_PARTS = 10
DRIBBLE_SECONDS = 0.01


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    """With its query."""
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def lists(self) -> bool:
        """Whether it asks for a listing."""
        return "list-type" in urlsplit(self.path).query


@dataclass(frozen=True)
class Reply:
    """What it gets. `announced`: the length that is promised, where that is not the body's."""

    status: int
    headers: dict[str, str]
    body: bytes
    announced: int | None = None
    dribbled: bool = False


Forward = Callable[[Request], Reply]
Trouble = Callable[[Request, Forward], Reply | None]
"""Makes the reply; None: the connection is closed without one."""


def none(request: Request, forward: Forward) -> Reply | None:
    """Everything works."""
    return forward(request)


def failure(status: int, code: str) -> Reply:
    """An error as S3 tells it."""
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>planned</Message></Error>'
    return Reply(status, {"Content-Type": "application/xml"}, text.encode())


class Proxy(ThreadingHTTPServer):
    """Listens on loopback, forwards to `endpoint`; counts in `fired` how often a trouble did something."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(endpoint).netloc
        self.trouble: Trouble = none
        self.fired = 0
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def suffering(self, trouble: Trouble) -> Iterator[None]:
        """Within the context there is trouble."""
        self.trouble, self.fired = trouble, 0
        try:
            yield
        finally:
            self.trouble = none

    def answer(self, request: Request) -> Reply | None:
        """The reply to a request."""
        plain: list[Reply] = []

        def forward(asked: Request) -> Reply:
            reply = self._forward(asked)
            if asked == request:
                plain.append(reply)
            return reply

        reply = self.trouble(request, forward)
        if [reply] != plain:
            with self.lock:
                self.fired += 1
        return reply

    def _forward(self, request: Request) -> Reply:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        headers = {name: value for name, value in request.headers.items() if name not in HOP_HEADERS}
        connection.request(request.method, request.path, request.body, headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_HEADERS}
        announced = int(answer.getheader("content-length") or 0) if request.method == "HEAD" else None
        return Reply(answer.status, kept, body, announced)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.answer(Request(self.command, self.path, headers, body))
        if reply is None:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        length = len(reply.body) if reply.announced is None else reply.announced
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self._send(reply)
            self.close_connection = self.close_connection or length != len(reply.body)

    def _send(self, reply: Reply) -> None:
        step = max(1, -(-len(reply.body) // DRIBBLE_PARTS)) if reply.dribbled else max(1, len(reply.body))
        for begin in range(0, len(reply.body), step):
            self.wfile.write(reply.body[begin : begin + step])
            self.wfile.flush()
            if reply.dribbled:
                threading.Event().wait(DRIBBLE_SECONDS)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815 - named by http.server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - named by http.server
        """Say nothing."""


@contextmanager
def bad_way_to(endpoint: str) -> Iterator[Proxy]:
    """A proxy that runs."""
    proxy = Proxy(endpoint)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(30)


# ---- troubles ----------------------------------------------------------------------------------------------


def sometimes(trouble: Trouble, *, every: int) -> Trouble:
    """Each `every`-th request suffers."""
    lock, seen = threading.Lock(), [0]

    def decide(request: Request, forward: Forward) -> Reply | None:
        with lock:
            seen[0] += 1
            hit = seen[0] % every == 0
        return trouble(request, forward) if hit else forward(request)

    return decide


def since(part: str, trouble: Trouble) -> Trouble:
    """All requests suffer from the first one on that puts an object whose name has this part."""
    begun = threading.Event()

    def decide(request: Request, forward: Forward) -> Reply | None:
        if request.method == "PUT" and part in request.path:
            begun.set()
        return trouble(request, forward) if begun.is_set() else forward(request)

    return decide


def only(method: str, trouble: Trouble) -> Trouble:
    """Requests of one method suffer; of GET, those for objects."""

    def decide(request: Request, forward: Forward) -> Reply | None:
        if request.method != method or request.lists:
            return forward(request)
        return trouble(request, forward)

    return decide


def answers(status: int, code: str) -> Trouble:
    """The server refuses, without an effect."""
    return lambda request, forward: failure(status, code)


def hangs_up(request: Request, forward: Forward) -> Reply | None:
    """The connection is closed before anything happened."""
    return None


def loses_answer(request: Request, forward: Forward) -> Reply | None:
    """What was asked is done, and nobody is told."""
    forward(request)
    return None


def dribbles(request: Request, forward: Forward) -> Reply | None:
    """The answer comes a few bytes at a time."""
    return replace(forward(request), dribbled=True)


def cuts_body(request: Request, forward: Forward) -> Reply | None:
    """Half of the body, and the connection is closed."""
    reply = forward(request)
    return replace(reply, body=reply.body[: len(reply.body) // 2], announced=len(reply.body))


def flips_bit(request: Request, forward: Forward) -> Reply | None:
    """One bit of the body is another."""
    reply = forward(request)
    at = len(reply.body) // 2
    return replace(reply, body=reply.body[:at] + bytes([reply.body[at] ^ 1]) + reply.body[at + 1 :])


def overwrites(request: Request, forward: Forward) -> Reply | None:
    """The condition of a put is ignored."""
    kept = {name: value for name, value in request.headers.items() if name != "if-none-match"}
    return forward(replace(request, headers=kept))


def ignores_ranges(request: Request, forward: Forward) -> Reply | None:
    """The whole object, whatever was asked for."""
    kept = {name: value for name, value in request.headers.items() if name != "range"}
    return forward(replace(request, headers=kept))


def shows_a_web_page(request: Request, forward: Forward) -> Reply | None:
    """Somebody on the way answers everything with a page that asks for a login."""
    return Reply(200, {"Content-Type": "text/html"}, b"<html><body>Please log in.</body></html>")


def lags_behind() -> Trouble:
    """A listing shows what was there at the listing before."""
    seen: dict[str, Reply] = {}

    def decide(request: Request, forward: Forward) -> Reply | None:
        if not request.lists:
            return forward(request)
        now = forward(request)
        before = seen.get(request.path)
        seen[request.path] = now
        return now if before is None else before

    return decide
