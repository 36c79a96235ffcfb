"""A sender for a server on the same two cores: some 20 µs of CPU a request, in a process of its own, answers checked.

    with Sender("127.0.0.1", 8080, golden) as sender:
        found = sender.run(Plan("/predictions/digits/1.0", rate=5000, seconds=2.0, connections=128))
        np.percentile(found.latencies, 99)          # ms, from when each request was due

The load test proper (`run`) knows gRPC, token renewal, rollouts and writes every request down; that costs it ten times
as much. Here requests are made in advance, sockets are raw, and an answer whose bytes were found right once is right
again. A request that is due while every connection is busy waits, and that counts. Linux only (epoll).
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import select
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from marwright.errors import DataError, ServerError, ServerUnreachable, SettingsError
from marwright.packing import golden
from marwright.packing.golden import Golden

HUNG = 5.0
"""Seconds after which a request that was sent and not answered counts as failed."""
_PIECE = 1 << 18
_REMEMBERED = 4096
_OK = b"HTTP/1.1 200"
_END = b"\r\n\r\n"
_CLOSE = b"onnection: close"


@dataclass(frozen=True)
class Plan:
    """One run against one path. `rate` 0 is a closed loop: each connection sends again as soon as it is answered."""

    path: str
    rate: float
    """Requests a second, at random times (Poisson)."""
    seconds: float
    connections: int
    key: str = ""
    """Inference token; empty: none is sent."""
    patience: float = 1.0
    """Seconds. A request that could not even be sent for so long ends the run: the server is overloaded."""
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    requests: int
    """That were answered, rightly or not, or that failed."""
    seconds: float
    """From the first due time to the last answer."""
    latencies: NDArray[np.float32]
    """Milliseconds from due to answered, of right answers, in the order in which they came; of requests that an
    overloaded server never let us send, how long they had waited."""
    failures: dict[str, int] = field(default_factory=dict)
    """What was wrong → how often."""
    overloaded: bool = False
    cpu: float = 0.0
    """Share of one core that the sender used."""


class Sender:
    """The process that sends; ends with the `with`, or with the process that made it."""

    def __init__(self, host: str, port: int, examples: Sequence[Golden]) -> None:
        if not hasattr(select, "epoll"):
            raise SettingsError("this load generator needs Linux (epoll)", hint="`marwright loadtest` runs anywhere")
        if not examples:
            raise DataError("there are no requests to send", hint="build the archive again: it has golden examples")
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, host, port, tuple(examples)), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, plan: Plan) -> Outcome:
        """ServerUnreachable where no connection can be made; ServerError where the sender itself has ended."""
        try:
            self._pipe.send(plan)
            until = time.monotonic() + plan.seconds + plan.patience + 2 * HUNG + 30.0
            while not self._pipe.poll(0.2):
                if time.monotonic() > until:
                    self._process.kill()
                    raise ServerError("the sender does not come to an end", hint="try again on a calmer machine")
            found = self._pipe.recv()
        except (EOFError, OSError):
            raise ServerError("the sending process has ended", hint="try again") from None
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Outcome)
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _serve(pipe: Connection, host: str, port: int, examples: Sequence[Golden]) -> None:
    """The process: plans come in, outcomes go out, until the other side has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this
    gc.disable()
    right: list[set[bytes]] = [set() for _ in examples]
    with contextlib.suppress(EOFError, OSError):
        while True:
            plan = pipe.recv()
            try:
                result: Outcome | Exception = _Run(plan, host, port, examples, right).go()
            except Exception as error:
                result = error
            pipe.send(result)
            gc.collect()


class _Link:
    """One connection, and the request that is on it. `example` is -1 while there is none."""

    __slots__ = ("due", "example", "have", "left", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.example = -1
        self.due = 0.0
        self.have = b""
        """Of the answer, so far."""
        self.left = b""
        """Of the request, not taken by the socket yet."""


class _Run:
    """One plan being carried out."""

    def __init__(self, plan: Plan, host: str, port: int, examples: Sequence[Golden], right: list[set[bytes]]) -> None:
        self._plan = plan
        self._host, self._port = host, port
        self._examples = examples
        self._right = right
        self._requests = [_request(plan, f"{host}:{port}", one) for one in examples]
        self._epoll = select.epoll()
        self._links: dict[int, _Link] = {}
        self._free: deque[int] = deque()
        self._latencies: list[float] = []
        self._failures: Counter[str] = Counter()
        self._flying = 0

    def go(self) -> Outcome:
        cpu = time.process_time()
        try:
            for _ in range(self._plan.connections):
                self._connect()
            began = time.perf_counter()
            overloaded, sent = self._loop(began)
            seconds = time.perf_counter() - began
        finally:
            for link in self._links.values():
                link.sock.close()
            self._epoll.close()
        return Outcome(
            requests=sent,
            seconds=seconds,
            latencies=np.array(self._latencies, np.float32) * 1000,
            failures=dict(self._failures),
            overloaded=overloaded,
            cpu=(time.process_time() - cpu) / max(seconds, 1e-9),
        )

    def _loop(self, began: float) -> tuple[bool, int]:
        """Send what is due and take what comes until all is answered: whether it was too much, and how many."""
        plan, clock, poll, free = self._plan, time.perf_counter, self._epoll.poll, self._free
        closed = plan.rate <= 0
        times = [] if closed else _due_times(plan)
        end = began + plan.seconds
        count, at, looked = len(times), 0, began
        overloaded = False
        while True:
            now = clock()
            wait = 0.05
            if closed:
                while free and (now := clock()) < end:
                    self._send(free.popleft(), now, at)
                    at += 1
            else:
                while at < count:
                    due, now = began + times[at], clock()
                    wait = due - now
                    if wait > 0:
                        break
                    if not free:
                        wait = 0.05
                        if now - due > plan.patience:
                            overloaded = True
                            self._latencies += [now - began - late for late in times[at:] if began + late < now]
                            count = at
                        break
                    self._send(free.popleft(), due, at)
                    at += 1
                else:
                    wait = 0.05
            if not self._flying and (now >= end if closed else at >= count):
                return overloaded, at
            if wait < 0.05:  # epoll knows milliseconds only, select microseconds
                select.select((self._epoll,), (), (), wait)
                events = poll(0)
            else:
                events = poll(wait)
            for number, event in events:
                self._ready(number, event)
            if now - looked > 0.5:
                looked = now
                self._give_up(now)

    # ---------------------------------------------------------------- one connection

    def _connect(self) -> None:
        try:
            sock = socket.create_connection((self._host, self._port), timeout=5.0)
        except OSError as error:
            raise ServerUnreachable(f"no connection to {self._host}:{self._port}: {error}", hint="try again") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._links[sock.fileno()] = _Link(sock)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._free.append(sock.fileno())

    def _renew(self, number: int) -> None:
        """Another connection in place of one that is of no use any more."""
        with contextlib.suppress(ValueError):
            self._free.remove(number)
        self._epoll.unregister(number)
        self._links.pop(number).sock.close()
        self._connect()

    def _send(self, number: int, due: float, turn: int) -> None:
        link = self._links[number]
        link.example = turn % len(self._requests)
        link.due = due
        self._flying += 1
        request = self._requests[link.example]
        try:
            taken = link.sock.send(request)
        except BlockingIOError:
            taken = 0
        except OSError as error:
            self._fail(number, f"broken: {type(error).__name__}", renew=True)
            return
        if taken < len(request):
            link.left = request[taken:]
            self._epoll.modify(number, select.EPOLLIN | select.EPOLLOUT)

    def _ready(self, number: int, event: int) -> None:
        link = self._links.get(number)
        if link is None:  # given up in this very round
            return
        if event & select.EPOLLOUT and link.left:
            with contextlib.suppress(OSError):  # a broken one is read, too, and found broken there
                link.left = link.left[link.sock.send(link.left) :]
            if not link.left:
                self._epoll.modify(number, select.EPOLLIN)
        if not event & ~select.EPOLLOUT:
            return
        try:
            data = link.sock.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or link.example < 0:
            if link.example >= 0:
                self._fail(number, "broken: the server closed the connection", renew=True)
            else:
                self._renew(number)
            return
        if link.have:
            data = link.have + data
        cut = data.find(_END)
        if data.startswith(_OK) and data[cut + 4 :] in self._right[link.example] and data.find(_CLOSE, 0, cut) < 0:
            self._latencies.append(time.perf_counter() - link.due)
            link.example, link.have = -1, b""
            self._flying -= 1
            self._free.append(number)
        else:
            self._judge(number, link, data)

    def _judge(self, number: int, link: _Link, data: bytes) -> None:
        """An answer that is not whole yet, or is seen for the first time, or is wrong."""
        head, found, body = data.partition(_END)
        if not found:
            link.have = data
            return
        lines = head.lower().split(b"\r\n")
        lengths = [line[15:] for line in lines if line.startswith(b"content-length:")]
        if not lengths or not lengths[0].strip().isdigit() or not head.startswith(b"HTTP/1.1 "):
            self._fail(number, "not an HTTP/1.1 answer with a Content-Length", renew=True)
            return
        length = int(lengths[0])
        if len(body) < length:
            link.have = data
            return
        renew = b"connection: close" in lines or len(body) > length
        status = head[9:12].decode("latin-1")
        if len(body) > length:
            why = "more bytes than the answer has"
        elif status != "200":
            why = f"status {status}: {body[:120].decode('utf-8', 'replace')}"
        else:
            why = _wrong(self._examples[link.example], body)
        if why:
            self._fail(number, why, renew=renew)
            return
        right = self._right[link.example]
        if len(right) >= _REMEMBERED:
            right.clear()
        right.add(body)
        self._latencies.append(time.perf_counter() - link.due)
        link.example, link.have = -1, b""
        self._flying -= 1
        self._free.append(number)
        if renew:
            self._renew(number)

    def _fail(self, number: int, why: str, *, renew: bool) -> None:
        link = self._links[number]
        renew = renew or bool(link.left)  # the server still waits for the rest of the request
        link.example, link.have, link.left = -1, b"", b""
        self._flying -= 1
        self._failures[" ".join(why.split())] += 1
        if renew:
            self._renew(number)
        else:
            self._free.append(number)

    def _give_up(self, now: float) -> None:
        for number, link in list(self._links.items()):
            if link.example >= 0 and now - link.due > HUNG + self._plan.patience:
                self._fail(number, f"no answer within {HUNG:g} s", renew=True)


def _due_times(plan: Plan) -> list[float]:
    """Seconds from the start, of a Poisson process; the same seed gives the same pattern at every rate."""
    expected = plan.rate * plan.seconds
    gaps = np.random.default_rng(plan.seed).exponential(1.0, int(expected + 10 * expected**0.5 + 10))
    times = np.cumsum(gaps) / plan.rate
    return [float(one) for one in times[times < plan.seconds]]


def _request(plan: Plan, host: str, example: Golden) -> bytes:
    kind = "application/json" if example.name.endswith(".json") else "application/octet-stream"
    lines = [f"POST {plan.path} HTTP/1.1", f"Host: {host}", f"Content-Type: {kind}"]
    lines += [f"Content-Length: {len(example.body)}", *([f"Authorization: Bearer {plan.key}"] if plan.key else [])]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + example.body


def _wrong(example: Golden, body: bytes) -> str:
    """What is wrong with the body of an answer; empty where nothing is."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        return f"not JSON: {body[:80]!r}"
    if not isinstance(value, dict) or not all(type(score) in (float, int) for score in value.values()):
        return f"{example.name}: not {{label: number}}"
    return "; ".join(golden.differences([example], [value]))
