"""One echoing server for all tests that leave it running and as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from marwright.release.client import Client
from marwright.release.server import Expected
from tests import torchserve


@pytest.fixture(scope="session")
def echo_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torchserve.Home]:
    """echo 1.0 is served and the default; echo-1.1.mar lies in the store; keys live for three seconds.

    The folder has a space and an umlaut in its name: everything that reads the shared server passes through it.
    """
    folder = tmp_path_factory.mktemp("echo") / "a für b"
    torchserve.write_archive(folder / "store", "echo", "1.1")
    first = torchserve.write_archive(folder / "store", "echo", "1.0")
    with torchserve.home(
        folder,
        {"echo": Expected("1.0")},
        archives=[first],
        settings={"token_expiration_min": "0.05", "max_request_size": "200000", "job_queue_size": "8"},
    ) as home:
        home.bring_up()
        yield home


@pytest.fixture
def echo(echo_home: torchserve.Home) -> Iterator[Client]:
    """A client of the echoing server."""
    with echo_home.client() as client:
        yield client
