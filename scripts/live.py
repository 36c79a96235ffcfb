"""The running server, as the verbs need it: its tokens and a client."""

from __future__ import annotations

import time

from marwright.errors import NotReady, ServerUnreachable
from marwright.packing.records import ArchiveRecord
from marwright.release.answers import ModelStatus
from marwright.release.client import Client
from marwright.release.server import Server
from marwright.release.tokens import Tokens
from marwright.settings import Places


def client(places: Places, *, timeout: float = 10.0) -> Client:
    """A client of the server that runs now; use it in a `with`. ServerUnreachable where none does."""
    return _running(places).client(timeout=timeout)


def tokens(places: Places) -> Tokens:
    """The tokens of the server that runs now."""
    server = _running(places)
    found = server.find()
    assert found is not None
    return Tokens(found.key_file, server.config())


def _running(places: Places) -> Server:
    server = Server(places.serving, home=places.home)
    if server.find() is None:
        raise ServerUnreachable("TorchServe is not running", hint="make serve")
    return server


def versions(client: Client, model: str) -> dict[str, ModelStatus]:
    """The versions of a model that the server has loaded; none where it does not know the model."""
    if model not in client.models():
        return {}
    return {status.version: status for status in client.describe(model, "all")}


def wait_workers(client: Client, record: ArchiveRecord, *, seconds: float) -> None:
    """Until the version has its READY workers; NotReady when it has not by then."""
    until = time.monotonic() + seconds
    while versions(client, record.model)[record.version].ready_workers < record.workers:
        if time.monotonic() > until:
            raise NotReady(
                f"{record.model} {record.version} has no ready workers after {seconds:.0f} s",
                hint="logs/model_log.log has the workers' own words",
            )
        time.sleep(0.2)
