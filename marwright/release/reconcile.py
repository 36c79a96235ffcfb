"""What the server does, against what the journal says it should do; and how to make the one the other.

for difference in reconcile.differences(book, "digits", loading.versions(client, "digits")):
    difference.sentence, difference.mend
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from marwright.errors import RolloutError
from marwright.packing import golden, records
from marwright.release import loading, proof, retiring, rollout, shadow
from marwright.release.answers import ModelStatus
from marwright.release.client import Client
from marwright.release.journal import Journal
from marwright.release.policy import Policy
from marwright.release.server import Server

Mend = Literal["resume", "load", "switch", "retire", "forget"]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the journal says."""

    model: str
    version: str
    mend: Mend
    sentence: str


def differences(book: Journal, model: str, held: Mapping[str, ModelStatus]) -> list[Difference]:
    """All of them, in the order in which they are to be mended; `held` is what the server has of the model.

    While a rollout is unfinished, what it has loaded is its own business.
    """
    found: list[Difference] = []

    def add(version: str, mend: Mend, sentence: str) -> None:
        found.append(Difference(model, version, mend, sentence))

    left = rollout.unfinished(book, model)
    if left is not None:
        add(left.version, "resume", f"the {left.kind} of {model} {left.version} is unfinished, in phase {left.next}")
    released = book.released(model)
    live = book.live(model)
    if released is not None:
        if released.version not in held:
            add(released.version, "load", f"{model} {released.version} is released, the server has not loaded it")
        answers = next((version for version, status in held.items() if status.default), None)
        if answers is not None and answers != released.version:
            add(released.version, "switch", f"{model} {answers} answers, the journal says {released.version}")
    warm = rollout.due(book, model)
    for version in sorted(held):
        if (released and version == released.version) or (left and version in (left.version, left.champion)):
            continue
        if version in warm and warm[version] <= time.time():
            add(version, "retire", f"{model} {version} was kept warm, and its time is over")
        elif version not in live:
            add(version, "retire", f"{model} {version} is loaded, the journal does not say that it should be")
    for version in sorted(live - held.keys()):
        if released is None or version != released.version:
            add(version, "forget", f"{model} {version} is not loaded any more")
    return found


def mend(difference: Difference, server: Server, client: Client, book: Journal, policy: Policy) -> str:
    """Make the server what the journal says, for everything but "resume"; what was done, in words."""
    store = book.store
    model, version = difference.model, difference.version
    if difference.mend == "forget":
        book.add(model, version, "retired", why="not loaded any more: the server was started again")
        return f"{model} {version}: noted that it is not loaded any more"
    record = records.record(store, model, version)
    examples = golden.read(store / record.file)
    if difference.mend == "retire":
        left = retiring.retire(
            client,
            book,
            model,
            version,
            shadow.from_golden(examples)[0],
            why=difference.sentence,
            idle=policy.settle.idle_seconds,
            seconds=policy.settle.drain_seconds,
        )
        return f"{model} {version} is kept: {left}" if left else f"{model} {version} is retired"
    if difference.mend == "load":
        records.check_whole(record, store)
        loading.bring_in(
            client,
            record,
            server=server,
            call_seconds=policy.server.call_seconds,
            ready_seconds=policy.ready.seconds,
        )
        proof.prove(client, record, examples)
        return f"{model} {version} is loaded, and answers its golden examples"
    if difference.mend == "switch":
        proof.prove(client, record, examples)
        client.set_default(model, version)
        proof.prove(client, record, examples, pinned=False)
        book.add(model, version, "reconciled", why=difference.sentence)
        return f"{model} {version} answers"
    raise RolloutError(difference.sentence, hint=f"marwright rollout --resume --model {model}")
