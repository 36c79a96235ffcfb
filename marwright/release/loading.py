"""What the server holds of a model, and how a version gets in and out of it.

Loading and removing go over gRPC, which has threads of its own: the same calls over REST run on the event loop of the
inference port and stall it. None of this is safe for requests that a version still owes; `retiring` is.
"""

from __future__ import annotations

import time

from marwright.errors import NotReady, ServerError, ServerRefused
from marwright.packing.records import ArchiveRecord
from marwright.release.answers import ModelStatus
from marwright.release.client import Client
from marwright.release.server import Server


def versions(client: Client, model: str) -> dict[str, ModelStatus]:
    """The versions of a model that the server has loaded; none where it does not know the model."""
    if model not in client.models():
        return {}
    return {status.version: status for status in client.describe(model, "all")}


def default_version(client: Client, model: str) -> str | None:
    """The version that answers on the default URL."""
    return next((version for version, status in versions(client, model).items() if status.default), None)


def loaded(client: Client, model: str, version: str) -> ModelStatus | None:
    """That version as the server describes it; None where it is not loaded."""
    try:
        return client.describe(model, version)[0]
    except ServerRefused as error:
        if error.status == 404:
            return None
        raise


def ready_pids(status: ModelStatus | None) -> tuple[int, ...]:
    """Process ids of its READY workers."""
    return tuple(sorted(worker.pid for worker in status.workers if worker.ready)) if status else ()


def register(client: Client, record: ArchiveRecord, *, seconds: float) -> None:
    """Have the server load that version, where it has not, and return without waiting for its workers.

    Tried again for `seconds`. What a failed register left behind, a version without workers, is taken out first.
    """
    until = time.monotonic() + seconds
    while True:
        status = loaded(client, record.model, record.version)
        if status is not None and status.workers:
            return
        if status is not None:
            remove(client, record.model, record.version)
        try:
            client.register_grpc(record.file, initial_workers=record.workers, timeout=seconds)
            return
        except ServerError:
            if time.monotonic() > until:
                raise
        time.sleep(0.5)


def bring_in(
    client: Client, record: ArchiveRecord, *, server: Server, call_seconds: float, ready_seconds: float
) -> list[int]:
    """Registered, and its workers READY: their process ids."""
    began = time.time()
    register(client, record, seconds=call_seconds)
    return wait_ready(client, record, server=server, since=began, seconds=ready_seconds)


def wait_ready(client: Client, record: ArchiveRecord, *, server: Server, since: float, seconds: float) -> list[int]:
    """Process ids of its workers, once as many as it wants are READY.

    NotReady after `seconds`; at once, in their own words, where they have said since `since` (Unix seconds) that they
    cannot start.
    """
    until = time.monotonic() + seconds
    while True:
        status = loaded(client, record.model, record.version)
        if status is not None and status.ready_workers >= record.workers:
            return list(ready_pids(status))
        server.refuse_dying(record.model, record.version, since=since)
        if status is None:
            raise NotReady(f"{record.model} {record.version} is not loaded any more", hint="marwright releases")
        if time.monotonic() > until:
            raise NotReady(
                f"{record.model} {record.version} has {status.ready_workers} of {record.workers} workers ready"
                f" after {seconds:g} s",
                hint="logs/model_log.log has the workers' own words",
            )
        time.sleep(0.1)


def remove(client: Client, model: str, version: str) -> None:
    """Unregister it, where it is there. Its workers die at once, with whatever they are doing."""
    try:
        client.unregister_grpc(model, version)
    except ServerRefused as error:
        if error.status != 404:
            raise
