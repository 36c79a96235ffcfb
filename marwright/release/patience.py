"""Making a call again that failed in passing: the server was busy, a connection broke, an answer was cut.

    Patience(seconds=30.0, alive=lambda: server.find() is not None).insist(lambda: client.describe("digits"))

Only for calls that may be made twice. What the server refuses for a reason (a status from 400 to 499) is raised at
once, and so is everything as soon as there is no server any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from marwright.errors import MarwrightError, ServerRefused, ServerUnreachable

T = TypeVar("T")

_PAUSE, _LONGEST_PAUSE = 0.1, 2.0


@dataclass(frozen=True)
class Patience:
    """How long a call is insisted on."""

    seconds: float
    """From the first try to the beginning of the last one."""
    alive: Callable[[], bool] = lambda: True
    """Whether there is still somebody who could answer."""

    def insist(self, call: Callable[[], T]) -> T:
        """What the call returns, once it does; the last error when the time is over."""
        until = time.monotonic() + self.seconds
        pause = _PAUSE
        while True:
            try:
                return call()
            except MarwrightError as error:
                if not in_passing(error) or time.monotonic() + pause > until or not self.alive():
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def in_passing(error: MarwrightError) -> bool:
    """Whether the same call may succeed a moment later."""
    return isinstance(error, ServerUnreachable) or (isinstance(error, ServerRefused) and error.status >= 500)
