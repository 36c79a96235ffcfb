"""The keys of a running TorchServe: read, kept while they are good, renewed before they expire.

    tokens = Tokens(Path("key_file.json"), config)
    tokens.key("inference")

The server writes `key_file.json` into its working directory at its start, and anew, in place, whenever somebody asks
`/token` for another key. Then the old key of that type is worth nothing at once, for every process. So renewing is
done by one at a time, threads and processes alike, under a lock on the key file itself, and whoever comes second finds
a new key and takes that. No key is printed or logged, and none is in an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import requests

from marwright.errors import ServerRefused, ServerUnreachable
from marwright.release import answers
from marwright.release.properties import ServerConfig

Kind = Literal["inference", "management"]


@dataclass(frozen=True)
class _Key:
    text: str = field(repr=False)
    expires: float
    """Seconds since the epoch, by the clock of this machine."""


@dataclass(frozen=True)
class _Keys:
    inference: _Key
    management: _Key
    api: str = field(repr=False)

    @classmethod
    def from_text(cls, text: str) -> _Keys:
        value = json.loads(text)

        def key(kind: str) -> _Key:
            moment = datetime.fromisoformat(value[kind]["expiration time"])
            return _Key(value[kind]["key"], moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())

        return cls(key("inference"), key("management"), value["API"]["key"])

    def of(self, kind: Kind) -> _Key:
        return self.inference if kind == "inference" else self.management


class Tokens:
    """Keys from one server's key file. Shared by threads; several processes may each have their own."""

    def __init__(self, key_file: Path, config: ServerConfig, *, timeout: float = 10.0) -> None:
        self.key_file = key_file
        self._config = config
        self._timeout = timeout
        self._margin = min(60.0, config.token_minutes * 60 * 0.2)
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._keys: _Keys | None = None

    def key(self, kind: Kind) -> str:
        """A key that will be good for a while yet, renewed when the one on file is about to expire."""
        with self._lock:
            found = self._read().of(kind)
            if found.expires - time.time() > self._margin:
                return found.text
            return self._renewed(kind, instead_of=found.text)

    def after_refusal(self, kind: Kind, refused: str) -> str | None:
        """Another key to try once, after the server refused one; None when the file has no better and it was not old.

        There is a better one when another process renewed or the server was restarted.
        """
        with self._lock:
            self._seen = ()
            found = self._read().of(kind)
            if found.text != refused:
                return found.text
            if found.expires - time.time() > self._margin:
                return None
            return self._renewed(kind, instead_of=refused)

    def renew(self, kind: Kind) -> str:
        """Ask for a new key in any case. The old one is refused from now on, by whomever it is used."""
        with self._lock:
            return self._renewed(kind, instead_of=self._read().of(kind).text)

    def expires(self, kind: Kind) -> datetime:
        """When the key on file ends."""
        with self._lock:
            return datetime.fromtimestamp(self._read().of(kind).expires, UTC)

    def _read(self) -> _Keys:
        """The keys on file, parsed again when it has changed; a torn one (the server writes in place) is read again."""
        for _ in range(40):
            try:
                status = self.key_file.stat()
                seen = (status.st_ino, status.st_mtime_ns, status.st_size)
                if self._keys is None or seen != self._seen:
                    self._keys, self._seen = _Keys.from_text(self.key_file.read_text(encoding="utf-8")), seen
                return self._keys
            except FileNotFoundError:
                raise ServerUnreachable(
                    f"there is no {self.key_file}: TorchServe is not running, or was started in another folder",
                    hint="`make serve` starts it, or finds the one that runs",
                ) from None
            except PermissionError:
                raise ServerUnreachable(
                    f"{self.key_file} belongs to another user", hint="ask whoever started the server for a token"
                ) from None
            except (ValueError, KeyError, TypeError):
                time.sleep(0.025)
        raise ServerUnreachable(f"{self.key_file} is not a key file of TorchServe", hint="`make stop`, `make serve`")

    def _renewed(self, kind: Kind, *, instead_of: str) -> str:
        with self._alone():
            self._seen = ()
            keys = self._read()
            if keys.of(kind).text != instead_of:
                return keys.of(kind).text
            url = f"{self._config.management_url}/token"
            try:
                with requests.Session() as session:
                    session.trust_env = False
                    response = session.get(
                        url,
                        params={"type": kind},
                        headers={"Authorization": f"Bearer {keys.api}"},
                        timeout=self._timeout,
                    )
            except requests.RequestException as error:
                raise ServerUnreachable(f"no new {kind} token from {url}: {error}", hint="`make serve`") from error
            if response.status_code != 200:
                answers.raise_refusal(
                    f"a new {kind} token", response.status_code, response.content, key_file=str(self.key_file)
                )
            self._seen = ()
            fresh = self._read().of(kind).text
            if fresh == instead_of:
                raise ServerRefused(
                    f"the server at {url} made a new {kind} token and {self.key_file} still holds the old one",
                    status=400,
                    reason="the key file belongs to another server",
                    hint="`make status` shows in which folder the server runs",
                )
            return fresh

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock on the key file; whoever holds it needs one short call."""
        try:
            stream = self.key_file.open("rb")
        except OSError as error:
            raise ServerUnreachable(f"{self.key_file} cannot be read: {error}", hint="`make serve`") from error
        with stream:
            until = time.monotonic() + 2 * self._timeout
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise ServerUnreachable(
                            f"another process has been renewing a token in {self.key_file} for too long",
                            hint="try again; if it stays so, look for a stopped process that has the file open",
                        ) from None
                    time.sleep(0.02)
            yield
