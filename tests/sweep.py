"""The tool killed at every point of a rollout and of a rollback: of these, `tests/release/test_faults.py` tries a few.

    python -m tests.sweep [--only WORD]        # a line for each kill, for half an hour; exit status 1 where one failed

One server and two versions, rolled out in turns; a caller of the default URL asks all the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from marwright.release import journal
from tests import archives, faults, rollouts
from tests.archives import Built
from tests.faults import Fault, Trickle
from tests.rollouts import Stage

POLICY = """
[shadow]
requests = 4
max_latency_ratio = 100.0
max_growth_mb = 1000.0
[gate]
margin = 0.5
looks = 1
max_latency_ratio = {gate}
[watch]
seconds = 0.4
every = 0.05
max_latency_ratio = {watch}
[settle]
idle_seconds = 0.1
drain_seconds = 5.0
warm_seconds = 0.0
[server]
call_seconds = {call}
"""
"""Little of everything, and the old version is retired at once, so that this is in it, too."""


@dataclass(frozen=True)
class Scenario:
    """A command that is to be killed, and the phases that only this one passes."""

    name: str
    verb: str
    gate: float = 100.0
    watch: float = 100.0
    call: float = 4.0
    status: int = 0
    phases: tuple[str, ...] = ()
    """All where there are none named."""

    @property
    def policy(self) -> str:
        return POLICY.format(gate=self.gate, watch=self.watch, call=self.call)


SCENARIOS = (
    Scenario("rollout", "rollout"),
    Scenario("rollback", "rollback"),
    Scenario("slow when it answers", "rollout", watch=1e-6, status=3, phases=("going back",)),
    Scenario("stopped by the gate", "rollout", gate=1e-6, status=3, phases=("gated", "going back")),
)


@contextmanager
def stage(folder: Path, digits: Built) -> Iterator[Stage]:
    """digits 1.0 answers, 1.1 is as good; twenty labelled examples for the gate."""
    with rollouts.stage(folder, digits, policy=SCENARIOS[0].policy) as made:
        with np.load(made.runs / made.record("1.0").run / "examples.npz") as examples:
            np.savez(folder / "holdout.npz", inputs=examples["inputs"][:20], labels=examples["labels"][:20])
        yield made


def words(made: Stage, scenario: Scenario, *more: str) -> list[str]:
    """The command of a scenario; the version is among `more`."""
    policy = made.home.folder / f"{scenario.name}.toml"
    policy.write_text(scenario.policy, encoding="utf-8")
    holdout = ["--holdout", str(made.home.folder / "holdout.npz")] if scenario.verb == "rollout" else []
    return [scenario.verb, *more, "--model", "digits", "--policy", str(policy), *holdout]


def points(made: Stage, scenario: Scenario) -> list[str]:
    """All that such a command passes, by doing it once without a fault."""
    new = _ready_for(made, scenario)
    done = faults.command(made, words(made, scenario, *_version(scenario, new)), new=new)
    assert done.status == scenario.status, done.said
    faults.agreed(made)
    return [point for point in done.points if not scenario.phases or point.startswith(scenario.phases)]


def killed(made: Stage, scenario: Scenario, point: str) -> str:
    """Kill the command at that point, resume it, and look whether all is well; how it ended, in a word."""
    new = _ready_for(made, scenario)
    fault = Fault(point, "kill soon" if ": amid " in point else "kill")
    proved = not point.startswith(("start", "verified"))
    first = faults.command(made, words(made, scenario, *_version(scenario, new)), new=new, fault=fault, proved=proved)
    assert first.status == -9, f"{point} was not reached: {first.said}"
    resume = words(made, replace(scenario, verb="rollout"), "--resume")
    done = faults.command(made, resume, new=new)
    assert done.status in (0, 3), f"killed at {point!r}, resumed: {done.status}\n{done.said}"
    answers = faults.agreed(made)
    if done.status == 3:
        assert answers != new
        return "rolled back"
    if "nothing to resume" in done.said:
        return "settled before" if answers == new else "not begun"
    assert answers == new
    return "settled"


def _ready_for(made: Stage, scenario: Scenario) -> str:
    """The version that the next command is about; a rollback needs something to return to."""
    with journal.open(made.store) as book:
        released, previous = book.released("digits"), book.previous("digits")
    assert released is not None
    other = "1.0" if released.version == "1.1" else "1.1"
    if scenario.verb == "rollback" and previous is None:
        done = faults.command(made, words(made, SCENARIOS[0], other), new=other, proved=True)
        assert done.status == 0, done.said
        return released.version
    return other


def _version(scenario: Scenario, new: str) -> list[str]:
    return [new] if scenario.verb == "rollout" else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="points whose name holds this")
    only = parser.parse_args().only
    ends: Counter[str] = Counter()
    failed = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sw", dir="/tmp") as name:
        folder = Path(name)
        digits = archives.build(archives.train("digits", folder / "built"), folder / "built" / "store")
        with stage(folder / "s", digits) as made, Trickle(made) as trickle:
            for scenario in SCENARIOS:
                for point in points(made, scenario):
                    if only not in point:
                        continue
                    before = trickle.lost(), trickle.wrong()
                    try:
                        end = killed(made, scenario, point)
                        assert (trickle.lost(), trickle.wrong()) == before
                    except AssertionError:
                        traceback.print_exc()
                        failed.append(f"{scenario.name}, {point}")
                        end = "FAILED"
                    ends[end] += 1
                    print(f"{end:<15} {scenario.name}, killed at {point}", flush=True)
        lost, wrong, asked = len(trickle.lost()), len(trickle.wrong()), len(trickle.asked)
    print(f"\n{ends.total()} kills in {time.monotonic() - began:.0f} s: {dict(ends)}")
    print(f"{asked} requests meanwhile, {lost} lost, {wrong} answered by a version that could not answer then")
    return 1 if failed or lost or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
