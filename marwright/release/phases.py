"""The phases of a rollout, one function each: what is done, and what must be seen, before the next one may begin.

A phase may be begun twice: when the process was killed in the middle of one, it is begun again. It returns what it
found out, for the journal and for later phases, and raises the reason to go back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from marwright.errors import ArchiveError, Circumstance, RolloutError, ServerError
from marwright.packing import golden, records, replay
from marwright.packing.golden import Golden
from marwright.packing.records import ArchiveRecord
from marwright.release import gate, loading, measured, proof, retiring, serving, shadow, watching
from marwright.release.client import Client
from marwright.release.gate import Observed, Verdict
from marwright.release.journal import Journal
from marwright.release.measured import Figures, Snapshot
from marwright.release.policy import Policy
from marwright.release.server import Server
from marwright.release.shadow import Holdout, Sample

Kind = Literal["rollout", "rollback"]
PHASES: Mapping[str, tuple[str, ...]] = {
    "rollout": ("verified", "registered", "ready", "shadowed", "gated", "promoted", "watched", "settled"),
    "rollback": ("registered", "ready", "promoted", "settled"),
}


@dataclass(frozen=True)
class State:
    """How far a rollout is. All of it can be read from the journal."""

    id: int
    model: str
    version: str
    champion: str | None
    """What answered when it began."""
    kind: Kind = "rollout"
    phase: str = ""
    """The last one that is done."""
    looks: int = 0
    """Of the gate, so far inconclusive."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What it was begun with: the policy, where its examples came from, why. A resumed one goes on with the same."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the phases found out."""
    failing: str = ""
    """Why it goes back."""
    innocent: bool = False
    """That says nothing about the version: Ctrl-C, or a server that ended. It may be tried again."""
    ended: Literal["", "settled", "rolled back"] = ""
    left: str = ""
    """What could not be put back, in words."""

    @property
    def next(self) -> str:
        phases = PHASES[self.kind]
        return phases[phases.index(self.phase) + 1 if self.phase else 0]


@dataclass(frozen=True)
class Rig:
    """What a rollout works with."""

    server: Server
    client: Client
    book: Journal
    store: Path
    config: Path
    policy: Policy
    challenger: ArchiveRecord
    kind: Kind = "rollout"
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the journal keeps beside the policy, for a resumed rollout."""
    samples: Sequence[Sample] = ()
    """To be replayed to both versions; golden examples where there are none."""
    holdout: Holdout | None = None
    """For the gate; only a model's first release does without."""
    progress: Callable[[str], object] = print

    @property
    def model(self) -> str:
        return self.challenger.model

    def golden(self, version: str) -> tuple[Golden, ...]:
        return golden.read(self.store / records.record(self.store, self.model, version).file)

    def probe(self, version: str) -> Sample:
        """A request that this version certainly answers."""
        return shadow.from_golden(self.golden(version))[0]


class NotPassed(Exception):
    """The gate has not said yes: it says no, or wants another look."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


def _verified(state: State, rig: Rig) -> dict[str, Any]:
    rig.progress(f"verifying {rig.challenger.file} in a clean process")
    records.check_whole(rig.challenger, rig.store)
    replay.prove(rig.store / rig.challenger.file)
    return {"sha256": rig.challenger.sha256}


def _registered(state: State, rig: Rig) -> dict[str, Any]:
    rig.progress(f"loading {state.model} {state.version} beside {state.champion or 'nothing'}")
    counted = None
    if state.kind == "rollout" and state.champion is not None:  # a way back asks for no more than it needs
        counted = measured.read(rig.client).of(state.model, state.champion)
    began = time.time()
    loading.register(rig.client, rig.challenger, seconds=rig.policy.server.call_seconds)
    found = rig.server.find()
    return {
        "began": began,
        "server": [found.pid, found.process.create_time()] if found else None,
        "champion_counted": counted.only(*watching.KEPT).to_list() if counted else None,
    }


def _ready(state: State, rig: Rig) -> dict[str, Any]:
    pids = loading.wait_ready(
        rig.client,
        rig.challenger,
        server=rig.server,
        since=float(state.facts.get("began", 0.0)),
        seconds=rig.policy.ready.seconds,
    )
    seen = proof.prove(rig.client, rig.challenger, rig.golden(state.version))
    rig.progress(f"{seen.examples} golden examples answered rightly over REST and gRPC")
    return {"pids": pids, "golden": seen.examples, "golden_seconds": round(seen.seconds, 6)}


def _shadowed(state: State, rig: Rig) -> dict[str, Any]:
    policy = rig.policy.shadow
    if state.champion is None or not policy.requests:
        return {"shadow": "nothing to compare with" if policy.requests else "switched off"}
    known = rig.samples or shadow.from_golden(rig.golden(state.version))
    chosen = [known[number % len(known)] for number in range(policy.requests)]
    rig.progress(f"{len(chosen)} requests to {state.champion} and {state.version}")
    versions = (state.champion, state.version)
    champion, challenger = shadow.side_by_side(rig.client, state.model, versions, chosen, max_missed=policy.max_errors)
    agreement = shadow.agreement(champion, challenger)
    grown = max(0, challenger.grown - champion.grown) / 1e6
    ratio = challenger.median / champion.median
    answered = sum(one is not None for one in champion.answers)
    missed = shadow.missed(champion, challenger)
    _same_workers(state, rig)
    if not answered:
        raise Circumstance(
            f"the champion {state.champion} answered none of {len(chosen)} requests: {champion.errors[0]}"
        )
    if missed > policy.max_errors:
        raise RolloutError(
            f"errors: {missed} of {answered} requests that {state.champion} answered, limit {policy.max_errors};"
            f" the first: {challenger.errors[0]}"
        )
    if agreement < policy.min_agreement:
        raise RolloutError(f"agreement with {state.champion} is {agreement:.1%}, limit {policy.min_agreement:.1%}")
    if ratio > policy.max_latency_ratio:
        raise RolloutError(
            f"median latency {challenger.median * 1000:.1f} ms, {state.champion} has {champion.median * 1000:.1f} ms:"
            f" {ratio:.2f} times, limit {policy.max_latency_ratio:g}"
        )
    if grown > policy.max_growth_mb:
        raise RolloutError(
            f"its worker grew by {grown:.0f} MB more than that of {state.champion} over {len(chosen) // 2} requests,"
            f" limit {policy.max_growth_mb:g} MB"
        )
    rig.progress(f"agreement {agreement:.1%}, latency {ratio:.2f} times, no errors")
    return {
        "agreement": round(agreement, 4),
        "latency_ratio": round(ratio, 3),
        "latency": round(challenger.median, 6),
        "grown_mb": round(grown, 1),
    }


def _gated(state: State, rig: Rig) -> dict[str, Any]:
    if state.champion is None:
        return {"gate": "nothing to compare with"}
    if rig.holdout is None or not len(rig.holdout.samples):
        raise Circumstance(
            f"no labelled examples for the gate of {state.model} {state.version}",
            hint="--holdout examples.npz, with inputs and labels that neither version has learned from",
        )
    champion = records.record(rig.store, state.model, state.champion)
    look = state.looks + 1
    count = gate.examples_at(look, rig.policy.gate, len(rig.holdout.samples))
    rig.progress(f"gate, look {look} of {rig.policy.gate.looks}: {count} labelled examples to both")
    versions = (state.champion, state.version)
    sides = shadow.side_by_side(rig.client, state.model, versions, rig.holdout.samples[:count], max_missed=0)
    _same_workers(state, rig)
    if sides[0].errors:  # compared with a silent champion, anybody looks good
        raise Circumstance(
            f"the champion {state.champion} left {len(sides[0].errors)} of {count} examples unanswered:"
            f" {sides[0].errors[0]}"
        )
    ours, theirs = (
        Observed(
            version=side.version,
            outputs=shadow.outputs(side, rig.holdout.classes),
            seconds=np.array(side.seconds),
            size=record.size,
            memory=side.memory,
        )
        for side, record in zip(sides, (champion, rig.challenger), strict=True)
    )
    verdict = gate.decide(
        ours, theirs, rig.holdout.targets[: len(ours.outputs)], rig.policy.gate, classes=rig.holdout.classes, look=look
    )
    if verdict.outcome != "pass":
        raise NotPassed(verdict)
    rig.progress(f"the gate says yes: {verdict.reason}")
    return {"verdict": verdict.to_dict()}


def _promoted(state: State, rig: Rig) -> dict[str, Any]:
    back = state.kind == "rollback"
    why = f"rollback from {state.champion}: {state.given.get('why', '')}" if back else f"rollout {state.id}"
    before = Snapshot(0.0) if back else measured.read(rig.client)
    counted = before.of(state.model, state.version)
    rig.book.add(state.model, state.version, "switching", why=why)
    rig.client.set_default(state.model, state.version)
    proven = not back or rig.book.was_proven(state.model, state.version)
    rig.book.release(state.model, state.version, proven=proven, why=why, running=True, back=back)
    serving.refresh(rig.config, rig.store)
    seen = proof.prove(rig.client, rig.challenger, rig.golden(state.version), pinned=False)
    rig.progress(f"{state.version} answers; {seen.examples} golden examples answered rightly on the default URL")
    if back:
        return {}
    return {
        "counted": counted.only(*watching.KEPT).to_list() if counted else [],
        "asked": before.asked.get((state.model, "default"), 0.0) + 2 * seen.examples,  # over REST and gRPC
    }


def _watched(state: State, rig: Rig) -> dict[str, Any]:
    policy = rig.policy.watch
    examples = rig.golden(state.version)
    requests = shadow.from_golden(examples)
    limit = policy.max_latency_ratio * float(state.facts.get("latency", 0.0))
    seconds: list[float] = []
    began = time.monotonic()
    rig.progress(f"watching for {policy.seconds:g} s")
    turn = 0
    while True:
        example, request = examples[turn % len(examples)], requests[turn % len(requests)]
        labels = {"X-Top-K": str(len(example.answer))}
        asked = time.perf_counter()
        answer = rig.client.predict(
            state.model, request.body, headers=labels, content_type=request.content_type, capture=False
        )
        seconds.append(time.perf_counter() - asked)
        if (answer.version, answer.bundle) != (state.version, rig.challenger.bundle):
            raise RolloutError(f"{answer.version} ({answer.bundle}) answers on the default URL")
        wrong = golden.differences([example], [answer.json()])
        if wrong:
            raise RolloutError(f"a golden example is answered wrongly: {wrong[0]}")
        turn += 1
        _same_workers(state, rig)
        _judge_counts(state, rig, measured.read(rig.client), probes=turn)
        if limit and len(seconds) >= 5 and median(seconds) > limit:
            raise RolloutError(
                f"median latency {median(seconds) * 1000:.1f} ms, limit {limit * 1000:.1f} ms"
                f" ({policy.max_latency_ratio:g} times that before the switch)"
            )
        if time.monotonic() - began + policy.every > policy.seconds:
            break
        time.sleep(policy.every)
    counted = _judge_counts(state, rig, measured.settled(rig.client, state.model), probes=turn)
    _same_workers(state, rig)
    facts = {"looks_taken": turn, "watch_latency": round(median(seconds), 6)}
    if counted is None:
        rig.progress(f"{state.model} {state.version} counts nothing: watched by golden examples and restarts alone")
        return {**facts, "watched_requests": None}
    rig.progress(f"{counted.answered:.0f} requests answered, {counted.failed:.0f} of them with 5xx")
    return {**facts, "watched_requests": counted.answered, "watched_errors": counted.failed}


def _judge_counts(state: State, rig: Rig, page: Snapshot, *, probes: int) -> Figures | None:
    """What the version has counted since the switch; None where it does not count. RolloutError where that is bad."""
    now = page.of(state.model, state.version)
    if now is None:
        return None
    before = state.facts.get("champion_counted")
    counted = now.only(*watching.KEPT) - Figures.from_list(state.facts.get("counted", []))
    asked = page.asked.get((state.model, "default"), math.inf) - float(state.facts.get("asked", 0.0))
    complaint = watching.complaint(
        counted,
        Figures.from_list(before) if before is not None else None,
        rig.policy.watch,
        version=state.version,
        champion=state.champion,
        asked=min(asked, counted.answered) - probes,  # TorchServe may not count; handlers do so with a delay
    )
    if complaint:
        raise RolloutError(complaint)
    return counted if counted.answered else None  # what an earlier worker of that version counted is no sign of life


def _settled(state: State, rig: Rig) -> dict[str, Any]:
    """The champion is drained and kept warm, or retired; whatever else is loaded is retired.

    What cannot be done here is no reason to go back from a good version: it is noted, and left to `reconcile`.
    """
    policy = rig.policy.settle
    try:
        others = sorted(loading.versions(rig.client, state.model).keys() - {state.version})
    except ServerError as error:
        others = [state.champion] if state.champion else []
        rig.progress(f"the server cannot be asked what it holds: {error.message}")
    facts: dict[str, Any] = {}
    for version in others:
        if version == state.champion and state.kind == "rollout" and policy.warm_seconds > 0:
            rig.progress(f"{version} is drained and stays warm for {policy.warm_seconds:g} s")
            facts |= {"warm": version, "warm_until": time.time() + policy.warm_seconds}
        else:
            rig.progress(f"retiring {version}")
        left = _out(state, rig, version, warm=facts.get("warm") == version)
        if left:
            rig.progress(f"{version} is not drained: {left}")
            facts.setdefault("undrained", {})[version] = left
    return facts


def _out(state: State, rig: Rig, version: str, *, warm: bool) -> str:
    """Drain a version, and unless it is to stay warm take it out; what is left to say, in words."""
    policy = rig.policy.settle
    try:
        probe = rig.probe(version)
        if warm:
            retiring.drain(rig.client, state.model, version, probe, idle=0, seconds=policy.drain_seconds)
            return ""
        return retiring.retire(
            rig.client,
            rig.book,
            state.model,
            version,
            probe,
            why=f"{state.kind} to {state.version}",
            idle=policy.idle_seconds,
            seconds=policy.drain_seconds,
        )
    except (ServerError, ArchiveError) as error:
        return error.message


def note(rig: Rig, state: State, phase: str, step: str, **facts: Any) -> None:
    rig.book.add(
        state.model,
        state.version,
        "rollout",
        id=state.id,
        kind=state.kind,
        phase=phase,
        step=step,
        champion=state.champion,
        **facts,
    )


def _restarts(state: State, rig: Rig) -> int:
    """How many of the workers that were ready at first are there no more."""
    now = loading.ready_pids(loading.loaded(rig.client, state.model, state.version))
    return len(set(state.facts.get("pids", ())) - set(now))


def _same_workers(state: State, rig: Rig) -> None:
    restarts = _restarts(state, rig)
    if restarts > rig.policy.watch.max_worker_restarts:
        words = rig.server.last_words(state.model, state.version)
        raise RolloutError(
            f"{restarts} of its workers died and were restarted, limit {rig.policy.watch.max_worker_restarts}"
            + (f": {words}" if words else "")
        )


STEPS: Mapping[str, Callable[[State, Rig], dict[str, Any]]] = {
    "verified": _verified,
    "registered": _registered,
    "ready": _ready,
    "shadowed": _shadowed,
    "gated": _gated,
    "promoted": _promoted,
    "watched": _watched,
    "settled": _settled,
}
