"""Explanations on the real TorchServe: over its own URL, KServe's and gRPC, alone and mixed into one batch.

One server for all: digits 1.0 (the default; onnx and a twin), digits 1.1 (eager, its own twin; batches of exactly
eight, or a wait of twelve seconds), digits 1.2 (no twin) and diabetes-mlp 1.0 (onnx and a twin).
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.explanations import METHODS
from marwright.errors import ServerRefused
from marwright.learning.tables import LimitsChoice
from marwright.release import measured
from marwright.release.client import Client
from marwright.release.server import Expected
from tests import archives, torchserve
from tests.archives import Built

pytestmark = pytest.mark.server

EIGHT = {"batch_size": 8, "max_batch_delay": 12_000, "workers": 1}


@pytest.fixture(scope="module")
def home(digits: Built, regressor: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torchserve.Home]:
    folder = tmp_path_factory.mktemp("explained")
    store = folder / "store"
    first = archives.build(digits.run, store, explain=True)
    archives.build(digits.run, store, "eager", explain=True, **EIGHT)
    archives.build(digits.run, store)
    second = archives.build(regressor.run, store, explain=True)
    expected = {built.record.model: Expected("1.0") for built in (first, second)}
    with torchserve.home(folder, expected, archives=[first.record.file, second.record.file], store=store) as home:
        home.bring_up()
        with home.client() as client:
            for name in ("digits-1.1.mar", "digits-1.2.mar"):
                client.register(name, initial_workers=1, synchronous=True, timeout=90)
        yield home


@pytest.fixture
def client(home: torchserve.Home) -> Iterator[Client]:
    with home.client() as client:
        yield client


@pytest.fixture
def picture(digits: Built) -> bytes:
    return digits.golden[0].body


@pytest.mark.parametrize("method", METHODS)
def test_each_method_answers_over_rest_and_grpc_alike(client: Client, picture: bytes, method: str) -> None:
    rest = client.explain("digits", picture, headers={"X-Explain-Method": method, "X-Explain-Target": "7"}).json()
    grpc = client.predict_grpc("digits", {"data": picture, "explain": b"1", "method": method, "target": "7"}).json()
    assert (rest["method"], rest["target"]) == (method, {"label": "7", "index": 7})
    assert rest["prediction"] == pytest.approx(client.predict("digits", picture).json(), abs=1e-6)
    assert np.array(rest["attributions"]).shape == tuple(rest["shape"]) == (16, 16)
    np.testing.assert_allclose(grpc["attributions"], rest["attributions"], atol=1e-6)


def test_integrated_gradients_add_up_to_the_logits_distance_from_black(client: Client, picture: bytes) -> None:
    said = client.explain("digits", picture, headers={"X-Explain-Steps": "200"}).json()
    assert abs(said["completeness_delta"]) < 0.02 * np.abs(said["attributions"]).sum()


def test_bytes_come_with_their_content_type_over_rest_and_bare_or_in_base64_over_grpc(
    client: Client, picture: bytes
) -> None:
    png = client.explain("digits", picture, headers={"X-Explain-Format": "png"})
    npy = client.explain("digits", picture, headers={"X-Explain-Format": "npy"})
    assert png.content_type == "image/png"
    assert npy.content_type == "application/octet-stream"
    with Image.open(io.BytesIO(png.body)) as image:
        assert image.size == (224, 224)
    assert np.load(io.BytesIO(npy.body)).shape == (1, 16, 16)
    fields = {"data": picture, "explain": b"1", "format": b"png"}
    assert client.predict_grpc("digits", fields, meta=False).body == png.body
    enveloped = client.predict_grpc("digits", fields)
    assert (enveloped.body, enveloped.content_type) == (png.body, "image/png")


def test_kserves_explain_reaches_the_handler_as_such(client: Client, picture: bytes) -> None:
    instance = {"b64": base64.b64encode(picture).decode()}
    body = {"instances": [instance], "parameters": {"method": "saliency"}}
    answer = client.explain_kserve_v1("digits", body).json()
    assert [one["method"] for one in answer["explanations"]] == ["saliency"]
    with pytest.raises(ServerRefused, match="one instance is explained at a time") as refused:
        client.explain_kserve_v1("digits", {"instances": [instance] * 2})
    assert refused.value.status == 422


def test_a_regressor_says_what_each_feature_gave(client: Client, regressor: Built) -> None:
    row = json.loads(regressor.golden[0].body)
    said = client.explain("diabetes-mlp", row, headers={"X-Explain-Steps": "500"}).json()
    assert len(said["attributions"]) == 10
    change = said["prediction"] - said["baseline_prediction"]
    assert sum(said["attributions"].values()) - change == pytest.approx(said["completeness_delta"], abs=0.01)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-Explain-Method": "lime"}, 400),
        ({"X-Explain-Baseline": "zero"}, 400),
        ({"X-Explain-Steps": "0"}, 400),
        ({"X-Explain-Target": "10"}, 422),
    ],
)
def test_an_unknown_wish_is_refused_with_a_reason(
    client: Client, picture: bytes, headers: dict[str, str], status: int
) -> None:
    with pytest.raises(ServerRefused) as refused:
        client.explain("digits", picture, headers=headers)
    assert refused.value.status == status
    assert refused.value.reason


def test_an_archive_without_a_twin_offers_no_explanations(client: Client, picture: bytes) -> None:
    for ask in (
        lambda: client.explain("digits", picture, version="1.2"),
        lambda: client.predict_grpc("digits", {"data": picture, "explain": b"1"}, version="1.2"),
    ):
        with pytest.raises(ServerRefused, match="no explanations") as refused:
            ask()
        assert refused.value.status == 501
    assert client.predict("digits", picture, version="1.2").json()
    assert client.describe("digits", "1.2", customized=True)[0].customized["explanations"] == []
    assert client.describe("digits", "1.1", customized=True)[0].customized["explanations"] == list(METHODS)


def test_what_would_take_too_long_is_refused_beforehand(
    home: torchserve.Home, client: Client, digits: Built, picture: bytes
) -> None:
    limits = LimitsChoice(explain_seconds=0.001)
    built = archives.build(digits.run, home.store, explain=True, limits=limits)
    client.register(built.record.file, initial_workers=1, synchronous=True, timeout=90)
    version = built.record.version
    with pytest.raises(ServerRefused, match=r"integrated-gradients would take about .* s; at most 0\.001 s") as refused:
        client.explain("digits", picture, version=version)
    assert refused.value.status == 413
    assert client.predict("digits", picture, version=version).json() == pytest.approx(
        client.predict("digits", picture).json(), abs=1e-6
    )


def test_in_one_batch_of_eight_everybody_gets_what_they_asked_for(home: torchserve.Home, digits: Built) -> None:
    """1.1 answers at once only when eight requests are in one batch: a lone one waits twelve seconds."""
    one, two, three = (example.body for example in digits.golden[:3])
    saliency = {"X-Explain-Method": "saliency"}
    field = {"explain": b"1", "method": b"occlusion", "target": b"3"}
    asks: list[Callable[[Client, str], Any]] = [
        lambda client, version: client.predict("digits", one, version=version).json(),
        lambda client, version: client.explain("digits", one, version=version, headers=saliency).json(),
        lambda client, version: client.predict_grpc("digits", {"data": two}, version=version).json(),
        lambda client, version: client.predict_grpc("digits", {"data": two, **field}, version=version).json(),
        lambda client, version: client.explain("digits", b"no picture", version=version).json(),
        lambda client, version: client.explain("digits", three, version=version).json(),
        lambda client, version: client.explain("digits", three, version=version, headers={"X-Explain-Steps": "x"}),
        lambda client, version: client.predict("digits", three, version=version).json(),
    ]
    gate = threading.Barrier(len(asks))

    def together(ask: Callable[[Client, str], Any]) -> Any:
        with home.client(timeout=60) as client:
            client.ping()  # the connection is open when the gate is
            client.predict_grpc("digits", {"data": one})
            gate.wait(timeout=30)
            try:
                return ask(client, "1.1")
            except ServerRefused as refusal:
                return refusal.status

    with ThreadPoolExecutor(len(asks)) as pool:
        answers = list(pool.map(together, asks))
    assert (answers[4], answers[6]) == (415, 400)
    with home.client() as client:
        counted = measured.settled(client, "digits", seconds=20.0).of("digits", "1.1")
        assert counted is not None
        sizes = counted.histogram("batch_size")
        assert (sizes.count, sizes.sum) == (1, 8), "the eight were not one batch"
        for index in (0, 1, 2, 3, 5, 7):  # 1.0 is the same net, compiled
            alone = asks[index](client, "1.0")
            if "attributions" not in alone:
                assert answers[index] == pytest.approx(alone, abs=1e-5)
                continue
            assert answers[index]["method"] == alone["method"]
            assert answers[index]["target"] == alone["target"]
            assert answers[index]["prediction"] == pytest.approx(alone["prediction"], abs=1e-5)
            np.testing.assert_allclose(answers[index]["attributions"], alone["attributions"], atol=1e-4)
