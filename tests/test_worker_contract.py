"""The bundle in TorchServe's own hands: its loader, its service and its wire format, in a clean process.

The archive is built as `make archive` builds it, unpacked, and loaded with TorchServe's own Python side; and the
stand-in for a worker that packaging uses (`clean_worker.Context`) is held against the real `Context`.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from handlers.metrics import METRICS
from marwright.packing import clean_worker, container
from tests.archives import Built
from tests.handlers.context import FakeContext, KnownMetrics, Sent

CHILD = """
import json, struct, sys
from pathlib import Path
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory
import ts

folder = Path(sys.argv[1])
cache = MetricsCacheYamlImpl(config_file_path=str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
cache.initialize_cache()
manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
service = ModelLoaderFactory.get_model_loader().load(
    manifest["model"]["modelName"], str(folder), manifest["model"]["handler"], None, 4, None, True, cache
)
service.set_cl_socket(None)
assert "torchvision" not in sys.modules and "marwright" not in sys.modules

entries = json.loads((folder / "golden" / "golden.json").read_text())
bodies = [(folder / "golden" / entry["file"]).read_bytes() for entry in entries]
bad = {"image": b"not a picture", "json": b"{"}[entries[0]["kind"]]
kind = {"image": "image/png", "json": "application/json"}[entries[0]["kind"]]

def request(number, body):
    value = json.loads(body) if kind == "application/json" and body != bad else bytearray(body)
    header = {"name": b"X-Top-K", "value": b"100"}
    return {
        "requestId": f"id-{number}".encode(),
        "headers": [header, {"name": b"explain", "value": b"False"}],
        "parameters": [{"name": "body", "contentType": kind, "value": value}],
    }

message = bytes(service.predict([request(number, body) for number, body in enumerate([bad, *bodies, bad])]))

def take(size):
    global message
    piece, message = message[:size], message[size:]
    return piece

def number():
    return struct.unpack("!i", take(4))[0]

code, phrase = number(), None
take(number())
answers = []
while (length := number()) >= 0:
    name = take(length).decode()
    take(number())
    status, phrase = number(), take(number()).decode()
    headers = {take(number()).decode(): take(number()).decode() for _ in range(number())}
    answers.append({"id": name, "status": status, "headers": headers, "body": json.loads(take(number()))})
print(json.dumps({"code": code, "answers": answers}))
"""


@pytest.fixture(scope="module")
def said(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return ask(digits, tmp_path_factory.mktemp("contract"))


def ask(built: Built, folder: Path) -> dict[str, object]:
    container.unpack(built.path, folder)
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(folder)],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answered: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answered


def test_golden_answers_come_back_through_the_wire_beside_bad_neighbours(digits: Built, said: dict) -> None:
    assert said["code"] == 200
    first, *middle, last = said["answers"]
    assert (first["status"], last["status"]) == (415, 415)
    assert first["body"]["code"] == 415
    assert [answer["id"] for answer in said["answers"]] == [f"id-{n}" for n in range(len(middle) + 2)]
    for expected, answer in zip(digits.golden, middle, strict=True):
        assert answer["status"] == 200
        assert answer["body"] == pytest.approx(dict(expected.answer), abs=1e-4)


def test_every_answer_says_who_gave_it(digits: Built, said: dict) -> None:
    for answer in said["answers"]:
        assert answer["headers"]["X-Model-Name"] == "digits"
        assert answer["headers"]["X-Model-Version"] == digits.record.version
        assert answer["headers"]["X-Bundle-Digest"] == digits.record.bundle


def test_a_regressor_answers_its_golden_rows(regressor: Built, tmp_path: Path) -> None:
    said = ask(regressor, tmp_path)
    first, *middle, _ = said["answers"]
    assert first["status"] == 400
    for expected, answer in zip(regressor.golden, middle, strict=True):
        assert answer["body"] == pytest.approx(dict(expected.answer), rel=1e-4)


@pytest.mark.filterwarnings(
    # torchserve: ts/version.py opens version.txt at import and leaves it to the garbage collector
    "ignore:Exception ignored in.*version.txt:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("kind", ["packaging", "tests"])
def test_each_stand_in_has_what_the_real_context_has(kind: str, digits: Built, tmp_path: Path) -> None:
    """Same headers in, same calls, same state out: of ts's own Context and of the two stand-ins for it."""
    from ts.context import Context, RequestProcessor

    container.unpack(digits.path, tmp_path)
    headers: list[dict[str, Any]] = [{"X-Top-K": "3", "body": {"content-type": ""}}, {}]
    ours: Any
    if kind == "packaging":
        ours = clean_worker.Context(tmp_path)
        ours.take(headers)
    else:
        ours = FakeContext.at(tmp_path)
        ours.ask(_Deaf(), [Sent({}, header) for header in headers])
    config = yaml.safe_load((tmp_path / "model-config.yaml").read_text())
    real = Context("digits", str(tmp_path), ours.manifest, 1, None, "0.12.0", True, None, config)
    real.request_processor = [RequestProcessor(header) for header in headers]
    real.request_ids = {0: "request-0", 1: "request-1"}
    for context in (ours, real):
        context.set_response_status(415, "Unsupported", 0)
        context.set_response_header(1, "X-Model-Name", "digits")
        context.set_response_content_type(0, "application/json")
    for name in ("get_request_id", "get_all_request_header", "get_response_headers", "get_response_content_type"):
        for index in (0, 1):
            assert getattr(ours, name)(index) == getattr(real, name)(index), name
    assert ours.get_request_header(0, "X-Top-K") == real.get_request_header(0, "X-Top-K") == "3"
    assert ours.get_response_status(0) == real.get_response_status(0)
    assert ours.get_response_status(1)[0] == real.get_response_status(1)[0] == 200
    assert ours.system_properties.items() <= real.system_properties.items()
    assert ours.model_name == real.model_name
    assert ours.metrics is real.metrics is None
    assert ours.model_yaml_config == real.model_yaml_config


@pytest.mark.filterwarnings("ignore:unclosed file.*metrics.yaml:ResourceWarning")  # torchserve leaves it open
def test_the_stand_in_for_metrics_is_like_the_real_cache(caplog: pytest.LogCaptureFixture) -> None:
    """The shipped metrics file, read by TorchServe's own code: the same counters, labels and refusals."""
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    path = Path(__file__).parent.parent / "deploy" / "metrics.yaml"
    real, ours = MetricsCacheYamlImpl(config_file_path=str(path)), KnownMetrics(path)
    real.initialize_cache()
    for name, _, labels in (row for metric in METRICS for row in metric.declared()):
        assert real.get_metric(name).dimension_names == ours.get_metric(name).dimension_names == labels
    for cache in (real, ours):
        with pytest.raises(KeyError):
            cache.get_metric("marwright_nothing")
    with caplog.at_level(logging.INFO):
        real.get_metric("marwright_decode_seconds_bucket").add_or_update(3, ["digits", "1.0", "+Inf"])
    line = caplog.records[-1].getMessage()
    assert line.startswith(
        "[METRICS]marwright_decode_seconds_bucket.Count:3|#model_name:digits,model_version:1.0,le:+Inf|"
    )


class _Deaf:
    """A handler that answers nothing in particular."""

    def handle(self, data: list[Any], context: Any) -> list[bytes]:
        return [b"" for _ in data]
