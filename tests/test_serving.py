"""Our archives on the real TorchServe: every odd request over REST and gRPC, batches, KServe, descriptions, identity.

One server for all: digits 1.0 (the default), digits 1.1 (the same net; batches of exactly eight, or a wait of four
seconds) and diabetes-mlp 1.0. All of it twice: with the lean wire codec and with TorchServe's own.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import requests

from marwright.errors import IdentityMismatch, NotReady, ServerRefused
from marwright.packing import golden, records
from marwright.release import proof
from marwright.release.client import Client
from marwright.release.server import Expected
from tests import archives, torchserve
from tests.archives import Built
from tests.zoo import ZOO, Oddity

pytestmark = pytest.mark.server

EIGHT = {"batch_size": 8, "max_batch_delay": 4000, "workers": 1}
MODELS = {"digits": "digits", "diabetes": "diabetes-mlp"}


WIRES = {"on": "lean", "off": "stock: switched off"}


@pytest.fixture(scope="module", params=list(WIRES))
def wire(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARWRIGHT_WIRE", request.param)
        yield request.param


@pytest.fixture(scope="module")
def home(
    wire: str, digits: Built, regressor: Built, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[torchserve.Home]:
    folder = tmp_path_factory.mktemp("serving")
    store = folder / "store"
    first = archives.build(digits.run, store)
    archives.build(digits.run, store, "eager", **EIGHT)
    second = archives.build(regressor.run, store)
    expected = {built.record.model: Expected("1.0") for built in (first, second)}
    with torchserve.home(folder, expected, archives=[first.record.file, second.record.file], store=store) as home:
        home.bring_up()
        with home.client() as client:
            client.register("digits-1.1.mar", initial_workers=1, synchronous=True, timeout=90)
        yield home


@pytest.fixture
def client(home: torchserve.Home) -> Iterator[Client]:
    with home.client() as client:
        yield client


def post(client: Client, oddity: Oddity) -> tuple[int, Any, requests.Response]:
    """The odd request as it is, by plain HTTP."""
    body, headers = oddity.http
    token = {"Authorization": f"Bearer {client._tokens.key('inference')}"}  # type: ignore[union-attr]
    url = f"{client.config.inference_url}/predictions/{MODELS[oddity.model]}"
    answer = requests.post(url, data=body, headers={**headers, **token}, timeout=15)
    return answer.status_code, answer.json(), answer


HTTP_ZOO = sorted(ZOO)
NOT_OVER_GRPC = {
    "base64-as-text",  # a text body over HTTP; in a gRPC field it is bytes, and nobody says that they are base64
}
GRPC_ZOO = sorted(name for name, oddity in ZOO.items() if oddity.grpc is not None and name not in NOT_OVER_GRPC)


def test_the_zoo_has_more_than_forty_animals() -> None:
    assert len(HTTP_ZOO) > 40
    assert len(GRPC_ZOO) > 40


@pytest.mark.parametrize("name", HTTP_ZOO)
def test_an_odd_request_over_rest_gets_its_own_status_and_reason(name: str, client: Client) -> None:
    oddity = ZOO[name]
    status, body, answer = post(client, oddity)
    if oddity.content_type and "form-urlencoded" in oddity.content_type and status == 500:
        # TorchServe itself reads form encoding and gives up on most pictures before any handler sees them.
        assert body["type"] == "ErrorDataDecoderException"
        return
    assert status == oddity.status, body
    assert answer.headers["X-Model-Name"] == MODELS[oddity.model]
    assert answer.headers["X-Model-Version"] == "1.0"
    assert len(answer.headers["X-Bundle-Digest"]) == 16
    if status != 200:
        assert body["code"] == status
        assert body["reason"]


@pytest.mark.parametrize("name", GRPC_ZOO)
def test_an_odd_request_over_grpc_becomes_the_same_value_or_error(name: str, client: Client) -> None:
    oddity = ZOO[name]
    assert oddity.grpc is not None
    status, body, _ = post(client, oddity)
    if status == 200:
        answer = client.predict_grpc(MODELS[oddity.model], oddity.grpc)
        if "X-Top-K" not in {header.title() for header in oddity.headers}:
            assert _close(answer.json(), body)
        assert (answer.model, answer.version) == (MODELS[oddity.model], "1.0")
        assert answer.bundle
        assert answer.request_id
    else:
        with pytest.raises(ServerRefused) as caught:
            client.predict_grpc(MODELS[oddity.model], oddity.grpc)
        if status != 500:
            assert caught.value.status == oddity.status


def test_every_worker_is_alive_after_the_zoo(client: Client) -> None:
    for model in MODELS.values():
        status = client.describe(model)[0]
        assert status.ready_workers == 1


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, abs=1e-5, rel=1e-5)
    return bool(one == other)


def test_in_a_forced_batch_of_eight_three_bad_ones_harm_nobody(home: torchserve.Home, digits: Built) -> None:
    """1.1 answers at once only when eight requests are in one batch: a lone one waits four seconds."""
    good = [example.body for example in digits.golden[:5]]
    bodies = [b"", good[0], b"not a picture", good[1], good[2], ZOO["png-truncated"].body, good[3], good[4]]
    with home.client() as client:
        began = time.monotonic()
        client.predict("digits", good[0], version="1.1")
        assert time.monotonic() - began > 3.5, "a lone request must wait for the batch"
        alone = [client.predict("digits", body).json() for body in good]
    gate = threading.Barrier(len(bodies))

    def ask(body: bytes) -> tuple[int, Any]:
        with home.client() as client:
            client.ping()  # the connection is open when the gate is
            gate.wait(timeout=30)
            try:
                return 200, client.predict("digits", body, version="1.1").json()
            except ServerRefused as refusal:
                return refusal.status, refusal.reason

    with ThreadPoolExecutor(len(bodies)) as pool:
        began = time.monotonic()
        answers = list(pool.map(ask, bodies))
        assert time.monotonic() - began < 3.5, "the eight were not one batch"
    assert [status for status, _ in answers] == [400, 200, 415, 200, 200, 400, 200, 200]
    for (_, together), single in zip([answers[index] for index in (1, 3, 4, 6, 7)], alone, strict=True):
        assert list(together) == list(single)
        assert together == pytest.approx(single, abs=1e-5)
    for index in (0, 2, 5):
        assert answers[index][1], "each has a reason of its own"


def test_kserve_v1_and_v2_answer_in_kserves_form(client: Client, digits: Built) -> None:
    two = [example.body for example in digits.golden[:2]]
    stock = [client.predict("digits", body).json() for body in two]
    instances = [{"b64": base64.b64encode(body).decode()} for body in two]
    first = client.predict_kserve_v1("digits", {"instances": instances}).json()
    assert [pytest.approx(each, abs=1e-6) for each in first["predictions"]] == stock
    tensor = {"name": "input", "shape": [2], "datatype": "BYTES", "data": [each["b64"] for each in instances]}
    second = client.predict_kserve_v2("digits", {"id": "q7", "inputs": [tensor]}).json()
    assert (second["model_name"], second["model_version"], second["id"]) == ("digits", "1.0", "q7")
    outputs = {output["name"]: output for output in second["outputs"]}
    for output in outputs.values():
        count = 1
        for side in output["shape"]:
            count *= side
        assert len(output["data"]) == count
    assert (
        pytest.approx(list(stock[0].values()) + list(stock[1].values()), abs=1e-6) == outputs["probabilities"]["data"]
    )
    assert outputs["labels"]["data"] == [*stock[0], *stock[1]]


def test_kserve_of_the_regressor(client: Client, regressor: Built) -> None:
    rows = [json.loads(example.body) for example in regressor.golden[:3]]
    one_by_one = [client.predict("diabetes-mlp", row).json() for row in rows]
    assert client.predict_kserve_v1("diabetes-mlp", {"instances": rows}).json()["predictions"] == [
        pytest.approx(next(iter(each.values())), rel=1e-5) for each in one_by_one
    ]
    flat = [number for row in rows for number in row]
    tensor = {"name": "input", "shape": [3, 10], "datatype": "FP32", "data": flat}
    answered = client.predict_kserve_v2("diabetes-mlp", {"inputs": [tensor]}).json()["outputs"][0]
    assert answered["data"] == pytest.approx([next(iter(each.values())) for each in one_by_one], rel=1e-5)


def test_describe_says_what_exactly_is_serving(client: Client, digits: Built, wire: str) -> None:
    said = client.describe("digits", customized=True)[0].customized
    assert said["wire"] == WIRES[wire]
    assert said["run"] == digits.run.id
    assert said["bundle"] == digits.record.bundle
    assert said["labels"] == [str(digit) for digit in range(10)]
    assert said["metrics"] == pytest.approx(dict(digits.record.metrics))
    assert client.describe_grpc("digits", "1.0", customized=True)[0].customized["bundle"] == digits.record.bundle


def test_the_servers_own_figure_of_a_prediction_is_told(client: Client, digits: Built) -> None:
    client.predict("digits", digits.golden[0].body)
    until = time.monotonic() + 10
    while "PredictionTime{" not in client.metrics() and time.monotonic() < until:
        time.sleep(0.1)
    assert "PredictionTime{" in client.metrics()


def test_a_body_of_many_megabytes_comes_whole_and_is_refused_by_us(client: Client, digits: Built) -> None:
    with pytest.raises(ServerRefused) as caught:
        client.predict("digits", b"\x89PNG" + bytes(19_000_000))
    assert caught.value.status == 413
    assert client.predict("digits", digits.golden[0].body).status == 200


def test_a_grpc_stream_has_one_answer_and_kills_no_worker(client: Client, digits: Built) -> None:
    pid = client.describe("digits")[0].workers[0].pid
    example = digits.golden[0]
    answers = list(client.stream_grpc("digits", {"data": example.body}))
    assert len(answers) == 1
    assert answers[0].json() == pytest.approx(client.predict("digits", example.body).json(), abs=1e-6)
    status = client.describe("digits")[0]
    assert (status.ready_workers, status.workers[0].pid) == (1, pid)


def test_proof_is_had_at_the_pinned_url_and_finds_another_bundle(
    client: Client, home: torchserve.Home, digits: Built
) -> None:
    record = records.record(home.store, "digits", "1.0")
    seen = proof.prove(client, record, golden.read(home.store / record.file))
    assert (seen.version, seen.bundle, seen.examples) == ("1.0", record.bundle, len(digits.golden))
    with pytest.raises(IdentityMismatch, match="expected"):
        proof.prove(client, replace(record, bundle="0" * 16), digits.golden)
    with pytest.raises(NotReady, match="workers ready"):
        proof.prove(client, replace(record, workers=2), digits.golden)
    wrong = [replace(digits.golden[0], answer={str(digit): 0.1 for digit in range(10)})]
    with pytest.raises(NotReady, match="golden examples wrongly"):
        proof.prove(client, record, wrong)
