"""When a command repeats itself: `--every 1h`, `--turns 3`."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import FrameType

from apscheduler.events import EVENT_JOB_SUBMITTED
from apscheduler.executors.debug import DebugExecutor
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.interval import IntervalTrigger

from marwright import cli
from marwright.errors import MarwrightError, SettingsError

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
LONGEST = timedelta(days=366)


def repeat(turn: Callable[[], object], every: timedelta, *, turns: int | None = None, as_json: bool = False) -> int:
    """A turn at once, then one each `every`, until SIGTERM (0) or Ctrl-C; or so many `turns`.

    A turn that fails is told, and the schedule goes on. Turns that fall due while one is under way become one.
    """
    done, ending = 0, ""

    def one() -> None:
        nonlocal done, ending
        try:
            turn()
        except MarwrightError as error:
            cli.tell(error, as_json=as_json)
        except KeyboardInterrupt:  # the scheduler would take it for a failed job
            ending = ending or "Ctrl-C"
        except Exception:  # a fault of ours, or a full disk: the next turn may well go
            traceback.print_exc()
        done += 1

    def end(event: object) -> None:
        if ending or done == turns:
            scheduler.shutdown(wait=False)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        ending = "SIGTERM"
        raise KeyboardInterrupt

    # In this thread, not in one of a pool: Ctrl-C and SIGTERM then reach the training itself, which leaves its last
    # whole epoch behind, instead of waiting hours for its end.
    scheduler = BlockingScheduler(timezone=UTC, executors={"default": DebugExecutor()})
    scheduler.add_job(
        one,
        IntervalTrigger(seconds=every.total_seconds(), timezone=UTC),
        next_run_time=datetime.now(UTC),
        coalesce=True,
        max_instances=1,
        misfire_grace_time=None,
    )
    scheduler.add_listener(end, EVENT_JOB_SUBMITTED)  # after the scheduler has noted when the next turn is due
    before = signal.signal(signal.SIGTERM, stop)
    try:
        scheduler.start()
    except KeyboardInterrupt:
        ending = ending or "Ctrl-C"
    finally:
        signal.signal(signal.SIGTERM, before)
    if ending == "Ctrl-C":
        raise KeyboardInterrupt
    return 0


def period(text: str) -> timedelta:
    """`30s`, `15m`, `1h`, `1d`."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    every = timedelta(**{UNITS[found[2]]: int(found[1])}) if found else timedelta()
    if not timedelta() < every <= LONGEST:
        raise SettingsError(
            f"--every is {text!r}", hint="a whole number and s, m, h or d, at most 366d: 30s, 15m, 1h, 1d"
        )
    return every


def given(every: str | None, *, once: bool, turns: int | None) -> timedelta | None:
    """How often; None for one turn. SettingsError where the options contradict each other."""
    if every is None:
        if turns is not None:
            raise SettingsError("--turns counts the turns of --every, and there is none", hint="--every 1h --turns 3")
        return None
    if once:
        raise SettingsError("--once and --every contradict each other", hint="leave one out")
    if turns is not None and turns < 1:
        raise SettingsError(f"--turns is {turns}", hint="1 or more, or leave it out")
    return period(every)
