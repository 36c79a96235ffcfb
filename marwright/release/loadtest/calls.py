"""One request on its way, and the two clocks that time it.

Every time is in Unix seconds, so that it can be held against the journal, and taken from a clock that never jumps.
"""

from __future__ import annotations

import ctypes
import os
import time
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable
from typing import Any

_EPOCH = time.time() - time.perf_counter()


def now() -> float:
    """Unix seconds that only ever grow."""
    return _EPOCH + time.perf_counter()


class Call:
    """One request: when it was due, sent and done, where it goes, and what carries it (None before and after)."""

    __slots__ = ("body", "carrier", "due", "grpc", "over", "pin", "sent", "version")

    def __init__(self, due: float, grpc: bool, pin: float | None, body: int) -> None:
        self.due = due
        self.grpc = grpc
        self.pin = pin
        self.body = body
        self.version: str | None = None
        """The pinned version; None is the default URL. Chosen when the request is sent."""
        self.sent: float | None = None
        self.over = False
        """It has its outcome; whatever comes later is too late."""
        self.carrier: Any = None

    @property
    def kind(self) -> str:
        return "grpc" if self.grpc else "rest"


class Alarm:
    """Wakes an event loop to the microsecond.

    The timers of asyncio and uvloop know milliseconds only: half a millisecond of lateness on average, charged to a
    server that answers in one. Linux has a timer that is a file (timerfd_create(2)); elsewhere it is the loop's own.
    """

    def __init__(self, loop: AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: TimerHandle | None = None
        self._file = -1
        self._libc = ctypes.CDLL(None)
        if hasattr(self._libc, "timerfd_create"):
            self._file = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file >= 0:
            loop.add_reader(self._file, self._rung)

    def set(self, seconds: float) -> None:
        """Ring once, so long from now; an earlier setting is forgotten."""
        if self._file < 0:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._loop.call_later(seconds, self._ring)
            return
        whole, rest = divmod(max(int(seconds * 1e9), 1), 10**9)  # 0 would turn it off
        self._libc.timerfd_settime(self._file, 0, (ctypes.c_long * 4)(0, 0, whole, rest), None)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _rung(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # set again between its ringing and our hearing it
            return
        self._ring()
