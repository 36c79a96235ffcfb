"""The store over SQLite and over a real PostgreSQL."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from marwright.feedback.store import Store
from tests import postgres


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL's first database."""
    with postgres.running(tmp_path_factory.mktemp("postgres") / "cluster") as url:
        yield url


def fresh(cluster: str) -> str:
    """URL of a new, empty database."""
    engine = sa.create_engine(cluster.replace("postgresql:", "postgresql+pg8000:"), isolation_level="AUTOCOMMIT")
    name = f"test_{uuid.uuid4().hex}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"create database {name}")
    engine.dispose()
    return cluster.rsplit("/", 1)[0] + f"/{name}"


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str | None:
    """URL of an empty database; None is SQLite in the folder."""
    return None if request.param == "sqlite" else fresh(request.getfixturevalue("cluster"))


@pytest.fixture
def opened(tmp_path: Path, database: str | None) -> Iterator[Callable[[], Store]]:
    """Opens the test's store, again and again; folder `feedback`, spool `feedback/spool`."""
    stores: list[Store] = []

    def open_() -> Store:
        stores.append(Store.open(tmp_path / "feedback", database))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Callable[[], Store]) -> Store:
    return opened()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "feedback" / "spool"
