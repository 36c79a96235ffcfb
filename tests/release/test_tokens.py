"""Keys: kept, renewed in time by one at a time, never shown. The fake issues keys as the real server was seen to do."""

from __future__ import annotations

import http.server
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from marwright.errors import ServerRefused, ServerUnreachable
from marwright.release.client import Client
from marwright.release.properties import ServerConfig
from marwright.release.tokens import Tokens
from tests import torchserve


class KeyIssuer:
    """TorchServe's token API in a few lines: a new key of a type makes the old one worthless at once."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.key_file = folder / "key_file.json"
        self.seconds = seconds
        self.issued: list[str] = []
        self.keys = {"API": {"key": "api-secret"}}
        self._lock = threading.Lock()
        for kind in ("management", "inference"):
            self.issue(kind)
        self.issued.clear()
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                kind = "API" if url.path == "/token" else "management"
                with issuer._lock:
                    good = self.headers.get("Authorization") == f"Bearer {issuer.keys[kind]['key']}"
                if not good:
                    body = json.dumps({"code": 400, "type": "InvalidKeyException", "message": "Token failed"}).encode()
                elif url.path == "/token":
                    issuer.issue(parse_qs(url.query)["type"][0])
                    body = b"\n"
                else:
                    body = b'{"models": []}'
                self.send_response(200 if good else 400)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        self.config = ServerConfig(
            path=folder / "config.properties",
            management_url=f"http://127.0.0.1:{self.server.server_port}",
            token_minutes=seconds / 60,
        )

    def issue(self, kind: str) -> None:
        with self._lock:
            end = datetime.now(UTC) + timedelta(seconds=self.seconds)
            self.keys[kind] = {
                "key": f"{kind}-secret-{len(self.issued)}-{time.monotonic_ns()}",
                "expiration time": end.strftime("%Y-%m-%dT%H:%M:%S.%f123Z"),
            }
            self.issued.append(kind)
            text = json.dumps(self.keys)
            with self.key_file.open("w") as stream:  # in place and in two pieces, as TorchServe may be caught at it
                stream.write(text[:40])
                stream.flush()
                time.sleep(0.03)
                stream.write(text[40:])

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[KeyIssuer]:
    made = KeyIssuer(tmp_path, seconds=3600)
    yield made
    made.close()


@pytest.fixture
def short_lived(tmp_path: Path) -> Iterator[KeyIssuer]:
    made = KeyIssuer(tmp_path, seconds=1)
    yield made
    made.close()


def test_a_good_key_is_read_and_kept(issuer: KeyIssuer) -> None:
    tokens = Tokens(issuer.key_file, issuer.config)
    assert {tokens.key("inference") for _ in range(3)} == {issuer.keys["inference"]["key"]}
    assert tokens.key("management") == issuer.keys["management"]["key"]
    assert issuer.issued == []


def test_a_key_is_renewed_before_it_expires(short_lived: KeyIssuer) -> None:
    tokens = Tokens(short_lived.key_file, short_lived.config)
    first = tokens.key("management")
    time.sleep(0.85)
    second = tokens.key("management")
    assert second != first
    assert second == short_lived.keys["management"]["key"]
    assert short_lived.issued == ["management"]


def test_many_threads_renew_once(short_lived: KeyIssuer) -> None:
    tokens = Tokens(short_lived.key_file, short_lived.config)
    time.sleep(0.85)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(tokens.key("management"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert short_lived.issued == ["management"]


def _key(key_file: Path, config: ServerConfig) -> str:
    return Tokens(key_file, config).key("management")


def test_many_processes_renew_once(short_lived: KeyIssuer) -> None:
    short_lived.seconds = 60
    time.sleep(0.85)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        keys = pool.starmap(_key, [(short_lived.key_file, short_lived.config)] * 6)
    assert set(keys) == {short_lived.keys["management"]["key"]}
    assert short_lived.issued == ["management"]


def test_after_a_refusal_the_key_that_somebody_else_renewed_is_taken_without_asking_again(issuer: KeyIssuer) -> None:
    with Client(issuer.config, Tokens(issuer.key_file, issuer.config)) as client:
        client.models()
        status = issuer.key_file.stat()
        issuer.issue("management")
        os.utime(issuer.key_file, ns=(status.st_atime_ns, status.st_mtime_ns))
        issuer.issued.clear()
        assert client.models() == {}
    assert issuer.issued == []


def test_a_key_that_is_simply_wrong_is_tried_once_and_never_renewed(issuer: KeyIssuer) -> None:
    text = issuer.key_file.read_text().replace("management-secret", "management-mistake")
    issuer.key_file.write_text(text)
    with (
        Client(issuer.config, Tokens(issuer.key_file, issuer.config)) as client,
        pytest.raises(ServerRefused) as caught,
    ):
        client.models()
    assert caught.value.status == 400
    assert str(issuer.key_file) in caught.value.hint
    assert issuer.issued == []


def test_a_key_file_of_another_server_is_told(short_lived: KeyIssuer) -> None:
    text = short_lived.key_file.read_text().replace("api-secret", "api-mistake")
    short_lived.key_file.write_text(text)
    time.sleep(0.85)
    with pytest.raises(ServerRefused) as caught:
        Tokens(short_lived.key_file, short_lived.config).key("inference")
    assert str(short_lived.key_file) in caught.value.hint


def test_no_key_is_in_an_error_or_a_repr(issuer: KeyIssuer) -> None:
    tokens = Tokens(issuer.key_file, issuer.config)
    tokens.key("inference")
    shown = repr(tokens) + repr(tokens._keys)
    issuer.key_file.write_text(issuer.key_file.read_text().replace("management-secret", "management-mistake"))
    with Client(issuer.config, tokens) as client, pytest.raises(ServerRefused) as caught:
        client.models()
    shown += str(caught.value) + repr(caught.value) + caught.value.reason
    assert "secret" not in shown
    assert "mistake" not in shown


@pytest.mark.parametrize("text", ["", "{", "[]", '{"management": {}}'])
def test_a_torn_key_file_is_an_error_after_a_moment(tmp_path: Path, text: str) -> None:
    (tmp_path / "key_file.json").write_text(text)
    with pytest.raises(ServerUnreachable, match="not a key file"):
        Tokens(tmp_path / "key_file.json", ServerConfig(path=tmp_path)).key("inference")


def test_a_missing_key_file_says_that_no_server_runs_there(tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachable, match="not running") as caught:
        Tokens(tmp_path / "key_file.json", ServerConfig(path=tmp_path)).key("inference")
    assert "make serve" in caught.value.hint


def test_a_server_that_is_gone_when_a_key_is_to_be_renewed_is_told(short_lived: KeyIssuer) -> None:
    time.sleep(0.85)
    short_lived.close()
    with pytest.raises(ServerUnreachable, match="no new management token"):
        Tokens(short_lived.key_file, short_lived.config).key("management")


@pytest.mark.server
def test_calls_go_on_while_the_real_servers_keys_expire_again_and_again(
    echo: Client, echo_home: torchserve.Home
) -> None:
    first = echo_home.key_file.read_text()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        assert echo.predict("echo", b"x").status == 200
        assert echo.predict_grpc("echo", {"data": b"x"}).status == 200
        assert echo.models()
        assert echo.models_grpc()
        time.sleep(0.3)
    now = echo_home.key_file.read_text()
    assert json.loads(now)["API"] == json.loads(first)["API"]
    assert json.loads(now)["inference"] != json.loads(first)["inference"]


@pytest.mark.server
def test_a_real_key_that_was_renewed_elsewhere_is_replaced_at_the_first_refusal(
    echo: Client, echo_home: torchserve.Home
) -> None:
    assert echo._tokens is not None
    for kind, rest, grpc in (
        ("inference", echo.ping, echo.ping_grpc),
        ("management", echo.models, echo.models_grpc),
    ):
        for call in (rest, grpc):
            echo._tokens.renew(kind)
            known = echo._tokens._keys
            with echo_home.client() as other:
                other.renew_token(kind)
            status = echo_home.key_file.stat()
            echo._tokens._keys = known
            echo._tokens._seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            assert call()


@pytest.mark.server
def test_a_wrong_real_key_is_refused_with_the_same_error_by_both_ways(
    echo: Client, echo_home: torchserve.Home, tmp_path: Path
) -> None:
    value = json.loads(echo_home.key_file.read_text())
    end = (datetime.now(UTC) + timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    for kind in ("inference", "management"):
        value[kind] = {"key": "wrong", "expiration time": end}
    forged = tmp_path / "key_file.json"
    forged.write_text(json.dumps(value))
    with Client(echo.config, Tokens(forged, echo.config)) as client:
        for call in (client.ping, client.models, client.ping_grpc, client.models_grpc):
            with pytest.raises(ServerRefused) as caught:
                call()
            assert caught.value.status == 400
            assert "marwright token" in caught.value.hint
