"""The last thing that a worker does before it ends: by itself, or because it is told to (SIGTERM).

    ending.before(recorder.close)
    ending.forget(recorder.close)       # it was closed already

What was added last is done first. Nothing is done before a SIGKILL.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable

_deeds: list[Callable[[], None]] = []


def before(deed: Callable[[], None]) -> None:
    """Do this once before the process ends. It must neither block for long nor mind which thread it is called by."""
    if not _deeds:
        atexit.register(_do)
        _before_sigterm()
    _deeds.append(deed)


def forget(deed: Callable[[], None]) -> None:
    """Do it no more; harmless where it was done or never added."""
    with contextlib.suppress(ValueError):
        _deeds.remove(deed)


def _do() -> None:
    while _deeds:
        deed = _deeds.pop()
        with contextlib.suppress(Exception):  # the others come first, and nobody is left who could mind
            deed()


def _before_sigterm() -> None:
    """End as the process would have ended without us. A handler of somebody else's stays what it is."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def ended(number: int, _: object) -> None:
        _do()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, ended)
