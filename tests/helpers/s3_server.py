"""S3 over real HTTP for tests: moto's server on a free port, which can be told to fail at chosen requests.

Requests are answered one after the other, since AWS promises that of two conditional writes one fails, which moto's
threads do not.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "photos"

_XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{words}</Message></Error>'
_ANSWERS = {
    "internal": ("500 Internal Server Error", "InternalError"),
    "slow_down": ("503 Slow Down", "SlowDown"),
    "unavailable": ("503 Service Unavailable", "ServiceUnavailable"),
    "throttled": ("429 Too Many Requests", "TooManyRequests"),
    "conflict": ("409 Conflict", "ConditionalRequestConflict"),
    "incomplete": ("400 Bad Request", "IncompleteBody"),
    "denied": ("403 Forbidden", "AccessDenied"),
    "bad_request": ("400 Bad Request", "InvalidArgument"),
    "not_implemented": ("501 Not Implemented", "NotImplemented"),
    "bad_gateway": ("502 Bad Gateway", ""),  # of a proxy in between: its body is not S3's
}


@dataclass
class Fault:
    """What to do with requests.

    Attributes:
        kind: a name of `_ANSWERS`; `reset`: close the connection; `lost`: do what is asked, then close it; `timeout`:
            be silent for `seconds`, then close it; `mute`: do what is asked, then never answer; `cut`: send half of the
            body and close; `short`: send half of the body as if it were all.
        method, part: requests concerned: HTTP method, and what their path or query holds.
        avoid: what their path or query must not hold; empty for nothing.
        times: so many requests at most; None for all.
        share: of the requests concerned, at random by `seed`.
        seen: how many were failed.
    """

    kind: str
    method: str = ""
    part: str = ""
    avoid: str = ""
    times: int | None = 1
    share: float = 1.0
    seconds: float = 3.0
    seed: int = 0
    seen: int = 0
    dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def hits(self, method: str, target: str) -> bool:
        if self.times is not None and self.seen >= self.times:
            return False
        if self.method not in ("", method) or self.part not in target or (self.avoid and self.avoid in target):
            return False
        if self.dice.random() >= self.share:
            return False
        self.seen += 1
        return True


class _Quiet(WSGIRequestHandler):
    def log(self, *args) -> None:
        pass


class S3Server:
    """A server with one bucket, `BUCKET`."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._turn = threading.Lock()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # method, path with query
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that are to use it: endpoint and credentials as AWS's clients read them; botocore's own
        repetitions off, so that a fault is seen; no waiting for long."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
            "FSSPEC_S3": '{"config_kwargs": {"read_timeout": 2, "connect_timeout": 2}}',
        }

    @property
    def storage_options(self) -> dict:
        """The same for one file system."""
        return {
            "endpoint_url": self.url,
            "key": "test",
            "secret": "test",
            "config_kwargs": {"read_timeout": 2, "connect_timeout": 2, "retries": {"total_max_attempts": 1}},
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @contextmanager
    def failing(self, *faults: Fault) -> Iterator[tuple[Fault, ...]]:
        """These faults while the block lasts."""
        self.faults += faults
        try:
            yield faults
        finally:
            self.faults = [fault for fault in self.faults if fault not in faults]

    def _answer(self, environ, start_response):
        method = environ["REQUEST_METHOD"]
        target = environ["PATH_INFO"] + "?" + environ.get("QUERY_STRING", "")
        with self._turn:
            self.requests.append((method, target))
            kind = next((fault for fault in self.faults if fault.hits(method, target)), None)
        if kind is None:
            return self._do(environ, start_response)
        name = kind.kind
        if name == "timeout":
            time.sleep(kind.seconds)
        if name in ("lost", "mute"):
            self._do(environ, lambda *args, **more: None)
        if name == "mute":
            raise ConnectionError  # the connection stays open
        if name in ("timeout", "lost", "reset"):
            self._hang_up(environ)
        if name in ("cut", "short"):
            return self._half(environ, start_response, name)
        # The body was sent: a client that still writes would not see the answer.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = _ANSWERS[name]
        body = _XML.format(code=code, words=f"injected {name}").encode() if code else b"<html>bad gateway</html>"
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]

    @staticmethod
    def _hang_up(environ) -> None:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionError

    def _do(self, environ, start_response) -> list[bytes]:
        with self._turn:
            return [b"".join(self._app(environ, start_response))]

    def _half(self, environ, start_response, name: str) -> Iterator[bytes]:
        told: list = []
        (body,) = self._do(environ, lambda status, headers, *more: told.extend((status, headers)))
        status, headers = told
        half = body[: len(body) // 2]
        if name == "short":
            headers = [(k, v) for k, v in headers if k.lower() != "content-length" and "checksum" not in k.lower()]
            headers.append(("Content-Length", str(len(half))))
        start_response(status, headers)
        yield half
        if name == "cut":
            self._hang_up(environ)
