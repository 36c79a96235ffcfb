"""Which of many ways to serve a model takes the highest rate while every client is answered in time.

    found = search(bench, today, Space.of(today, cores=2, formats=("onnx", "eager")), Target.parse("p99=20ms"), 300.0)
    found.winner.setting, found.better

Everything here is arithmetic over a `Bench`, which loads settings and puts load on them: `trying.Trying` is the real
one. Each contender must hold the target for a lone client, and then at a rate 5 % above the best one's; who does not is
dropped after a run or two of some seconds. Who does is driven up until it no longer holds, and its neighbours are next.
When the time for that is over, the two best and today's settings are measured again by turns, and only that decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from marwright.errors import MarwrightError
from marwright.release.contenders import AHEAD, Bench, Curve, Found, Setting, Space, Target, Trial

STEP = 1.25
CLOSE = 1.08
"""How far apart the last rate that held and the first that did not may be."""
FRACTIONS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1)
"""Of the rate that each finalist held: where it is measured again."""
_FINALE = 0.35
"""Share of the time that is kept for that."""
_ROUNDS = 5
_FAR = 3.0
"""Who misses the target by that factor in a round is not asked for higher rates in it."""
_NEAR = 1.5
"""A run that misses the target by less than that factor, or whose median is well in time, is repeated before it counts.
"""

Tell = Callable[[str], None]


def search(
    bench: Bench, today: Setting, space: Space, target: Target, seconds: float, tell: Tell = lambda line: None
) -> Found:
    """Try, measure again, and say what was found. Ends within `seconds` but for the run that is under way then, and but
    for what one contender beside today's settings needs.

    A MarwrightError where not even today's settings can be served.
    """
    return _Search(bench, today, space, target, seconds, tell).go()


class _Search:
    def __init__(self, bench: Bench, today: Setting, space: Space, target: Target, seconds: float, tell: Tell) -> None:
        self._bench = bench
        self._today = today
        self._space = space
        self._target = target
        self._tell = tell
        self._began = bench.now()
        self._run = min(3.0, max(0.5, seconds / 150))
        self._until = self._began + seconds * (1 - _FINALE)
        self._end = self._began + seconds
        self._trials: dict[Setting, Trial] = {}
        self._loads: list[float] = []

    def go(self) -> Found:
        best = self._first()
        queue = self._space.first(self._today) + self._space.neighbours(best.setting)
        second: Trial | None = None
        while (setting := self._next(queue)) is not None:
            trial = self._contend(setting, best)
            if trial.rate > best.rate:
                second, best = self._kept(best, second), trial
                queue = self._space.first(self._today) + self._space.neighbours(best.setting)
            else:
                self._bench.drop(setting)
            self._say(trial)
        curves = self._finale(best, second)
        around = self._space.neighbours(curves[0].setting)
        return Found(
            target=self._target,
            today=self._today,
            trials=list(self._trials.values()),
            curves=curves,
            untried=[each for each in around if each not in self._trials],
            seconds=self._bench.now() - self._began,
        )

    # ---------------------------------------------------------------- trying

    def _first(self) -> Trial:
        """Today's settings, however bad they are: the others are held against them."""
        trial = self._trials[self._today] = Trial(self._today)
        self._load(self._today)
        self._warm(self._bench.now() + 0.1 * (self._end - self._bench.now()))
        self._alone(trial)
        self._climb(trial)
        self._say(trial)
        return trial

    def _warm(self, until: float) -> None:
        """Load until the server's Java gets no faster: whoever came first would be slower for nothing else."""
        before = 0.0
        while True:
            rate = self._bench.closed(self._today, None, self._run).rate
            if rate < AHEAD * before or self._bench.now() > until:
                return
            before = rate

    def _next(self, queue: Iterable[Setting]) -> Setting | None:
        left = self._until - self._bench.now()
        if len(self._trials) > 1 and left < statistics.mean(self._loads) + 3 * self._run:
            return None
        return next((each for each in queue if each not in self._trials), None)

    def _contend(self, setting: Setting, best: Trial) -> Trial:
        """Against the best so far: dropped as soon as it is behind."""
        trial = self._trials[setting] = Trial(setting)
        try:
            self._load(setting)
        except MarwrightError as error:
            trial.note = f"cannot be served: {error.message.splitlines()[0]}"
            return trial
        if not self._alone(trial):
            return trial
        if best.rate:
            if not self._holds(setting, best.rate * AHEAD, trial):
                trial.note = trial.note or f"does not hold {best.rate * AHEAD:.0f}/s"
                return trial
            trial.rate = best.rate * AHEAD
        self._climb(trial)
        return trial

    def _alone(self, trial: Trial) -> bool:
        """Whether a lone client is answered in time, at one of three looks: few requests make a restless percentile."""
        for _ in range(3):
            run = trial.alone = self._bench.closed(trial.setting, 1, self._run / 2)
            if run.holds(self._target):
                return True
            if run.failed:
                break
        trial.note = run.why or f"one client alone: p{self._target.percentile:g} {run.at(self._target):.1f} ms"
        return False

    def _climb(self, trial: Trial) -> None:
        """Up to the highest rate that it holds: from the one that it has held, else from what it answers at most."""
        if not trial.rate:
            flat = self._bench.closed(trial.setting, None, self._run)
            trial.peak = flat.rate
            if trial.note or not flat.rate:
                return
            rate = 0.8 * flat.rate
            while not self._holds(trial.setting, rate, trial):
                rate *= 0.6
                if rate < 0.01 * flat.rate or self._over():
                    return
            trial.rate, trial.note = rate, ""
        failed = 0.0
        while not self._over():
            if failed and failed / trial.rate <= CLOSE:
                break
            rate = (failed * trial.rate) ** 0.5 if failed else trial.rate * STEP
            if self._holds(trial.setting, rate, trial):
                trial.rate = rate
            else:
                failed = rate
        trial.note = ""

    def _holds(self, setting: Setting, rate: float, trial: Trial) -> bool:
        """Whether the target holds at that rate; a miss that may be chance is looked at once more."""
        for _ in range(2):
            run = self._bench.open(setting, rate, self._run)
            if run.holds(self._target):
                return True
            limit = self._target.limit
            near = run.at(self._target) <= _NEAR * limit or run.percentiles.get(50.0, limit) < limit / 2
            if run.failed or run.overloaded or not near:
                break
        if run.failed:
            trial.note = f"at {rate:.0f}/s: {run.why}"
        return False

    def _load(self, setting: Setting) -> None:
        began = self._bench.now()
        try:
            self._bench.load(setting)
        finally:
            self._loads.append(self._bench.now() - began)

    def _kept(self, best: Trial, second: Trial | None) -> Trial:
        """The best so far becomes the second; who was second goes, unless it is today's."""
        if second is not None and second.setting != self._today:
            self._bench.drop(second.setting)
        return best

    def _over(self) -> bool:
        return self._bench.now() >= self._until

    def _say(self, trial: Trial) -> None:
        how = f"{trial.rate:.0f}/s within the target" if trial.rate else trial.note or "never within the target"
        self._tell(f"{self._bench.now() - self._began:5.0f} s  {trial.setting}: {how}")

    # ---------------------------------------------------------------- measuring again

    def _finale(self, best: Trial, second: Trial | None) -> list[Curve]:
        """The finalists by turns, at the same rates, in as many rounds as there is time for."""
        trials = [best, *([second] if second is not None else [])]
        if all(trial.setting != self._today for trial in trials):
            trials.append(self._trials[self._today])
        left = self._end - self._bench.now()
        fractions: Sequence[float] = FRACTIONS
        if left < len(trials) * len(fractions) * self._run:
            fractions = FRACTIONS[1::2]
            trials = [trial for trial in trials if trial is best or trial.setting == self._today]
        curves = [Curve(trial) for trial in trials]
        rates = {(best.rate or 0.5 * best.peak) * fraction for fraction in fractions}
        today = self._trials[self._today]
        rates |= {today.rate * fraction for fraction in (0.5, 1.0) if today.rate < 0.5 * best.rate}
        rates = {rate for rate in rates if rate > 0}
        once = len(curves) * len(rates) * (self._run + 0.1)
        rounds = max(1, min(_ROUNDS, int(left / max(once, 1e-9))))
        names = " and ".join(f"({curve.setting})" for curve in curves)
        self._tell(f"{self._bench.now() - self._began:5.0f} s  by turns, {rounds} rounds: {names}")
        for turn in range(rounds):
            if turn and self._bench.now() + once > self._end:
                break
            self._round(curves if turn % 2 == 0 else curves[::-1], sorted(rates))
        return sorted(curves, key=self._rank)

    def _round(self, curves: Sequence[Curve], rates: Sequence[float]) -> None:
        for curve in curves:
            curve.rounds.append({})
        for rate in rates:
            for curve in curves:
                done = curve.rounds[-1]
                if any(run.overloaded or run.at(self._target) > _FAR * self._target.limit for run in done.values()):
                    continue
                done[rate] = self._bench.open(curve.setting, rate, self._run)

    def _rank(self, curve: Curve) -> tuple[float, float]:
        """The higher rate first; of equal ones whose lone client is answered sooner."""
        late = float("inf")
        alone = curve.trial.alone.percentiles.get(50.0, late) if curve.trial.alone else late
        return -curve.capacity(self._target), alone
