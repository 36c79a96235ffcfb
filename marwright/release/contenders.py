"""What `tuning` speaks of: a target, settings, what was measured of them, and what that says.

    Target.parse("p99=20ms"), Setting("onnx", workers=2, batch_size=16, max_batch_delay=1, threads=1)

Values and arithmetic only.
"""

from __future__ import annotations

import re
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from marwright.errors import SettingsError

AHEAD = 1.05
"""Who holds the target at so many times another's rate is better; less is noise."""
_NEVER = float("inf")
_AHEAD_ONCE = 1.25
"""The same, of what was measured fewer than three times."""


@dataclass(frozen=True)
class Target:
    """What share of the requests must be answered within how many milliseconds of being due."""

    percentile: float
    limit: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """`p99=20ms`, `p50=1ms`, `p99.9=0.5s`; SettingsError says what is allowed."""
        found = re.fullmatch(r"p(\d{1,2}(?:\.\d{1,3})?)=(\d+(?:\.\d+)?)(ms|s)", text.strip(), re.ASCII)
        if found is None or not float(found[1]) or not float(found[2]):
            raise SettingsError(f"target {text!r} is not understood", hint="p99=20ms, p50=1ms, p99.9=50ms, p90=0.5s …")
        return cls(float(found[1]), float(found[2]) * (1000 if found[3] == "s" else 1))

    def __str__(self) -> str:
        return f"p{self.percentile:g} ≤ {self.limit:g} ms"


@dataclass(frozen=True)
class Setting:
    """One way to serve a model."""

    format: str
    workers: int
    batch_size: int
    max_batch_delay: int
    """Milliseconds."""
    threads: int
    """Of one worker."""

    def __str__(self) -> str:
        return (
            f"{self.format}, {_count(self.workers, 'worker')}, batch {self.batch_size},"
            f" delay {self.max_batch_delay} ms, {_count(self.threads, 'thread')}"
        )


@dataclass(frozen=True)
class Measured:
    """One run under load."""

    rate: float
    """Requests a second that were due; of a closed loop, that were answered rightly."""
    requests: int
    failed: int
    percentiles: Mapping[float, float]
    """Percentile → milliseconds from due to answered."""
    why: str = ""
    """What was wrong with the first request that failed."""
    overloaded: bool = False

    def at(self, target: Target) -> float:
        return self.percentiles.get(target.percentile, float("inf"))

    def holds(self, target: Target) -> bool:
        return not self.failed and not self.overloaded and self.at(target) <= target.limit


class Bench(Protocol):
    """What can be measured. `load` raises a MarwrightError where a setting cannot be served."""

    def now(self) -> float:
        """Seconds, of a clock that only grows."""

    def load(self, setting: Setting) -> None: ...

    def drop(self, setting: Setting) -> None: ...

    def closed(self, setting: Setting, connections: int | None, seconds: float) -> Measured:
        """So many clients (None: as many as there are), each of which sends when it is answered."""

    def open(self, setting: Setting, rate: float, seconds: float) -> Measured:
        """Requests due at random times, at that rate."""


@dataclass(frozen=True)
class Space:
    """What is tried of each key."""

    formats: tuple[str, ...]
    workers: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    delays: tuple[int, ...]
    threads: tuple[int, ...]
    cores: int

    @classmethod
    def of(
        cls, today: Setting, *, cores: int, formats: Sequence[str], threads: bool = True, workers: int | None = None
    ) -> Space:
        """For a machine with so many cores. `threads` False: something else sets them. `workers`: the most for which
        there is memory."""
        ladder = sorted({1, *(2**power for power in range(1, 11) if 2**power < cores), cores})
        most = max(1, cores if workers is None else workers)
        return cls(
            formats=tuple(formats),
            workers=tuple(each for each in ladder if each <= most),
            batch_sizes=(1, 2, 4, 8, 16, 32, 64, 128),
            delays=(1, 2, 5),
            threads=tuple(ladder) if threads else (today.threads,),
            cores=cores,
        )

    def first(self, today: Setting) -> list[Setting]:
        """Where to begin: for many clients, for few, and one worker with all cores."""
        few = replace(today, workers=1, batch_size=1, max_batch_delay=1)
        many = replace(today, workers=max(self.workers), batch_size=16, max_batch_delay=1)
        if len(self.threads) > 1:
            few, many = replace(few, threads=1), replace(many, threads=1)
        wide = replace(many, workers=1, threads=max(self.threads))
        return [each for each in dict.fromkeys((many, few, wide)) if each != today]

    def neighbours(self, of: Setting) -> list[Setting]:
        """One step along each key, what matters most first. Workers share the cores: more threads than that never
        paid."""
        found = [replace(of, batch_size=each) for each in _beside(self.batch_sizes, of.batch_size)]
        found += [replace(of, workers=each) for each in _beside(self.workers, of.workers)]
        found += [replace(of, format=each) for each in self.formats if each != of.format]
        if len(self.threads) > 1:
            found += [replace(of, threads=each) for each in _beside(self.threads, of.threads)]
        if of.batch_size > 1 or of.max_batch_delay > 1:
            found += [replace(of, max_batch_delay=each) for each in _beside(self.delays, of.max_batch_delay)]
        return [each for each in found if each.workers * each.threads <= max(self.cores, of.workers * of.threads)]


@dataclass
class Trial:
    """One setting, and how far it came before the finale."""

    setting: Setting
    rate: float = 0.0
    """The highest rate at which it held the target; 0: none."""
    peak: float = 0.0
    """What it answered at most, whatever the latency; 0: was not looked at."""
    alone: Measured | None = None
    """One client, one request after the other."""
    note: str = ""
    """Why it was dropped."""


@dataclass
class Curve:
    """A finalist, measured again. A round has no run at rates above one that was missed by far: those are missed."""

    trial: Trial
    rounds: list[dict[float, Measured]] = field(default_factory=list)
    """One for each time: rate → what was measured."""

    @property
    def setting(self) -> Setting:
        return self.trial.setting

    @property
    def rates(self) -> list[float]:
        return sorted({rate for each in self.rounds for rate in each})

    def percentile(self, rate: float, percentile: float) -> float:
        """Median over the rounds, ms; infinite where most have no run."""
        return statistics.median(
            each[rate].percentiles.get(percentile, _NEVER) if rate in each else _NEVER for each in self.rounds
        )

    def failed(self, rate: float) -> int:
        return sum(each[rate].failed for each in self.rounds if rate in each)

    def capacity(self, target: Target) -> float:
        """The highest rate that held, as did every lower one: in time by the median, without a failure; 0: none."""
        found = 0.0
        for rate in self.rates if self._alone(target) else ():
            runs = [each[rate] for each in self.rounds if rate in each]
            sound = sum(not run.overloaded for run in runs) > len(self.rounds) / 2
            if not sound or self.failed(rate) or self.percentile(rate, target.percentile) > target.limit:
                break
            found = rate
        return found

    def by_round(self, target: Target) -> list[float]:
        """The highest rate that held in each round."""
        return [
            max((rate for rate, run in each.items() if run.holds(target)), default=0.0) if self._alone(target) else 0.0
            for each in self.rounds
        ]

    def _alone(self, target: Target) -> bool:
        return self.trial.alone is not None and self.trial.alone.holds(target)


@dataclass
class Found:
    """How a search ended. `curves` are the finalists, the best one first."""

    target: Target
    today: Setting
    trials: list[Trial]
    curves: list[Curve]
    untried: list[Setting]
    """Next to the best one, and not tried for lack of time."""
    seconds: float

    @property
    def winner(self) -> Curve:
        return self.curves[0]

    @property
    def reached(self) -> bool:
        """Whether anything holds the target at all."""
        return self.winner.capacity(self.target) > 0

    @property
    def better(self) -> bool:
        """Whether the winner beats today's settings beyond noise: in every round, and by 5 % in the middle (where there
        were fewer than three rounds, by 25 %)."""
        if self.winner.setting == self.today or not self.reached:
            return False
        mine, before = self.winner.by_round(self.target), self.of_today
        theirs = before.by_round(self.target)
        ahead = AHEAD if len(mine) >= 3 else _AHEAD_ONCE
        if self.winner.capacity(self.target) < ahead * before.capacity(self.target):
            return False
        return all(one > other for one, other in zip(mine, theirs, strict=True))

    @property
    def of_today(self) -> Curve:
        return next(curve for curve in self.curves if curve.setting == self.today)

    @property
    def nearest(self) -> Trial:
        """Of all that was tried, whose lone client was answered soonest; without a failure, where there is such."""

        def late(trial: Trial) -> tuple[bool, float]:
            alone = trial.alone
            return (bool(alone.failed), alone.at(self.target)) if alone else (True, _NEVER)

        return min(self.trials, key=late)


def _beside(ladder: Sequence[int], value: int) -> list[int]:
    """The next higher and the next lower value; the higher one first."""
    place = bisect_left(ladder, value)
    higher = [each for each in ladder[place:] if each > value][:1]
    return higher + list(ladder[max(place - 1, 0) : place])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
