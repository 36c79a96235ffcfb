"""The raw file of a run: a line for each request, written as they end, readable after any kind of end.

    # {"model": "digits", …}                                         what was asked, of whom, on what machine
    due,sent,done,kind,target,version,status,outcome,body,detail
    1763721000.000000,1763721000.000041,…,rest,default,1.0,200,ok,1.0/00.png,
    # {"event": "end", …}                                            only where the run came to its end

Times are Unix seconds; `sent` is empty for a request that never was, `target` is `default` or the pinned version. For a
hung one `done` is when it was given up.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from marwright.errors import DataError, SettingsError
from marwright.release.loadtest.bodies import Body
from marwright.release.loadtest.calls import Call
from marwright.release.loadtest.checks import OUTCOMES, Verdict

HEADER = "due,sent,done,kind,target,version,status,outcome,body,detail"
_PLAIN = re.compile(r'[^",\s]*').fullmatch


class Writer:
    """Appends to a new file; SettingsError where it exists. What was flushed survives a kill."""

    def __init__(self, path: Path, about: Mapping[str, Any], bodies: Sequence[Body]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise SettingsError(f"{path} is there already", hint="name another: --out PATH; or move it away") from None
        self._names = [_cell(body.name) for body in bodies]
        self._lines: list[str] = []
        self.note(about)
        self._lines.append(HEADER + "\n")
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()
        self._file.close()

    def add(self, call: Call, done: float, verdict: Verdict) -> None:
        sent = "" if call.sent is None else f"{call.sent:.6f}"
        self._lines.append(
            f"{call.due:.6f},{sent},{done:.6f},{call.kind},{call.version or 'default'},"
            f"{_cell(verdict.version)},{verdict.status or ''},{verdict.outcome},{self._names[call.body]},"
            f"{_cell(verdict.detail)}\n"
        )

    def note(self, value: Mapping[str, Any]) -> None:
        """A line about the run itself."""
        self._lines.append(f"# {json.dumps(value)}\n")

    def flush(self) -> None:
        self._file.write("".join(self._lines))
        self._file.flush()
        self._lines.clear()


@dataclass(frozen=True)
class Results:
    """A raw file, column by column; every array has one entry for each request, in order of `due`."""

    about: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    due: NDArray[np.float64]
    sent: NDArray[np.float64]
    """NaN where the request was never sent."""
    done: NDArray[np.float64]
    kind: NDArray[np.str_]
    target: NDArray[np.str_]
    version: NDArray[np.str_]
    status: NDArray[np.int64]
    """0 where there was none."""
    outcome: NDArray[np.str_]
    detail: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.due)

    @property
    def end(self) -> Mapping[str, Any] | None:
        """What the run said when it ended; None where it was killed."""
        return next((event for event in self.events if event.get("event") == "end"), None)

    @property
    def latency(self) -> NDArray[np.float64]:
        """Seconds from when each request was due."""
        return self.done - self.due


def read(path: Path) -> Results:
    """A raw file, whole or cut off by a kill; DataError where it is something else."""
    about: list[Mapping[str, Any]] = []
    times = array("d"), array("d"), array("d")
    statuses = array("l")
    words: tuple[list[str], ...] = ([], [], [], [], [])
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = csv.reader(_lines(stream, about))
            if next(rows, None) != HEADER.split(",") or not about:
                raise ValueError("another header")
            for due, sent, done, kind, target, version, status, outcome, _, detail in rows:
                for column, value in zip(times, (due, sent or "nan", done), strict=True):
                    column.append(float(value))
                statuses.append(int(status or 0))
                for values, word in zip(words, (kind, target, version, outcome, detail), strict=True):
                    values.append(sys.intern(word))
        if not set(words[3]) <= set(OUTCOMES):
            raise ValueError("an outcome that nobody knows")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} holds no results: {error}", hint="marwright loadtest --out PATH writes one") from None
    order = np.argsort(np.array(times[0]), kind="stable")
    due_, sent_, done_ = (np.array(column)[order] for column in times)
    kind_, target_, version_, outcome_ = (np.array(values, dtype=np.str_)[order] for values in words[:4])
    return Results(
        about=about[0],
        events=tuple(about[1:]),
        due=due_,
        sent=sent_,
        done=done_,
        kind=kind_,
        target=target_,
        version=version_,
        status=np.array(statuses, dtype=np.int64)[order],
        outcome=outcome_,
        detail=tuple(words[4][place] for place in order.tolist()),
    )


def _lines(stream: Iterator[str], about: list[Mapping[str, Any]]) -> Iterator[str]:
    """Every whole line of requests; those about the run are put aside."""
    for line in stream:
        if not line.endswith("\n"):  # cut off in the middle
            return
        if line.startswith("# "):
            about.append(json.loads(line[2:]))
        else:
            yield line


def _cell(text: str) -> str:
    """As csv wants it, on one line."""
    if _PLAIN(text):
        return text
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow([" ".join(text.split())])
    return stream.getvalue()
