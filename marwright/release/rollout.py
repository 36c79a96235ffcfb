"""Bring a built version to answer, beside the one that does, with proof before and after; and back when it fails.

    registered   loaded under its own version; the champion goes on answering
    ready        READY workers, the right bundle, golden examples answered at the pinned URL, over REST and gRPC
    promoted     the default switched, and the same proof had once more on the default URL

Each step is in the journal before it is made. Whatever goes wrong on the way, the champion is the default again and the
challenger is unregistered: `RolledBack` says why.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from marwright.errors import MarwrightError, NotReady, RolledBack
from marwright.packing.golden import Golden
from marwright.packing.records import ArchiveRecord
from marwright.release import proof
from marwright.release.answers import ModelStatus
from marwright.release.client import Client
from marwright.release.journal import Journal
from marwright.release.proof import Proof

Progress = Callable[[str], None]


def roll_out(
    client: Client,
    challenger: ArchiveRecord,
    examples: Sequence[Golden],
    *,
    book: Journal,
    seconds: float,
    progress: Progress,
) -> Proof:
    """Register, prove, promote, prove; the proven release is in the journal when this returns.

    `seconds` is for its workers to become ready. The version that answered before stays loaded.
    """
    champion = default_version(client, challenger.model)
    if champion == challenger.version:
        seen = proof.prove(client, challenger, examples, pinned=False)
        book.release(challenger.model, challenger.version, proven=True, why="rollout: it answered already, proved")
        return seen
    try:
        progress(f"loading {challenger.model} {challenger.version} beside {champion or 'nothing'}")
        book.add(challenger.model, challenger.version, "rollout", phase="registered", champion=champion)
        load(client, challenger, seconds=seconds)
        seen = proof.prove(client, challenger, examples)
        progress(f"{seen.examples} golden examples answered rightly over REST and gRPC")
        book.add(challenger.model, challenger.version, "rollout", phase="promoted", champion=champion)
        client.set_default(challenger.model, challenger.version)
        seen = proof.prove(client, challenger, examples, pinned=False)
    except (MarwrightError, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        book.add(challenger.model, challenger.version, "rolled back", reason=reason, champion=champion)
        still = f"{champion} answers" if champion else "no version answers"
        try:
            _roll_back(client, challenger, champion)
        except MarwrightError as trouble:
            still = f"the server could not be told ({trouble.message}); its next start answers {champion}"
        if isinstance(error, KeyboardInterrupt):
            raise
        name = f"{challenger.model} {challenger.version}"
        raise RolledBack(f"{name} was rolled back, {still}", reason=reason, hint="make status") from error
    book.release(challenger.model, challenger.version, proven=True, why="rollout: golden examples over REST and gRPC")
    return seen


def load(client: Client, record: ArchiveRecord, *, seconds: float) -> None:
    """Have the server hold that version with its READY workers; NotReady when it has not in time."""
    until = time.monotonic() + seconds
    if record.version not in versions(client, record.model):
        try:
            client.register(record.file, initial_workers=record.workers, synchronous=True, timeout=seconds)
        except MarwrightError:
            with contextlib.suppress(MarwrightError):  # a failed register may leave the version behind (fact 18)
                client.unregister(record.model, record.version)
            raise
    while versions(client, record.model)[record.version].ready_workers < record.workers:
        if time.monotonic() > until:
            raise NotReady(
                f"{record.model} {record.version} has no ready workers after {seconds:.0f} s",
                hint="logs/model_log.log has the workers' own words",
            )
        time.sleep(0.2)


def versions(client: Client, model: str) -> dict[str, ModelStatus]:
    """The versions of a model that the server has loaded; none where it does not know the model."""
    if model not in client.models():
        return {}
    return {status.version: status for status in client.describe(model, "all")}


def default_version(client: Client, model: str) -> str | None:
    """The version that answers on the default URL."""
    return next((version for version, status in versions(client, model).items() if status.default), None)


def _roll_back(client: Client, challenger: ArchiveRecord, champion: str | None) -> None:
    """The champion is the default, and the challenger's workers are gone."""
    if champion is not None and default_version(client, challenger.model) != champion:
        client.set_default(challenger.model, champion)
    if challenger.version in versions(client, challenger.model):
        client.unregister(challenger.model, challenger.version)
