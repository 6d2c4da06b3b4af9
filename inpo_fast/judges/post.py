"""One POST over HTTP that ends: a limit for the whole answer in time and in size, no redirect followed.

urllib's timeout is of one read: a server that sends a byte now and then would be listened to for ever. Here a clock
closes the connection, whatever it waits for: a proxy, the TLS handshake, headers, the body. What comes compressed is
never unpacked. Proxies are those of the environment (https_proxy), as urllib knows them.
"""

import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

LARGEST = 4 * 2**20  # bytes of an answer
LARGEST_REFUSAL = 2000  # bytes that are read of an error's page


@dataclass(frozen=True)
class Reply:
    status: int
    reason: str
    headers: http.client.HTTPMessage
    content: bytes


class TooLate(Exception):
    """No whole answer in time."""


class TooLarge(Exception):
    """An answer beyond LARGEST."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Headers would go along, and with them the key, to wherever the server says."""

    def redirect_request(self, *_args):
        return None


class _Clock:
    """Ends the connections of a request when its time is over: each wait on one of them returns at once."""

    def __init__(self, seconds: float):
        self.end, self.over = time.monotonic() + seconds, False
        self.sockets: list[socket.socket] = []
        self.lock = threading.Lock()
        self.timer = threading.Timer(seconds, self._ring)
        self.timer.daemon = True

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *_):
        self.timer.cancel()
        with self.lock:
            for own in self.sockets:
                own.close()
            self.sockets.clear()

    def connect(self, address, timeout=None, source_address=None) -> socket.socket:
        """In the place of socket.create_connection; a name's several addresses share what time is left."""
        problem: OSError = OSError(f"no address for {address[0]}")
        for family, kind, protocol, _, place in socket.getaddrinfo(*address, 0, socket.SOCK_STREAM):
            made = socket.socket(family, kind, protocol)
            try:
                made.settimeout(max(0.001, self.end - time.monotonic()))
                made.connect(place)
            except OSError as failed:
                made.close()
                problem = failed
                continue
            with self.lock:
                self.sockets.append(made.dup())  # TLS takes the other one over
            return made
        raise problem

    def _ring(self) -> None:
        self.over = True
        with self.lock:
            for own in self.sockets:
                with contextlib.suppress(OSError):  # closed already
                    own.shutdown(socket.SHUT_RDWR)


def _timed(kind: type, clock: _Clock) -> type:
    class Timed(kind):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self._create_connection = clock.connect

    return Timed


class _Http(urllib.request.HTTPHandler):
    def __init__(self, clock: _Clock):
        super().__init__()
        self.clock = clock

    def http_open(self, request):
        return self.do_open(_timed(http.client.HTTPConnection, self.clock), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, clock: _Clock):
        super().__init__()
        self.clock = clock

    def https_open(self, request):
        return self.do_open(_timed(http.client.HTTPSConnection, self.clock), request, context=self._context)


def post(url: str, body: bytes, headers: dict[str, str], seconds: float) -> Reply:
    """The answer, of whatever status. seconds: until all of it is here.

    TooLate, TooLarge, OSError or http.client.HTTPException where there is none.
    """
    with _Clock(seconds) as clock:
        opener = urllib.request.build_opener(_NoRedirect, _Http(clock), _Https(clock))
        try:
            try:
                reply = opener.open(urllib.request.Request(url, body, headers), timeout=seconds)
            except urllib.error.HTTPError as refused:
                reply = refused
            with reply:
                whole = reply.status < 300
                content = reply.read(LARGEST + 1 if whole else LARGEST_REFUSAL)
                late = clock.over  # a cut connection can look like the end of an answer without a length
        except (OSError, http.client.HTTPException, ValueError) as problem:
            if clock.over or isinstance(getattr(problem, "reason", problem), TimeoutError):
                raise TooLate(f"no whole answer within {seconds:g} s") from problem
            if isinstance(problem, ValueError) and not isinstance(problem, OSError):
                raise http.client.HTTPException(str(problem)) from problem  # a malformed answer's
            raise
        if late:
            raise TooLate(f"no whole answer within {seconds:g} s")
        if len(content) > LARGEST:
            raise TooLarge(f"an answer of more than {LARGEST / 2**20:g} MiB")
        return Reply(reply.status, reply.reason or "", reply.headers, content)
