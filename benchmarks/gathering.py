"""An experiment: batches that are formed in the worker, of whatever waits when it has time (decision 19).

A version has several workers with batch size 1, which the frontend feeds one by one, and one process behind them all:
the first to start leads and loads the model, each other one says that it is loaded, hands the leader its connection to
the frontend, and keeps no more than its process. What waits on all connections when the leader is free is one batch: a
lone client never waits, and under load batches grow up to as many as there are workers.

`levers.py grid` packs this file into an archive, as its handler. It is no part of the bundle: see what it measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import sys
import time
from typing import Any, NoReturn

from handlers import wire
from handlers.image_classifier import ImageClassifier

PATIENCE = 300.0
"""Seconds that a follower waits for its leader."""
IDLE = "import os, sys; os.read(int(sys.argv[1]), 1)"
"""What is left of a follower: it ends when its leader does."""


class Gathering(ImageClassifier):
    """The handler of every such worker."""

    def initialize(self, context: Any) -> None:
        names = (os.getppid(), context.system_properties["model_dir"])
        digest = hashlib.sha256(repr(names).encode()).hexdigest()
        main = vars(sys.modules["__main__"])
        place = join(f"\0marwright/{digest[:32]}")
        if isinstance(place, socket.socket):
            main["retrieve_msg"] = lambda conn: hand_over(place, conn)
            return
        super().initialize(context)
        if self.wire != "lean":
            raise RuntimeError(f"the experiment needs the lean codec, which is {self.wire}")
        from ts.service import Service

        Service.predict = predict
        main["retrieve_msg"] = place.retrieve
        place.ear.listen(128)


def join(address: str) -> Leader | socket.socket:
    """Lead, or the link to who does, once it is ready. The name is of no file: it is gone with its process."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ear = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(OSError):
            ear.bind(address)
            return Leader(ear)
        ear.close()
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(OSError):
            link.connect(address)
            return link
        link.close()
        time.sleep(0.05)
    raise RuntimeError("the worker that leads was never ready")


def hand_over(link: socket.socket, conn: socket.socket) -> NoReturn:
    """Called when the frontend was told that the model is loaded."""
    link.settimeout(PATIENCE)
    socket.send_fds(link, [b"+"], [conn.fileno()])
    if link.recv(1) != b"+":
        raise RuntimeError("the worker that leads has gone")
    link.settimeout(None)
    os.set_inheritable(link.fileno(), True)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", IDLE, str(link.fileno())])


class Gathered(wire.Message):
    """The requests of several connections."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[socket.socket, wire.Message]] = []

    def add(self, conn: socket.socket, message: wire.Message) -> None:
        self.ids |= {len(self.fields) + at: name for at, name in message.ids.items()}
        self.fields += message.fields
        self.slots += message.slots
        self.parts.append((conn, message))


class Leader:
    """The worker that reads and answers for all."""

    def __init__(self, ear: socket.socket) -> None:
        self.ear = ear
        self._poll = select.epoll()
        self._poll.register(ear.fileno(), select.EPOLLIN)
        self._conns: dict[int, tuple[socket.socket, wire.Messages]] = {}
        self._links: dict[int, socket.socket] = {}

    def retrieve(self, own: socket.socket) -> tuple[bytes, Any]:
        """All requests that wait on any connection."""
        if own.fileno() not in self._conns:
            self._add(own)
        while True:
            found = Gathered()
            for number, _ in self._poll.poll():
                if number in self._conns:
                    conn, messages = self._conns[number]
                    try:
                        found.add(conn, messages.retrieve(conn)[1])
                    except (SystemExit, OSError):
                        if conn is own:
                            raise
                        self._poll.unregister(number)
                        del self._conns[number]
                        conn.close()
                elif number == self.ear.fileno():
                    link = self.ear.accept()[0]
                    self._links[link.fileno()] = link
                    self._poll.register(link.fileno(), select.EPOLLIN)
                else:
                    self._hear(number)
            if found.fields:
                return b"I", found

    def _hear(self, number: int) -> None:
        link = self._links[number]
        said, handed, _, _ = socket.recv_fds(link, 1, 1)
        if said and handed:
            self._add(socket.socket(fileno=handed[0]))
            link.send(b"+")
        else:
            self._poll.unregister(number)
            self._links.pop(number).close()

    def _add(self, conn: socket.socket) -> None:
        self._conns[conn.fileno()] = conn, wire.Messages()
        self._poll.register(conn.fileno(), select.EPOLLIN)


def predict(service: Any, message: Gathered) -> bytes:
    """One batch, and to each connection its own answers."""
    context = service.context
    context.request_ids = context.metrics.request_ids = message.ids
    context.request_processor = message.slots
    bodies = service._entry_point(message.fields, context)
    mine, at = b"", 0
    for conn, part in message.parts:
        frame = wire.respond(bodies[at : at + len(part.fields)], part.ids, part.slots)
        at += len(part.fields)
        if conn is service.cl_socket:
            mine = frame
        else:
            conn.sendall(frame)
    return mine
