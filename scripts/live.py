"""The running server, as the verbs need it: its tokens and a client."""

from __future__ import annotations

from marwright.errors import ServerUnreachable, SettingsError
from marwright.packing.records import COLLECTOR
from marwright.release.client import Client
from marwright.release.server import Server
from marwright.release.tokens import Tokens
from marwright.settings import Places


def client(places: Places, *, timeout: float = 10.0, starting: float = 60.0) -> Client:
    """A client of the server that runs now; use it in a `with`. ServerUnreachable where none does.

    One that was only just started gets `starting` seconds to bind its ports.
    """
    server = _running(places)
    if starting:
        server.wait_ready({}, timeout=starting)
    return server.client(timeout=timeout)


def tokens(places: Places) -> Tokens:
    """The tokens of the server that runs now."""
    server = _running(places)
    found = server.find()
    assert found is not None
    return Tokens(found.key_file, server.config())


def only_model(client: Client) -> str:
    """The one model that is served, beside the one that takes labels; SettingsError where there are several."""
    models = sorted(client.models().keys() - {COLLECTOR})
    if len(models) != 1:
        there = ", ".join(models) or "none"
        raise SettingsError(
            f"the server serves {len(models)} models: {there}",
            hint="name one: --model NAME, or make … MODEL=NAME",
        )
    return models[0]


def _running(places: Places) -> Server:
    server = Server(places.serving, home=places.home)
    if server.find() is None:
        raise ServerUnreachable("TorchServe is not running", hint="make serve")
    return server
