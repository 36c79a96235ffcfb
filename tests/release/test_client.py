"""The API as an object, asked of the real server: answers, refusals, and the same of both over REST and gRPC."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from marwright.errors import ServerRefused, ServerUnreachable, SettingsError
from marwright.release.answers import Answer
from marwright.release.client import Client
from marwright.release.properties import ServerConfig
from tests import torchserve

pytestmark = pytest.mark.server

BYTES = bytes(range(256))


def test_raw_bytes_json_and_fields_arrive_unchanged(echo: Client) -> None:
    assert echo.predict("echo", BYTES).json()["fields"] == {"body": BYTES.decode("latin-1")}
    assert echo.predict("echo", {"a": [1, "ü"]}).json()["fields"] == {"body": {"a": [1, "ü"]}}
    fields = echo.predict("echo", fields={"data": BYTES, "top_k": "3"}).json()["fields"]
    assert fields == {"data": BYTES.decode("latin-1"), "top_k": "3"}


def test_every_answer_says_who_made_it_over_rest_and_grpc_alike(echo: Client) -> None:
    rest = echo.predict("echo", fields={"data": b"x", "meta": "1"}, version="1.0")
    grpc = echo.predict_grpc("echo", {"data": b"x"}, version="1.0")
    for answer in (rest, grpc):
        assert (answer.status, answer.model, answer.version) == (200, "echo", "1.0")
        assert answer.bundle == "0123456789abcdef"
        assert len(answer.request_id) == 36
    assert rest.json() | {"explain": None} == grpc.json() | {"explain": None}
    for answer in (rest, grpc):  # the very form in which TorchServe writes a value; a gRPC map has no order of its own
        assert answer.body == json.dumps(answer.json(), indent=2).encode()


def test_a_grpc_answer_without_meta_is_the_bare_body(echo: Client) -> None:
    answer = echo.predict_grpc("echo", {"data": b"x"}, meta=False)
    assert answer == Answer(body=answer.body)
    assert answer.json()["fields"] == {"data": "x"}


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.predict("echo", {"refuse": 415}),
        lambda client: client.predict_grpc("echo", {"data": b'{"refuse": 415}'}),
        lambda client: client.predict_grpc("echo", {"data": b'{"refuse": 415}'}, meta=False),
        lambda client: list(client.stream_grpc("echo", {"data": b'{"refuse": 415}'})),
    ],
)
def test_a_refused_item_is_the_same_error_by_every_way(echo: Client, call: Callable[[Client], object]) -> None:
    with pytest.raises(ServerRefused) as caught:
        call(echo)
    assert (caught.value.status, caught.value.reason) == (415, "the request asked for a refusal")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("status", "hint", "calls"),
    [
        (404, "make status", [lambda c: c.predict("no", b""), lambda c: c.predict_grpc("no", {})]),
        (
            404,
            "which versions",
            [
                lambda c: c.predict("echo", b"", version="9"),
                lambda c: c.predict_grpc("echo", {}, version="9"),
                lambda c: c.describe("echo", "9"),
                lambda c: c.describe_grpc("echo", "9"),
                lambda c: c.set_default("echo", "9"),
                lambda c: c.set_default_grpc("echo", "9"),
                lambda c: c.scale("echo", "9", min_workers=1),
                lambda c: c.scale_grpc("echo", "9", min_workers=1),
                lambda c: c.unregister("echo", "9"),
                lambda c: c.unregister_grpc("echo", "9"),
            ],
        ),
        (404, "bare name", [lambda c: c.register("none.mar"), lambda c: c.register_grpc("none.mar")]),
        (409, "registered already", [lambda c: c.register("echo-1.0.mar")]),
        (413, "max_request_size", [lambda c: c.predict("echo", bytes(300_000))]),
        (413, "max_request_size", [lambda c: c.predict_grpc("echo", {"data": bytes(300_000)})]),
        (
            500,
            "curl -T",
            [lambda c: c.predict("echo", b"\xff%%=&", content_type="application/x-www-form-urlencoded")],
        ),
    ],
)
def test_each_refusal_has_its_status_and_a_hint(
    echo: Client, status: int, hint: str, calls: list[Callable[[Client], object]]
) -> None:
    for call in calls:
        with pytest.raises(ServerRefused) as caught:
            call(echo)
        assert caught.value.status == status
        assert hint in caught.value.hint


def test_explanations_are_asked_for_and_kserve_bodies_pass(echo: Client) -> None:
    assert echo.explain("echo", b"x").json()["explain"] == "True"
    assert echo.predict_kserve_v1("echo", {"instances": [1]}).json()["fields"] == {"body": {"instances": [1]}}
    assert echo.explain_kserve_v1("echo", {"instances": [1]}).json()["explain"] == "True"
    assert echo.predict_kserve_v2("echo", {"inputs": [1]}).json()["fields"] == {"body": {"inputs": [1]}}
    assert echo.ready_kserve_v1("echo")


def test_controls_travel_as_headers_over_rest_and_as_fields_over_grpc(echo: Client) -> None:
    controls = {"method": "saliency", "target": "längs", "top_k": "3"}
    rest = echo.ask("echo", b"x", explain=True, controls=controls).json()
    assert (rest["explain"], rest["fields"]) == ("True", {"body": "x"})
    assert rest["asked"] == {"X-Explain-Method": "saliency", "X-Explain-Target": "l%C3%A4ngs", "X-Top-K": "3"}
    grpc = echo.ask("echo", b"x", explain=True, grpc=True, controls=controls, version="1.0")
    assert grpc.version == "1.0"
    fields = grpc.json()["fields"]
    assert fields.pop("target").encode("latin-1").decode() == "längs"
    assert fields == {"data": "x", "explain": "1", "meta": "1", "method": "saliency", "top_k": "3"}
    assert echo.ask("echo", b"x").json()["explain"] == "False"


def test_bytes_come_out_of_a_grpc_envelope_as_rest_gives_them() -> None:
    told = {"status": 200, "model": "digits", "version": "1.0"}
    picture = json.dumps({**told, "prediction": "iVBORw==", "content_type": "image/png"}).encode()
    found = Answer.from_envelope(picture, what="test")
    assert (found.body, found.content_type) == (b"\x89PNG", "image/png")
    refusal = json.dumps({**told, "status": 501, "prediction": None, "reason": "no explanations"}).encode()
    with pytest.raises(ServerRefused, match="501: no explanations") as caught:
        Answer.from_envelope(refusal, what="test")
    assert "explain = true" in caught.value.hint


def test_a_stream_is_its_pieces(echo: Client) -> None:
    (answer,) = echo.stream_grpc("echo", {"data": b"x"})
    assert answer.json()["fields"]["data"] == "x"
    assert answer.version == "1.0"


def test_health_api_and_metrics(echo: Client) -> None:
    assert echo.ping() == echo.ping_grpc() == "Healthy"
    assert "/predictions/{model_name}" in echo.api_description("inference")["paths"]
    assert "/models" in echo.api_description("management")["paths"]
    echo.predict("echo", b"x", version="1.0")
    metrics = echo.metrics(["ts_inference_requests_total"])
    assert 'model_name="echo",model_version="1.0"' in metrics
    assert "PredictionTime" in echo.metrics()


def test_describe_tells_workers_queue_default_and_the_handlers_own_words(echo: Client) -> None:
    (status,) = echo.describe("echo", customized=True)
    assert (status.name, status.version, status.file, status.default) == ("echo", "1.0", "echo-1.0.mar", True)
    assert status.ready_workers == 1
    assert status.workers[0].pid > 1
    assert (status.batch_size, status.batch_delay, status.pending, status.queue_left) == (8, 5, 0, 8)
    assert status.customized == {"model": "echo", "labels": ["a", "b"]}
    assert echo.describe("echo", "1.0")[0].customized == {}
    (over_grpc,) = echo.describe_grpc("echo", customized=True)
    without_memory = [dataclasses.replace(s, workers=()) for s in (status, over_grpc)]
    assert without_memory[0] == without_memory[1]
    assert echo.models() == echo.models_grpc() == {"echo": "echo-1.0.mar"}


@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_a_version_is_registered_scaled_made_default_and_removed(echo: Client, way: str) -> None:
    suffix = "_grpc" if way == "grpc" else ""
    register, scale, set_default, unregister = (
        getattr(echo, name + suffix) for name in ("register", "scale", "set_default", "unregister")
    )
    register("echo-1.1.mar", initial_workers=1, synchronous=True)
    try:
        assert [s.default for s in echo.describe("echo", "all", customized=True)] == [True, False]
        assert echo.describe("echo", "1.1")[0].ready_workers == 1
        scale("echo", "1.1", min_workers=1, synchronous=True)
        set_default("echo", "1.1")
        assert echo.predict("echo", b"x").version == "1.1"
        assert echo.describe("echo")[0].version == "1.1"
        with pytest.raises(ServerRefused) as caught:
            echo.unregister("echo", "1.1")
        assert caught.value.status == 403
        assert "default" in caught.value.hint
        if way == "rest":
            scale("echo", "1.1", min_workers=0, synchronous=True)
            for no_worker in (
                lambda: echo.predict("echo", b"x", version="1.1"),
                lambda: echo.predict_grpc("echo", {}, version="1.1"),
            ):
                with pytest.raises(ServerRefused) as caught:
                    no_worker()
                assert caught.value.status == 503
                assert "make status" in caught.value.hint
    finally:
        set_default("echo", "1.0")
        unregister("echo", "1.1")
    assert list(echo.models().values()) == ["echo-1.0.mar"]


@pytest.mark.parametrize("url", ["file:///tmp/x.mar", "http://127.0.0.1/x.mar", "../x.mar", "a/x.mar", ""])
def test_only_bare_file_names_are_registered(echo: Client, url: str) -> None:
    for register in (echo.register, echo.register_grpc):
        with pytest.raises(SettingsError, match="bare name"):
            register(url)


def test_the_server_itself_refuses_every_url(echo: Client, echo_home: torchserve.Home) -> None:
    store = echo_home.store / "echo-1.1.mar"
    for url in (store.as_uri(), f"file://{store}", "http://127.0.0.1:9/x.mar", "https://127.0.0.1:9/x.mar"):
        with pytest.raises(ServerRefused) as caught:
            echo._managed("POST", "/models", {"url": url}, None)
        assert caught.value.status == 404
        assert "does not match any allowed URL" in caught.value.reason


def test_an_unknown_method_is_a_405(echo: Client) -> None:
    with pytest.raises(ServerRefused) as caught:
        echo._rest.call("PATCH", "management", "/models")
    assert caught.value.status == 405


@pytest.mark.parametrize("name", ["tokenizer", "token", ""])
def test_a_name_that_torchserve_takes_for_a_token_call_is_refused(echo: Client, name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be the name"):
        echo.describe(name)


def test_zero_workers_over_grpc_is_refused_because_torchserve_makes_it_one(echo: Client) -> None:
    with pytest.raises(SettingsError, match="into 1"):
        echo.scale_grpc("echo", min_workers=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.predict("echo", {"sleep": 1}, timeout=0.3),
        lambda client: client.predict_grpc("echo", {"data": b'{"sleep": 1}'}, timeout=0.3),
    ],
)
def test_no_answer_in_time_is_an_error_in_time(echo: Client, call: Callable[[Client], object]) -> None:
    with pytest.raises(ServerUnreachable, match=r"within 0\.3 s"):
        call(echo)
    assert echo.predict("echo", b"", timeout=10).status == 200


def test_a_worker_that_dies_is_a_500_that_says_where_to_look(echo: Client, echo_home: torchserve.Home) -> None:
    with pytest.raises(ServerRefused) as caught:
        echo.predict("echo", {"die": True})
    assert caught.value.status == 500
    assert "model_log" in caught.value.hint
    echo_home.bring_up()
    assert echo.predict("echo", b"").status == 200


def test_a_full_queue_is_a_503_at_once_and_the_others_are_answered(echo: Client) -> None:
    def one(_: int) -> Answer | ServerRefused:
        try:
            return echo.predict("echo", {"sleep": 0.05}, timeout=30)
        except ServerRefused as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        came = list(pool.map(one, range(40)))
    assert {each.status for each in came} == {200, 503}
    assert all("queue is full" in each.hint for each in came if isinstance(each, ServerRefused))


def test_proxies_and_netrc_of_the_environment_are_not_used(echo: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert echo.ping() == "Healthy"
    with Client(echo.config, echo._tokens) as other:
        assert other.ping_grpc() == "Healthy"


def test_nobody_answering_is_told_with_what_to_do(tmp_path: Path) -> None:
    torchserve.write_config(tmp_path / "config.properties", {"disable_token_authorization": "true"})
    with Client(ServerConfig.from_file(tmp_path / "config.properties"), None) as client:
        for call in (client.ping, client.ping_grpc):
            with pytest.raises(ServerUnreachable) as caught:
                call()
            assert "make serve" in caught.value.hint


def test_no_call_of_the_api_works_without_a_key(echo: Client) -> None:
    for url in (f"{echo.config.inference_url}/ping", f"{echo.config.management_url}/models"):
        response = requests.get(url, timeout=5)
        assert response.status_code == 400
        assert json.loads(response.content)["type"] == "InvalidKeyException"
