"""A rollout on the real server: every phase, what it calls, how it ends, and the way back.

The tests run in order on one server: each begins where another ended, mostly with 1.0 answering.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from marwright.errors import MarwrightError, RolledBack, RolloutError, ServerUnreachable
from marwright.release import journal, loading, phases, plan, policy, reconcile, rollout, shadow, turns
from marwright.release.client import Client
from marwright.release.phases import PHASES
from marwright.release.policy import Policy
from marwright.release.server import Expected
from marwright.release.shadow import Sample, Side
from marwright.settings import ReconcileSettings, ReleaseSettings, ReleasesSettings, RolloutSettings, StatusSettings
from scripts import reconcile as reconcile_verb
from scripts import release as release_verb
from scripts import releases as releases_verb
from scripts import rollback as rollback_verb
from scripts import rollout as verb
from scripts import status as status_verb
from tests import archives, rollouts, torchserve
from tests.archives import Built
from tests.rollouts import Stage

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def stage(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with rollouts.stage(tmp_path_factory.mktemp("rollout"), digits, others=3) as made:
        yield made


@contextlib.contextmanager
def asking(stage: Stage) -> Iterator[list[str]]:
    """Somebody asks the default URL all the time; yields the versions that answered, and raises if anything failed."""
    answered: list[str] = []
    failed: list[str] = []
    stop = threading.Event()
    body = next((stage.runs / stage.record("1.0").run / "golden").glob("*.png")).read_bytes()

    def ask() -> None:
        with stage.client() as client:
            while not stop.wait(0.02):
                try:
                    answered.append(client.predict("digits", body, timeout=5.0).version)
                except MarwrightError as error:
                    failed.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answered
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert answered


def limits(stage: Stage) -> Policy:
    return verb.limits_of(stage.places, None, "digits")


def calls_of(stage: Stage, version: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Roll that version out; every call that was made to the server."""
    made: list[str] = []
    client = stage.home.server.__class__.client
    monkeypatch.setattr(
        stage.home.server.__class__, "client", lambda self, **options: client(self, told=made.append, **options)
    )
    verb.rolled_out(stage.settings(version))
    monkeypatch.undo()
    return made


def test_a_good_version_comes_to_answer_and_no_request_is_lost(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan.calls(
        stage.record("1.1"), "1.0", limits(stage), verb._holdout(stage.settings(), stage.record("1.1"))
    )
    with asking(stage) as answered:
        made = calls_of(stage, "1.1", monkeypatch)
    assert answered[0] == "1.0"
    assert answered[-1] == "1.1"
    assert "".join(answered).count("1.01.1") == 1, "it switched once"
    notes = [entry.detail for entry in stage.entries("rollout")]
    assert [(note["phase"], note["step"]) for note in notes] == [
        (phase, step) for phase in PHASES["rollout"] for step in ("begin", "done")
    ]
    assert stage.released() == replace(stage.released(), version="1.1", proven=True)
    assert "load_models=digits-1.1.mar\n" in (stage.store / "serving.properties").read_text()
    with journal.open(stage.store) as book:
        assert book.live("digits") == {"1.0", "1.1"}
        assert book.previous("digits") == "1.0"
        verdict = rollout.last_verdict(book, "digits", "1.1")
        assert list(rollout.due(book, "digits")) == ["1.0"]
    assert verdict is not None
    assert verdict.outcome == "pass"
    page = (stage.store / "verdicts" / "digits-1.1.html").read_text()
    assert "digits 1.1" in page
    assert "accuracy" in capsys.readouterr().out
    calls = {call for call in made if not call.startswith("GET /ping")}
    said = {each.call for each in planned if each.phase != "later" and not each.call.startswith("load ")}
    assert calls == said, "the dry run lists what is called, and nothing else"


def test_a_rollback_to_a_warm_version_registers_nothing(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with asking(stage) as answered:
        assert rollback_verb.main(stage.rollback()) == 0
    assert "1.0 answers again (was 1.1)" in capsys.readouterr().out
    assert answered[-1] == "1.0"
    assert stage.held() == ["1.0"], "the version that was rolled back from is drained and gone"
    assert stage.released().why == "rollback from 1.1: by hand"
    with journal.open(stage.store) as book:
        assert book.previous("digits") is None
        assert book.live("digits") == {"1.0"}
    with pytest.raises(RolloutError, match=r"nothing answered for digits before 1\.0"):
        rollback_verb.main(stage.rollback())


def test_a_rollback_to_a_version_that_was_retired_registers_it_again(stage: Stage) -> None:
    cold = rollouts.QUICK.replace("warm_seconds = 600.0", "warm_seconds = 0.0")
    path = stage.home.folder / "cold.toml"
    path.write_text(cold, encoding="utf-8")
    with asking(stage) as answered:
        outcome = verb.rolled_out(stage.settings("1.2", policy=path))
        assert outcome.warm_until is None
        assert stage.held() == ["1.2"]
        assert rollback_verb.main(stage.rollback()) == 0
    assert set(answered) == {"1.0", "1.2"}
    assert answered[-1] == "1.0"
    assert stage.held() == ["1.0"]


def test_the_same_version_again_is_proved_and_noted(stage: Stage) -> None:
    before = stage.entries()
    outcome = verb.rolled_out(stage.settings("1.0"))
    assert (outcome.version, outcome.was) == ("1.0", "1.0")
    assert stage.entries() == before, "golden examples alone do not make a hand-released version a proven one"
    assert not stage.released().proven


def test_a_second_rollout_of_a_model_says_who_holds_it(stage: Stage) -> None:
    with (
        turns.only_one(stage.store, "digits", what="rollout of digits 1.1"),
        pytest.raises(RolloutError, match=rf"rollout of digits 1\.1, process {os.getpid()}, since"),
    ):
        verb.rolled_out(stage.settings("1.1"))
    assert turns.holder(stage.store, "digits") == ""


def test_a_dry_run_calls_nothing(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    before = stage.entries()
    assert verb.main(stage.settings("1.1", dry_run=True)) == 0
    said = capsys.readouterr().out
    assert "PUT /models/digits/1.1/set-default" in said
    assert "labelled: " in said
    assert stage.entries() == before
    assert stage.held() == ["1.0"]


def test_without_labelled_examples_the_gate_stops_it(stage: Stage, tmp_path: Path) -> None:
    settings = replace(stage.settings("1.1"), runs=tmp_path)
    with pytest.raises(RolledBack, match=r"gated: no labelled examples for the gate") as told:
        verb.rolled_out(settings)
    assert "--holdout" in str(told.value)
    assert stage.held() == ["1.0"]


def test_an_interrupted_rollout_goes_on_where_it_was(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with verb.rig(stage.settings(), stage.record("1.1"), limits(stage)) as made:
        state = rollout.begin(made)
        for _ in range(3):
            state = rollout.advance(state, made)
        assert state.phase == "ready"
    with journal.open(stage.store) as book:
        assert rollout.unfinished(book, "digits") == state, "all of it is in the journal"
        found = reconcile.differences(book, "digits", {})
    assert found[0].mend == "resume"
    with pytest.raises(RolloutError, match="was interrupted in phase shadowed"):
        verb.rolled_out(stage.settings("1.2"))
    assert verb.main(stage.settings(resume=True)) == 0
    assert "digits 1.1 answers now (was 1.0)" in capsys.readouterr().out
    assert stage.answers() == "1.1"
    assert verb.resumed(stage.settings(resume=True)) is None
    assert rollback_verb.main(stage.rollback()) == 0


def test_a_resumed_rollout_has_the_limits_and_examples_that_it_was_begun_with(stage: Stage, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text(rollouts.QUICK.replace("margin = 0.3", "margin = 0.0001"), encoding="utf-8")
    some = tmp_path / "some.npz"
    with np.load(stage.runs / stage.record("1.0").run / "examples.npz") as whole:
        np.savez(some, inputs=whole["inputs"][:50], labels=whole["labels"][:50])
    settings = stage.settings("1.1", policy=strict, holdout=some)
    with verb.rig(settings, stage.record("1.1"), policy.load(strict, "digits"), given={"holdout": str(some)}) as made:
        state = rollout.begin(made)
        for _ in range(3):
            state = rollout.advance(state, made)
    with pytest.raises(RolledBack, match=r"inconclusive after 1 looks.* on 50 examples"):
        verb.resumed(stage.settings(resume=True))
    with journal.open(stage.store) as book:
        assert rollout.unfinished(book, "digits") is None


def test_the_gates_no_is_not_asked_for_twice(stage: Stage) -> None:
    """Killed between the verdict and the way back: the way back it is."""
    with verb.rig(stage.settings(), stage.record("1.1"), limits(stage)) as made:
        state = rollout.begin(made)
        for _ in range(3):
            state = rollout.advance(state, made)
        no = "gated: the gate says no: accuracy 0.9 → 0.5"
        phases.note(made, state, "gated", "verdict", reason=no)
    with pytest.raises(RolledBack, match="the gate says no"):
        verb.resumed(stage.settings(resume=True))
    assert stage.held() == ["1.0"]


def test_a_rollback_sends_an_interrupted_rollout_back(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with verb.rig(stage.settings(), stage.record("1.1"), limits(stage)) as made:
        state = rollout.begin(made)
        for _ in range(3):
            state = rollout.advance(state, made)
    assert rollback_verb.main(replace(stage.rollback(), why="it is late")) == 0
    assert "digits 1.0 answers again (was 1.1)" in capsys.readouterr().out
    assert stage.entries("rolled back")[-1].detail["reason"] == "rolled back: it is late"
    assert stage.held() == ["1.0"]


def test_an_interrupted_rollout_whose_archive_is_gone_goes_back(stage: Stage) -> None:
    with verb.rig(stage.settings(), stage.record("1.1"), limits(stage)) as made:
        state = rollout.begin(made)
        for _ in range(3):
            state = rollout.advance(state, made)
    hidden = stage.store / "elsewhere"
    hidden.mkdir()
    for name in ("digits-1.1.mar", "digits-1.1.json"):
        (stage.store / name).rename(hidden / name)
    try:
        with pytest.raises(RolledBack, match=r"no archive of digits 1\.1.*\n.*taken out without draining"):
            verb.resumed(stage.settings(resume=True))
    finally:
        for path in hidden.iterdir():
            path.rename(stage.store / path.name)
    assert stage.held() == ["1.0"]


def test_a_champion_that_does_not_answer_is_no_yardstick(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shadow._ask

    def silent(client: Client, model: str, side: Side, sample: Sample) -> None:
        real(client, model, side, sample)
        if side.version == "1.0" and len(side.answers) == 30:
            side.answers[-1] = None
            side.errors.append("refused with 503")

    monkeypatch.setattr(shadow, "_ask", silent)
    with pytest.raises(RolledBack, match=r"the champion 1\.0 left 1 of 359 examples unanswered"):
        verb.rolled_out(stage.settings("1.1"))
    assert stage.entries("rolled back")[-1].detail["innocent"]


def test_whatever_goes_wrong_in_a_phase_the_champion_comes_first(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(phases, "_judge_counts", broken)
    with pytest.raises(RolledBack, match="watched: ZeroDivisionError: a fault of ours"):
        verb.rolled_out(stage.settings("1.1"))
    assert (stage.answers(), stage.held()) == ("1.0", ["1.0"])


def test_ctrl_c_leaves_the_champion_and_nothing_half_done(stage: Stage) -> None:
    """In a process of its own, in the middle of the watch."""
    line = [sys.executable, "-m", "scripts", "rollout", "1.1", "--model", "digits"]
    line += ["--store", str(stage.store), "--config", str(stage.home.config_path), "--runs", str(stage.runs)]
    environment = {**os.environ, "TMPDIR": str(stage.home.temp), "TEMP": str(stage.home.temp)}
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        for said in started.stderr:
            if said.startswith("watching"):
                started.send_signal(2)
                break
        rest = started.stderr.read()
        assert started.wait(60) == 130, rest
    assert "going back to 1.0: watched: interrupted by Ctrl-C" in rest
    assert stage.answers() == "1.0"
    assert stage.held() == ["1.0"]
    assert stage.released().version == "1.0"
    with journal.open(stage.store) as book:
        assert rollout.unfinished(book, "digits") is None
    assert stage.entries("rolled back")[-1].detail["innocent"], "it may be tried again"


def test_reconcile_mends_what_somebody_else_has_changed(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ReconcileSettings(**stage.places.__dict__)
    status = StatusSettings(**stage.places.__dict__)
    with stage.client() as client:
        client.register("digits-1.3.mar", initial_workers=1, synchronous=True, timeout=60)
        client.set_default("digits", "1.3")
    assert status_verb.main(status) == 0
    said = capsys.readouterr().out
    assert "attention: digits 1.3 answers, the journal says 1.0" in said
    assert "attention: digits 1.3 is loaded, the journal does not say that it should be" in said
    with pytest.raises(RolloutError, match=r"1\.3 of digits answers, the journal says 1\.0"):
        verb.rolled_out(stage.settings("1.1"))
    assert reconcile_verb.main(replace(settings, dry_run=True)) == 0
    assert "would switch" in capsys.readouterr().out
    assert stage.answers() == "1.3"
    assert reconcile_verb.main(settings) == 0
    said = capsys.readouterr().out
    assert "digits 1.0 answers" in said
    assert "digits 1.3 is retired" in said
    assert (stage.answers(), stage.held()) == ("1.0", ["1.0"])
    assert reconcile_verb.main(settings) == 0
    assert "the server is what the journal says" in capsys.readouterr().out


def test_reconcile_retires_what_was_kept_warm_when_its_time_is_over(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stage.home.folder / "short.toml"
    path.write_text(rollouts.QUICK.replace("warm_seconds = 600.0", "warm_seconds = 1.0"), encoding="utf-8")
    verb.rolled_out(stage.settings("1.1", policy=path))
    assert stage.held() == ["1.0", "1.1"]
    time.sleep(1.1)
    assert reconcile_verb.main(ReconcileSettings(**stage.places.__dict__)) == 0
    assert "digits 1.0 is retired" in capsys.readouterr().out
    assert stage.held() == ["1.1"]
    assert rollback_verb.main(stage.rollback()) == 0


def test_wait_stays_until_the_old_version_is_retired(stage: Stage) -> None:
    path = stage.home.folder / "short.toml"
    assert verb.rolled_out(stage.settings("1.1", policy=path, wait=True)).warm_until is None
    assert stage.held() == ["1.1"]
    assert rollback_verb.main(stage.rollback()) == 0


def test_a_version_whose_pinned_url_is_called_is_not_retired(stage: Stage) -> None:
    path = stage.home.folder / "busy.toml"
    policy = rollouts.QUICK.replace("warm_seconds = 600.0", "warm_seconds = 0.0")
    path.write_text(policy.replace("drain_seconds = 10.0", "drain_seconds = 2.0"), encoding="utf-8")
    body = next((stage.runs / stage.record("1.0").run / "golden").glob("*.png")).read_bytes()
    stop, versions = threading.Event(), []

    def pin() -> None:
        with stage.client() as client:
            while not stop.wait(0.05):
                versions.append(client.predict("digits", body, version="1.0").version)

    thread = threading.Thread(target=pin)
    thread.start()
    verb.rolled_out(stage.settings("1.1", policy=path))
    assert stage.held() == ["1.0", "1.1"], "somebody still calls 1.0"
    stop.set()
    thread.join()
    assert set(versions) == {"1.0"}
    assert "its pinned URL is still called" in stage.entries("kept")[-1].detail["why"]
    with journal.open(stage.store) as book:
        assert book.live("digits") == {"1.0", "1.1"}
    assert rollback_verb.main(stage.rollback()) == 0
    assert stage.held() == ["1.0"]


def test_releases_shows_what_answered_and_why(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ReleasesSettings(**stage.places.__dict__)
    assert releases_verb.main(settings) == 0
    said = capsys.readouterr().out
    assert "without proof: test" in said
    assert "rollback from 1.1: by hand" in said
    assert "digits: 1.0 should answer, released without proof" in said
    assert releases_verb.main(replace(settings, all=True, json=True)) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(stage.entries())


def test_release_by_hand_says_so_for_ever(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ReleaseSettings(**stage.places.__dict__, model="digits", version="1.2")
    with asking(stage) as answered:
        assert release_verb.main(settings) == 0
        while answered[-1:] != ["1.2"]:
            time.sleep(0.05)
    assert (stage.released().version, stage.released().proven) == ("1.2", False)
    assert rollback_verb.main(stage.rollback()) == 0
    releases_verb.main(ReleasesSettings(**stage.places.__dict__))
    assert "released by hand, without proof" in capsys.readouterr().out


def test_a_release_by_hand_ends_what_was_interrupted(stage: Stage) -> None:
    with verb.rig(stage.settings(), stage.record("1.1"), limits(stage)) as made:
        state = rollout.begin(made)
        for _ in range(2):
            state = rollout.advance(state, made)
    assert release_verb.main(ReleaseSettings(**stage.places.__dict__, model="digits", version="1.0")) == 0
    with journal.open(stage.store) as book:
        assert rollout.unfinished(book, "digits") is None
    assert reconcile_verb.main(ReconcileSettings(**stage.places.__dict__)) == 0
    assert (stage.held(), stage.released().version) == (["1.0"], "1.0")


def test_a_regressor_is_rolled_out_too(regressor: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its gate compares errors of values; and it has no labels to agree on."""
    store = tmp_path / "store"
    first = archives.build(regressor.run, store).record
    archives.build(regressor.run, store, threads=2)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "default.toml").write_text(rollouts.QUICK, encoding="utf-8")
    with journal.open(store) as book:
        book.release(first.model, "1.0", proven=False, why="test")
    with torchserve.home(tmp_path, {first.model: Expected("1.0")}, archives=[first.file], store=store) as home:
        home.bring_up()
        settings = RolloutSettings(store=store, config=home.config_path, runs=regressor.run.path.parent)
        assert verb.main(settings) == 0
        said = capsys.readouterr().out
        assert "diabetes-mlp 1.1 answers now (was 1.0)" in said
        assert "error" in said
        with journal.open(store) as book:
            verdict = rollout.last_verdict(book, first.model, "1.1")
        assert verdict is not None
        assert (verdict.task, verdict.outcome) == ("regression", "pass")


def test_the_stopped_server_is_told_of(digits: Built, tmp_path: Path) -> None:
    with rollouts.stage(tmp_path, digits, start=False) as stage, pytest.raises(ServerUnreachable, match="not running"):
        verb.rolled_out(stage.settings("1.1"))


def test_every_phase_is_one_function() -> None:
    assert set(phases.STEPS) == {phase for kind in PHASES.values() for phase in kind}
    assert loading.ready_pids(None) == ()
