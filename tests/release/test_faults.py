"""A rollout survives what can go wrong around it: its own death, the server's, a worker's, a full disk, a bad line.

A few of each kind; `MARWRIGHT_SWEEP=all` tries each phase, and `python -m tests.sweep` kills the tool at every point.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from marwright.release import loading, serving
from marwright.release.phases import PHASES
from marwright.release.server import Expected
from tests import detours, faults, sweep
from tests.archives import Built
from tests.detours import Way
from tests.faults import Done, Fault, Trickle
from tests.rollouts import Stage
from tests.sweep import SCENARIOS

pytestmark = pytest.mark.server
ROLLOUT, ROLLBACK, SLOW, GATE = SCENARIOS
STEPS = ("begin", "done")
ALL = os.environ.get("MARWRIGHT_SWEEP") == "all"


@pytest.fixture(scope="module")
def stage(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """1.0 and 1.1 are as good as one another; each test leaves one of them answering, and nothing else loaded."""
    with sweep.stage(tmp_path_factory.mktemp("faults"), digits) as made:
        yield made


def some(chosen: Sequence[str], every: Sequence[str]) -> Sequence[str]:
    return every if ALL else chosen


def roll_out(stage: Stage, fault: Fault | None = None, scenario: sweep.Scenario = ROLLOUT, **more: Any) -> Done:
    """Of the version that does not answer."""
    new = other(stage)
    done = faults.command(stage, sweep.words(stage, scenario, new), new=new, fault=fault, proved=True, **more)
    assert fault is None or fault.at in done.points, done.said
    return done


def resume(stage: Stage) -> Done:
    return faults.command(stage, sweep.words(stage, ROLLOUT, "--resume"), new=other(stage))


def other(stage: Stage) -> str:
    return "1.0" if stage.released().version == "1.1" else "1.1"


def default(stage: Stage) -> str | None:
    """As the server says, asked on the straight way."""
    with stage.client() as client:
        return loading.default_version(client, "digits")


# -------------------------------------------------------------------- the tool dies


@pytest.mark.parametrize(
    ("scenario", "point"),
    [
        (ROLLOUT, "registered: amid gRPC RegisterModel digits-new.mar"),
        (ROLLOUT, "shadowed: after POST /predictions/digits/old"),
        (ROLLOUT, "gated: before journal: rollout new gated done"),
        (ROLLOUT, "promoted: after PUT /models/digits/new/set-default"),
        (ROLLOUT, "settled: amid gRPC UnregisterModel digits old"),
        (ROLLBACK, "ready: before POST /predictions/digits/new"),
        (ROLLBACK, "promoted: after journal: switching new"),
        (SLOW, "going back: before PUT /models/digits/old/set-default"),
        (SLOW, "going back: after journal: released old"),
    ],
    ids=lambda value: value.name if isinstance(value, sweep.Scenario) else value.replace(":", ""),
)
def test_killed_anywhere_it_is_resumed_to_an_end(stage: Stage, scenario: sweep.Scenario, point: str) -> None:
    with Trickle(stage) as trickle:
        end = sweep.killed(stage, scenario, point)
    ends = ["rolled back"] if scenario.status else ["settled"]
    if ": amid " in point:  # the call may be over, and the last entry written, before the kill comes
        ends.append("settled before")
    assert end in ends
    assert trickle.asked
    assert trickle.lost() == []
    assert trickle.wrong() == []


# -------------------------------------------------------------------- the server dies


@pytest.mark.parametrize("phase", some(["promoted", "settled"], PHASES["rollout"]))
def test_when_the_server_dies_its_next_start_answers_what_the_journal_says(stage: Stage, phase: str) -> None:
    was = stage.released().version
    at = "promoted: after journal: released new" if phase == "promoted" else f"{phase}: {_begins(phase)}"
    done = roll_out(stage, Fault(at, "kill the server"))
    assert done.status == (0 if phase == "settled" else 3), done.said
    assert "its next start answers" in done.said or phase == "settled"
    now = stage.released().version
    assert (now == was) == (phase != "settled")
    stage.home.server.bring_up({"digits": Expected(now)})
    assert faults.command(stage, ["reconcile"], new=other(stage)).status == 0
    assert faults.agreed(stage) == now


@pytest.mark.parametrize("phase", some(["watched"], PHASES["rollout"]))
def test_when_the_machine_dies_the_rollout_is_resumed_on_the_server_started_anew(stage: Stage, phase: str) -> None:
    at = "promoted: after journal: released new" if phase == "promoted" else f"{phase}: {_begins(phase)}"
    assert roll_out(stage, Fault(at, "kill all")).status == -9
    serving.refresh(stage.home.config_path, stage.store)  # as every command does before anything else
    now = stage.released().version
    stage.home.server.bring_up({"digits": Expected(now)})
    assert stage.answers() == now
    assert resume(stage).status in (0, 3)
    assert faults.command(stage, ["reconcile"], new=other(stage)).status == 0
    faults.agreed(stage)


@pytest.mark.parametrize(
    ("which", "phase"),
    [("new", each) for each in some(["gated", "watched"], ["ready", "shadowed", "gated", "promoted", "watched"])]
    + [("old", each) for each in some(["shadowed"], ["ready", "shadowed", "gated", "promoted", "settled"])],
)
def test_when_a_worker_dies_the_rollout_ends_and_one_version_answers(stage: Stage, which: str, phase: str) -> None:
    was = stage.released().version
    with Trickle(stage) as trickle:
        done = roll_out(stage, Fault(f"{phase}: {_begins(phase)}", f"kill the {which} worker"))
    assert done.status in (0, 3), done.said
    assert (faults.agreed(stage) == was) == (done.status == 3)
    assert trickle.wrong() == []
    if which == "new" and phase != "ready":
        assert done.status == 3, "a worker that dies is no reason to be trusted"
    if which == "new" and phase in ("ready", "shadowed", "gated"):
        assert trickle.lost() == [], "the champion goes on"


# -------------------------------------------------------------------- the disk is full


@pytest.mark.parametrize(
    "point",
    some(
        [
            "promoted: before journal: switching new",
            "promoted: before journal: released new",
            "promoted: before serving.properties",
            "settled: before journal: retired old",
        ],
        [
            *(
                f"{phase}: before journal: rollout new {phase} {step}"
                for phase, step in product(PHASES["rollout"], STEPS)
            ),
            "promoted: before journal: switching new",
            "promoted: before journal: released new",
            "promoted: before serving.properties",
            "settled: before journal: retiring old",
            "settled: before journal: retired old",
        ],
    ),
)
def test_on_a_full_disk_it_stops_with_an_error_and_goes_on_when_there_is_room(stage: Stage, point: str) -> None:
    with Trickle(stage) as trickle:
        done = roll_out(stage, Fault(point, "fill the disk"))
        assert done.status == 1, done.said
        assert "full" in done.said or "No space left on device" in done.said
        assert "Traceback" not in done.said
        assert default(stage) == stage.released().version
        ended = resume(stage)
        assert ended.status in (0, 3), ended.said
        faults.agreed(stage)
    assert trickle.lost() == []
    assert trickle.wrong() == []


@pytest.mark.parametrize(
    "point", ["going back: before journal: released old", "going back: before journal: rolled back new"]
)
def test_on_a_full_disk_a_rollback_is_finished_later(stage: Stage, point: str) -> None:
    was = stage.released().version
    done = roll_out(stage, Fault(point, "fill the disk"), SLOW)
    assert done.status == 1, done.said
    assert default(stage) == stage.released().version
    assert resume(stage).status == 3
    assert faults.agreed(stage) == was


def test_a_full_disk_does_not_hide_how_it_ended(stage: Stage) -> None:
    was = stage.released().version
    done = roll_out(stage, Fault("going back: after journal: rolled back new", "fill the disk"), SLOW)
    assert done.status == 3, done.said
    assert "page could not be written" in done.said
    assert "median latency" in done.said
    assert faults.agreed(stage) == was


# -------------------------------------------------------------------- tokens and bad lines


def test_with_every_token_expired_as_soon_as_it_is_read_a_rollout_settles(stage: Stage) -> None:
    new = other(stage)
    done = roll_out(stage, refused_once=True)
    assert done.status == 0, done.said
    assert faults.agreed(stage) == new


@pytest.fixture
def way(stage: Stage) -> Iterator[Way]:
    with detours.to(stage.home.config) as made:
        yield made


def test_when_every_management_call_fails_at_first_it_settles(stage: Stage, way: Way) -> None:
    new = other(stage)
    way.faults = detours.first_time()
    with Trickle(stage) as trickle:
        done = roll_out(stage, detour=way.detour)
    assert done.status == 0, done.said
    assert {met.partition(" ")[0] for met in way.met} == set(detours.KINDS)
    assert faults.agreed(stage) == new
    assert trickle.lost() == []
    assert trickle.wrong() == []


@pytest.mark.parametrize("call", ["RegisterModel", "set-default", "UnregisterModel"])
@pytest.mark.parametrize("fault", some(["cut"], [*detours.KINDS, "delay"]))
def test_a_call_that_changes_the_server_may_fail_once(stage: Stage, way: Way, call: str, fault: str) -> None:
    new = other(stage)
    way.faults = detours.once(fault, at=call)
    patient = replace(ROLLOUT, name="patient", call=25.0) if fault == "delay" else ROLLOUT
    with Trickle(stage) as trickle:
        done = roll_out(stage, scenario=patient, detour=way.detour)
    assert done.status == 0, done.said
    assert len(way.met) == 1
    assert faults.agreed(stage) == new
    assert trickle.lost() == []
    assert trickle.wrong() == []


@pytest.mark.parametrize("call", some(["set-default"], ["/all", "RegisterModel", "set-default"]))
@pytest.mark.parametrize("fault", some(["cut"], [*detours.KINDS, "delay"]))
def test_when_management_fails_for_good_it_ends_with_an_error_and_nothing_is_called_done(
    stage: Stage, way: Way, call: str, fault: str
) -> None:
    was = stage.released().version
    way.faults = detours.from_here_on(fault, at=call)
    with Trickle(stage) as trickle:
        done = roll_out(stage, detour=way.detour)
        assert done.status == 1, done.said
        assert stage.released().version == was
        if call != "/all":  # which is asked before anything is begun
            assert "cannot be told" in done.said
            said = faults.command(stage, ["status"], new=other(stage)).said
            assert f"the rollout of digits {other(stage)} is unfinished" in said
            assert resume(stage).status == 3
        assert faults.agreed(stage) == was
    assert trickle.lost() == []
    assert trickle.wrong() == []


def test_when_the_old_version_cannot_be_retired_the_new_one_stays_and_reconcile_mends_it(
    stage: Stage, way: Way
) -> None:
    new, old = other(stage), stage.released().version
    way.faults = detours.from_here_on("503", at="UnregisterModel")
    done = roll_out(stage, detour=way.detour)
    assert done.status == 0, done.said
    assert f"{old} is not drained: " in done.said
    assert default(stage) == new
    said = faults.command(stage, ["reconcile"], new=new).said
    assert f"digits {old} is retired" in said
    assert faults.agreed(stage) == new


def _begins(phase: str) -> str:
    return f"after journal: rollout new {phase} begin"
