"""Requests that were forgotten: only a hash of their ids is kept, by which whatever still comes of them is refused."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection

import sqlalchemy as sa

from marwright.feedback import tables
from marwright.feedback.database import found


def bury(connection: sa.Connection, request: str, *, known: bool) -> None:
    """`known`: whether there was a trace of it; that once was stays so."""
    name, tombs = _name(request), tables.tombstones
    if connection.execute(sa.select(tombs.c.id).where(tombs.c.id == name)).first() is None:
        connection.execute(sa.insert(tombs).values(id=name, time=time.time(), known=int(known)))
    elif known:
        connection.execute(sa.update(tombs).where(tombs.c.id == name).values(known=1))


def buried(connection: sa.Connection, requests: Collection[str]) -> set[str]:
    """Those of them that are to be refused."""
    if connection.execute(sa.select(tables.tombstones.c.id).limit(1)).first() is None:
        return set()
    names = {_name(request): request for request in requests}
    return {names[name] for name in found(connection, tables.tombstones.c.id, names)}


def forgotten(connection: sa.Connection, request: str) -> bool:
    """Whether it was forgotten before, having been known."""
    tombs = tables.tombstones.c
    return bool(connection.scalar(sa.select(tombs.known).where(tombs.id == _name(request))))


def _name(request: str) -> str:
    return hashlib.sha256(request.encode("utf-8", "replace")).hexdigest()
