"""Bring a built version to answer instead of the one that does, without losing a request, and back when it is worse.

    state = rollout.begin(rig)
    while not state.ended:
        state = rollout.advance(state, rig)

| phase      | done when                                                                                             |
|------------|-------------------------------------------------------------------------------------------------------|
| verified   | the file is the one that was built; a clean process loads it and answers its golden examples          |
| registered | the server has it, under its own version; the champion goes on answering                              |
| ready      | READY workers, the right bundle, golden answers at the pinned URL, over REST and gRPC                 |
| shadowed   | the same requests to both: errors, agreement, latency, memory                                         |
| gated      | `gate.decide` on labelled examples; inconclusive means another look with more of them                 |
| promoted   | the default switched, `released` in the journal, golden answers on the default URL                    |
| watched    | for a time: golden answers, worker restarts; errors, latency, confidence as its handlers count them   |
| settled    | the old version owes no answer; it stays warm for the rollback window, then it is retired             |

Each phase is in the journal before it begins and when it is done, and may be begun again: a rollout whose process was
killed goes on from its last phase (`unfinished`). Whatever goes wrong on the way, the champion is the default again and
the challenger is unregistered. A rollback is the same with fewer phases, towards a version that answered before.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import replace

from marwright.errors import (
    ArchiveError,
    Circumstance,
    MarwrightError,
    RolledBack,
    RolloutError,
    ServerError,
    ServerRefused,
    ServerUnreachable,
)
from marwright.packing import records
from marwright.release import loading, retiring, serving
from marwright.release.gate import Verdict
from marwright.release.journal import Entry, Journal
from marwright.release.phases import PHASES, STEPS, NotPassed, Rig, State, note

_CTRL_C = "interrupted by Ctrl-C"


def begin(rig: Rig) -> State:
    """A new rollout; RolloutError where the journal or the server is not fit for one."""
    left = unfinished(rig.book, rig.model)
    if left is not None:
        raise RolloutError(
            f"the {left.kind} of {left.model} {left.version} was interrupted in phase {left.next}",
            hint=f"marwright rollout --resume --model {rig.model}",
        )
    answers = loading.default_version(rig.client, rig.model)
    released = rig.book.released(rig.model)
    if answers != (released.version if released else None):
        raise RolloutError(
            f"{answers or 'no version'} of {rig.model} answers, the journal says"
            f" {released.version if released else 'none'}",
            hint="marwright reconcile",
        )
    used = (int(entry.detail.get("id", 0)) for entry in rig.book.entries(rig.model, event="rollout"))
    given = {"policy": rig.policy.to_dict(), **rig.given}
    return State(1 + max(used, default=0), rig.model, rig.challenger.version, answers, kind=rig.kind, given=given)


def advance(state: State, rig: Rig) -> State:
    """One phase further, journalled before and after; or, once something went wrong, back to the champion."""
    if state.failing:
        return _go_back(state, rig)
    phase = state.next
    try:
        note(rig, state, phase, "begin", **({} if state.phase else {"given": dict(state.given)}))
        facts = STEPS[phase](state, rig)
        note(rig, state, phase, "done", **facts)
    except NotPassed as gate:
        return _not_passed(state, rig, gate.verdict)
    except KeyboardInterrupt:
        if phase == "settled":  # the new version has shown itself: this is no reason to go back
            raise
        return replace(state, failing=f"{phase}: {_CTRL_C}", innocent=True)
    except Exception as error:
        if phase == "settled":
            raise
        if not isinstance(error, MarwrightError):  # a fault of ours, or of the disk: the champion comes first
            rig.progress(traceback.format_exc())
        said = str(error) if isinstance(error, MarwrightError) else f"{type(error).__name__}: {error}"
        return replace(state, failing=f"{phase}: {said}", innocent=_innocent(state, rig, phase, error))
    return replace(
        state,
        phase=phase,
        facts={**state.facts, **facts},
        ended="settled" if phase == PHASES[state.kind][-1] else "",
    )


def _not_passed(state: State, rig: Rig, verdict: Verdict) -> State:
    """Another look, or the way back. Which of them is in the journal with the verdict: it is not asked twice."""
    looks = state.looks + 1
    last = verdict.outcome == "fail" or looks >= rig.policy.gate.looks
    reason = ""
    if last:
        says = "the gate says no" if verdict.outcome == "fail" else f"inconclusive after {looks} looks"
        reason = f"gated: {says}: {verdict.reason}"
    try:
        note(rig, state, "gated", "verdict" if last else "look", verdict=verdict.to_dict(), reason=reason)
    except RolloutError as error:
        return replace(state, failing=f"gated: {error}", innocent=True)
    return replace(state, looks=looks, failing=reason)


def _innocent(state: State, rig: Rig, phase: str, error: Exception) -> bool:
    """Whether that says nothing about the version: the server, the disk or the line failed, not the challenger."""
    if isinstance(error, Circumstance | OSError):
        return True
    found = rig.server.find()
    began = state.facts.get("server")
    if found is None or (began and list(began) != [found.pid, found.process.create_time()]):
        return True
    return phase == "registered" and isinstance(error, ServerUnreachable | ServerRefused)


def run(state: State, rig: Rig) -> State:
    """To its end. RolledBack where that is where it began; KeyboardInterrupt where Ctrl-C was the reason."""
    while not state.ended:
        try:
            state = advance(state, rig)
        except KeyboardInterrupt:
            if not state.failing:
                raise
            rig.progress("one moment: the champion has to be the default before this ends")
    if state.ended == "settled":
        return state
    if state.failing.endswith(_CTRL_C):
        raise KeyboardInterrupt
    left = f"\n{state.left}" if state.left else ""
    raise RolledBack(
        f"{state.model} {state.version} was rolled back, {_what_answers(state, rig)}",
        reason=f"{state.failing}{left}",
        hint="marwright releases",
    )


def unfinished(book: Journal, model: str) -> State | None:
    """The rollout that has neither settled nor been rolled back; None where there is none."""
    events = ("rollout", "rolling back", "rolled back")
    # Rollouts had no number before there were phases; none of those is unfinished.
    entries = [entry for entry in book.entries(model) if entry.event in events and "id" in entry.detail]
    state: State | None = None
    for entry in entries:
        begins = state is None or state.id != entry.detail["id"]
        state = _after(_first(entry) if begins or state is None else state, entry)
    return None if state is None or state.ended else state


def last_verdict(book: Journal, model: str, version: str) -> Verdict | None:
    """What the gate said of that version in its last rollout; None where that did not come so far."""
    of_it = [entry for entry in book.entries(model, event="rollout") if entry.version == version]
    said = [entry for entry in of_it if "verdict" in entry.detail and entry.detail["id"] == of_it[-1].detail["id"]]
    return Verdict.from_dict(said[-1].detail["verdict"]) if said else None


def due(book: Journal, model: str) -> dict[str, float]:
    """Versions that stay warm after a rollout, and until when (Unix seconds)."""
    warm: dict[str, float] = {}
    for entry in book.entries(model):
        if entry.event == "rollout" and entry.detail.get("warm"):
            warm[entry.detail["warm"]] = float(entry.detail["warm_until"])
        elif entry.event == "kept":  # it was in use when its time was over
            warm[entry.version] = entry.time
        elif entry.event in ("retired", "released", "rolled back"):
            warm.pop(entry.version, None)
    return warm


# -------------------------------------------------------------------- private


def _first(entry: Entry) -> State:
    detail = entry.detail
    return State(
        detail["id"],
        entry.model,
        entry.version,
        detail["champion"],
        kind=detail.get("kind", "rollout"),
        given=detail.get("given", {}),
    )


def _after(state: State, entry: Entry) -> State:
    detail = entry.detail
    if entry.event == "rolled back":
        return replace(state, ended="rolled back")
    if entry.event == "rolling back":
        return replace(state, failing=detail["reason"], innocent=detail.get("innocent", False))
    if detail["step"] in ("look", "verdict"):
        return replace(state, looks=state.looks + 1, failing=detail.get("reason", ""))
    if detail["step"] != "done":
        return state
    facts = {key: value for key, value in detail.items() if key not in ("id", "kind", "phase", "step", "champion")}
    return replace(
        state,
        phase=detail["phase"],
        facts={**state.facts, **facts},
        ended="settled" if detail["phase"] == PHASES[state.kind][-1] else "",
    )


def _go_back(state: State, rig: Rig) -> State:
    """The champion is the default, the challenger is gone; as far as the server can still be told."""
    rig.progress(f"going back to {state.champion or 'nothing'}: {state.failing}")
    about = {
        "id": state.id,
        "reason": state.failing,
        "champion": state.champion,
        "innocent": state.innocent,
    }
    with _journal_or_stop(state, rig):
        rig.book.add(state.model, state.version, "rolling back", **about)
        released = rig.book.released(state.model)
        switched = state.champion is not None and released is not None and released.version != state.champion
        if switched and state.champion:
            rig.book.add(state.model, state.champion, "switching", why=f"rolled back from {state.version}")
    untold: MarwrightError | None = None
    try:
        _champion_by_default(state, rig)
    except (ServerError, ArchiveError) as error:
        untold = error
    with _journal_or_stop(state, rig):
        if switched and state.champion:  # also where the server could not be told: its next start is right then
            why = f"rolled back from {state.version}: {state.failing.splitlines()[0]}"
            proven = rig.book.was_proven(state.model, state.champion)
            rig.book.release(state.model, state.champion, proven=proven, why=why, running=True, back=True)
            serving.refresh(rig.config, rig.store)
    if untold is not None and rig.server.find() is not None:
        raise RolloutError(
            f"{state.model} {state.version} is to be rolled back, and the server cannot be told to let"
            f" {state.champion} answer: {untold.message}\nwhy it is to be rolled back: {state.failing}",
            hint=f"put that right, then marwright rollout --resume --model {state.model}",
        ) from untold
    if untold is not None:
        left = [f"the server could not be told to let {state.champion} answer: {untold.message}"]
    else:
        left = list(filter(None, [_challenger_out(state, rig)]))
    with _journal_or_stop(state, rig):
        rig.book.add(state.model, state.version, "rolled back", **about, left=left)
    return replace(state, ended="rolled back", left="\n".join(left))


def _champion_by_default(state: State, rig: Rig) -> None:
    if state.champion is None or loading.default_version(rig.client, state.model) == state.champion:
        return
    loading.bring_in(
        rig.client,
        records.record(rig.store, state.model, state.champion),
        server=rig.server,
        call_seconds=rig.policy.server.call_seconds,
        ready_seconds=rig.policy.ready.seconds,
    )
    rig.client.set_default(state.model, state.champion)


def _challenger_out(state: State, rig: Rig) -> str:
    """Unregister it, drained as far as it can be; what is left to say, in words."""
    settle = rig.policy.settle
    released = rig.book.released(state.model)
    try:
        if state.version not in loading.versions(rig.client, state.model):
            return ""
        if released is not None and released.version == state.version:
            return f"{state.version} is the first of all and stays: there is nothing to go back to"
        try:
            probe = rig.probe(state.version)
        except ArchiveError as error:
            loading.remove(rig.client, state.model, state.version)
            return f"{state.version} was taken out without draining it: {error.message}"
        return retiring.force_out(
            rig.client,
            state.model,
            state.version,
            probe,
            idle=settle.idle_seconds,
            seconds=settle.drain_seconds,
        )
    except ServerError as error:
        return f"{state.version} could not be taken out of the server: {error.message}"


@contextlib.contextmanager
def _journal_or_stop(state: State, rig: Rig) -> Iterator[None]:
    """Where the journal cannot be written nothing is decided any more: the server is made what it says."""
    try:
        yield
    except RolloutError as trouble:
        with contextlib.suppress(MarwrightError):
            released = rig.book.released(state.model)
            if released is not None and loading.default_version(rig.client, state.model) != released.version:
                rig.client.set_default(state.model, released.version)
        raise RolloutError(
            f"the {state.kind} of {state.model} {state.version} stopped: {state.failing}\n{trouble.message}",
            hint=f"put that right, then marwright rollout --resume --model {state.model}",
        ) from trouble


def _what_answers(state: State, rig: Rig) -> str:
    try:
        answers = loading.default_version(rig.client, state.model)
    except MarwrightError:
        return f"the server cannot be asked; its next start answers {state.champion or 'nothing'}"
    return f"{answers} answers" if answers else "no version answers"
