"""Requests over kept-alive HTTP/1.1 connections: llhttp reads the answers, nothing is pipelined, nothing sent twice.

pool = Pool("127.0.0.1", 8080, message=…, answered=…, broken=…)
pool.send(call)     an idle connection takes it, or another is opened
pool.drop(call)     its answer is not waited for any longer: the connection goes with it
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools

from marwright.release.loadtest.calls import Call, now

LIMIT = 1000
"""Connections at most. TorchServe's listening socket queues 1024 that it has not accepted yet; one more, in a stall,
and the kernel drops it for a second. What waits for a connection here is late all the same: it was due."""

Headers = dict[bytes, bytes]


class Pool:
    """All connections to one server, on the running event loop."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        message: Callable[[Call], bytes],
        answered: Callable[[Call, int, Headers, bytes], None],
        broken: Callable[[Call, str], None],
        limit: int = LIMIT,
    ) -> None:
        """`message` gives the bytes of a request at the moment it is sent; `answered` gets headers in lower case."""
        self.message = message
        self.answered = answered
        self.broken = broken
        self.most = 0
        """Connections that were open at one time."""
        self._where = (host, port)
        self._limit = limit
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._waiting: deque[Call] = deque()
        self._opening: set[asyncio.Task[None]] = set()

    def send(self, call: Call) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.carry(call)
                return
        self._waiting.append(call)
        self._open_more()

    def drop(self, call: Call) -> None:
        connection = call.carrier
        if connection is not None:
            connection.end()

    def free(self, connection: Connection) -> None:
        """It has answered, or is new: whoever waits longest gets it."""
        while self._waiting:
            call = self._waiting.popleft()
            if not call.over:
                connection.carry(call)
                return
        self._idle.append(connection)

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)
        self.most = max(self.most, len(self._open))

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._open_more()

    async def close(self) -> None:
        self._waiting.clear()
        for task in list(self._opening):
            task.cancel()
        for connection in list(self._open):
            connection.end()
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _open_more(self) -> None:
        """An attempt for each request that waits, up to the limit."""
        while len(self._opening) < len(self._waiting) and len(self._open) + len(self._opening) < self._limit:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._attempted)

    def _attempted(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        self._open_more()  # for one that came after this attempt had failed, and counted on it
        if not task.cancelled():
            task.result()  # an error of ours ends the run, by the loop's exception handler

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self), *self._where)
        except OSError as error:
            self._no_connection(error.strerror or str(error))
            return
        if connection.usable:
            self.free(connection)
        else:
            self._no_connection("closed at once")

    def _no_connection(self, why: str) -> None:
        """Each attempt was for one request, and is that request's fate."""
        while self._waiting:
            call = self._waiting.popleft()
            if not call.over:
                self.broken(call, f"no connection: {why}")
                return


class Connection(asyncio.Protocol):
    """One connection; it carries one request at a time."""

    def __init__(self, pool: Pool) -> None:
        self.usable = False
        self._pool = pool
        self._call: Call | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = {}
        self._body = b""
        self._status, self._keep = 0, False
        self._begun = self._complete = self._excess = False

    def carry(self, call: Call) -> None:
        assert self._transport is not None
        self._call = call
        self._headers, self._body = {}, b""
        self._begun = self._complete = self._excess = False
        message = self._pool.message(call)
        call.carrier, call.sent = self, now()
        self._transport.write(message)

    def end(self) -> None:
        """Close it at once, whatever it carries."""
        self.usable = False
        if self._call is not None:
            self._call.carrier, self._call = None, None
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.usable = cast(asyncio.Transport, transport), True  # uvloop's only behaves like one
        self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._call is None:  # nobody asked
            self.end()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._complete:
                self._break(f"not an HTTP answer: {error}")
                return
            self._excess = True
        if self._complete:
            self._done()

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._pool.closed(self)
        where = "in the middle of an answer" if self._begun else "before an answer"
        self._break(f"connection closed {where}{f': {error}' if error else ''}")

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._excess |= self._complete
        self._begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._complete:
            self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self._body += body

    def on_message_complete(self) -> None:
        if not self._complete:
            self._status, self._keep = self._parser.get_status_code(), self._parser.should_keep_alive()
        self._complete = True

    def _done(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        call.carrier = None
        self._pool.answered(call, self._status, self._headers, self._body)
        if self._keep and self.usable and not self._excess:
            self._pool.free(self)
        else:
            self.end()

    def _break(self, why: str) -> None:
        call, self._call = self._call, None
        self.end()
        if call is not None:
            call.carrier = None
            self._pool.broken(call, why)
