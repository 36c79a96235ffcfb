"""What a rollout would do, call by call, without doing it.

Written down here, and held against the calls of a real rollout by a test.
"""

from __future__ import annotations

from dataclasses import dataclass

from marwright.packing.golden import LEAST
from marwright.packing.records import ArchiveRecord
from marwright.release import gate
from marwright.release.policy import Policy
from marwright.release.shadow import Holdout

OTHERS = "and, when it is settled, the same for every other version that is loaded"


@dataclass(frozen=True)
class Planned:
    """One call to the server, or one thing done here, in a phase."""

    phase: str
    call: str
    note: str = ""


def calls(record: ArchiveRecord, champion: str | None, limits: Policy, holdout: Holdout | None) -> list[Planned]:
    """In order; calls that a phase repeats are listed once, with how often. A version that answers is only proved.

    The server is not asked: what else it holds of the model, and would lose, is in the last note.
    """
    model, version = record.model, record.version
    default, pinned = f"/predictions/{model}", f"/predictions/{model}/{version}"
    describe = [f"GET /models/{model}", f"GET /models/{model}/{version}"]
    everything = ["GET /models", f"GET /models/{model}", f"GET /models/{model}/all"]
    golden = f"{LEAST} golden examples"
    plan: list[Planned] = []

    def add(phase: str, *made: str, note: str = "") -> None:
        plan.extend(Planned(phase, call, note if call == made[-1] else "") for call in made)

    add("begin", *everything, note=f"{champion or 'nothing'} must answer, as the journal says")
    if champion == version:
        proof = [f"GET /models/{model}", f"POST {default}", f"gRPC Predictions {model}"]
        add("proved", *proof, note=f"{golden}; it answers already")
        return plan
    add("verified", f"load {record.file} in a clean process", note=f"sha256 and {golden}")
    if champion is not None:
        add("registered", "GET /metrics", note=f"what {champion} has counted so far")
    add("registered", *describe, f"gRPC RegisterModel {record.file}", note=f"{record.workers} workers")
    add("ready", *describe, note=f"until {record.workers} READY, at most {limits.ready.seconds:g} s")
    add("ready", f"POST {pinned}", note=golden)
    add("ready", f"gRPC Predictions {model} {version}", note=golden)
    if champion is not None:
        both = [f"POST /predictions/{model}/{champion}", f"POST {pinned}"]
        others = [f"GET /models/{model}/{champion}"]
        if limits.shadow.requests:
            add("shadowed", *describe, *others, *both, note=f"{limits.shadow.requests} requests, in turns")
        count = len(holdout.samples) if holdout else 0
        looks = (
            [gate.examples_at(look, limits.gate, count) for look in range(1, limits.gate.looks + 1)] if count else []
        )
        add("gated", *describe, *others, *both, note=f"labelled: {', then '.join(map(str, looks)) or 'none there!'}")
    add("promoted", "GET /metrics", note="what it has counted so far")
    add("promoted", f"PUT /models/{model}/{version}/set-default", note="journalled before and after")
    add("promoted", f"GET /models/{model}", f"POST {default}", f"gRPC Predictions {model}", note=golden)
    watched = f"every {limits.watch.every:g} s for {limits.watch.seconds:g} s"
    add("watched", f"POST {default}", *describe, "GET /metrics", note=watched)
    add("settled", *everything)
    if champion is not None:
        drained = [f"GET /models/{model}/{champion}", "GET /metrics", f"POST /predictions/{model}/{champion}"]
        add("settled", *drained, note="until it owes no answer and each of its workers has answered")
        if limits.settle.warm_seconds:
            add("later", *drained, note=f"after {limits.settle.warm_seconds:g} s, by `marwright reconcile`")
        last = "later" if limits.settle.warm_seconds else "settled"
        add(last, f"gRPC UnregisterModel {model} {champion}", note=OTHERS)
    return plan
