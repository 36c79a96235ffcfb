"""Why it did not start: the last words of a worker or of the server, found in the logs.

TorchServe says "Worker died." and tries again for minutes. The worker itself said why, in logs/model_log.log, on lines
that carry its thread's name, with a traceback whose last exception is often a mere consequence: TorchServe's loader
reports any import that fails in a handler as a missing `ts.torch_handler.<handler>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^\S+ \[\w+ *\] (?P<thread>\S.*?) (?P<logger>\S+) - (?P<text>.*)$")
_TRACEBACK = "Traceback (most recent call last):"
_DURING = "During handling of the above exception, another exception occurred:"
_CAUSED = "The above exception was the direct cause of the following exception:"
_SUMMARY = re.compile(r"RuntimeError: \d{3} - ")
"""What TorchServe's worker makes of an exception that it has printed before."""
_CHATTER = ("\tat ", "\t...", "Warning: TorchServe is using", "WARNING: sun.reflect", "nvidia-smi not available")


@dataclass(frozen=True)
class Mark:
    """A place in a log file; what was written before it belongs to an earlier start."""

    path: Path
    inode: int = 0
    size: int = 0
    since: str = ""
    """As a line of the log begins: local time, ISO 8601, milliseconds after a comma."""

    @classmethod
    def end_of(cls, path: Path) -> Mark:
        try:
            status = path.stat()
        except FileNotFoundError:
            return cls(path)
        return cls(path, status.st_ino, status.st_size)

    def lines(self) -> list[str]:
        """Everything written since, or the whole file when it was rotated meanwhile."""
        try:
            with self.path.open("rb") as stream:
                now = self.path.stat()
                if now.st_ino == self.inode and now.st_size >= self.size:
                    stream.seek(self.size)
                lines = stream.read().decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []
        first = next((at for at, line in enumerate(lines) if _LINE.match(line) and line >= self.since), len(lines))
        return lines[first:] if self.since else lines


@dataclass(frozen=True)
class WorkerWords:
    """What the workers of one version said since a mark, each on its own (they speak at the same time)."""

    out: tuple[tuple[str, ...], ...]
    err: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, lines: Iterable[str], model: str, version: str) -> WorkerWords:
        # TorchServe cuts a model's name at 25 letters in the name of the thread
        thread = re.compile(rf"(W-\d+)-{re.escape(model[:25])}_{re.escape(version)}-std(out|err)")
        said: dict[tuple[str, str], list[str]] = {}
        for line in lines:
            parts = _LINE.match(line)
            found = parts and thread.fullmatch(parts["thread"])
            if parts and found:
                said.setdefault((found[1], found[2]), []).append(parts["text"])
        return cls(
            out=tuple(tuple(texts) for (_, stream), texts in said.items() if stream == "out"),
            err=tuple(tuple(texts) for (_, stream), texts in said.items() if stream == "err"),
        )

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, as the workers introduced themselves."""
        found = (re.search(r"s_name_part1=.*\bpid=(\d+)$", line) for texts in self.out for line in texts)
        return tuple(int(match[1]) for match in found if match)

    @property
    def gave_up(self) -> bool:
        """A worker said itself that it cannot go on."""
        farewells = ("Backend worker process died.", "Failed to load model ")
        if any(line.startswith(farewells) for texts in self.out for line in texts):
            return True
        return not self.pids and any(_TRACEBACK in texts for texts in self.err)

    @property
    def cause(self) -> str:
        """The exception that began it, on one line; "" when no traceback was printed."""
        return next(filter(None, map(cause, [*self.out, *self.err])), "")

    @property
    def last(self) -> str:
        """The cause; where there is none, that the worker went without a word, and its last lines."""
        silent = "it ended without a traceback (killed, out of memory, or a crash in native code); its last lines:"
        return self.cause or "\n".join([silent, *(line for texts in [*self.out, *self.err] for line in texts[-3:])])


def cause(lines: Sequence[str]) -> str:
    """The exception behind the last chain of tracebacks.

    An exception that was raised *from* another explains it, so it is taken; one that merely occurred while another
    was handled is not.
    """
    chosen, relation, inside = "", "", False
    for line in lines:
        if line in (_DURING, _CAUSED):
            relation, inside = line, False
        elif line == _TRACEBACK:
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
            if relation != _DURING and not (chosen and _SUMMARY.match(line)):
                chosen = line
            relation = ""
    return chosen


def of_server(*logs: Sequence[str], count: int = 8) -> str:
    """The last lines of the server's own output and log, without the stack frames and its usual chatter."""
    told: list[str] = []
    for lines in logs:
        said = (line for line in lines if line.strip() and not line.startswith(_CHATTER))
        told += [text for text in (_text(line) for line in said) if text and text not in told]
    return "\n".join(told[-count:])


def _text(line: str) -> str:
    parts = _LINE.match(line)
    return parts["text"].strip() if parts else line.rstrip()
