"""A worker counts what it did, each thing once, and its counting harms nobody."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from handlers import base, bundle, ending, instances, metrics
from handlers.errors import KINDS, PHRASES, LoadError
from handlers.metrics import METRICS, Meters
from handlers.settings import WorkerSettings
from tests import zoo
from tests.handlers import archives
from tests.handlers.conftest import handler_class
from tests.handlers.context import FakeContext, KnownMetrics, Sent

ROOT = Path(__file__).parent.parent.parent
DECLARED = ROOT / "deploy" / "metrics.yaml"
HTTP = {"Host": "localhost:8080"}
GRPC = {"data": {"content-type": ""}}
PNG = zoo.encoded(zoo.picture("L", (16, 16)))


@dataclass
class Counting:
    """A started handler, and what it counted."""

    handler: base.BatchHandler
    context: FakeContext
    known: KnownMetrics

    def ask(self, *batch: Sent) -> list[int]:
        answers = self.context.ask(self.handler, batch)
        self.handler.meters.flush()
        return [answer.status for answer in answers]

    def sum(self, name: str, *labels: str) -> float:
        return self.known.sums[(f"marwright_{name}", self.handler.model, "1.0", *labels)]

    def grown(self, name: str) -> dict[tuple[str, ...], float]:
        """Series of that name above 0, by their own labels."""
        found = {key[3:]: value for key, value in self.known.sums.items() if key[0] == f"marwright_{name}"}
        return {labels: value for labels, value in found.items() if value}


@pytest.fixture
def count(unpacked: Any, threads: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Counting]]:
    """`count("digits")`: a handler that counts and emits when it is told to, not by the clock."""
    monkeypatch.setattr(metrics, "_PERIOD", 3600.0)
    monkeypatch.setattr(ending, "_before_sigterm", lambda: None)  # the test's process keeps its own ways
    begun: list[base.BatchHandler] = []

    def start(model: str = "digits", known: KnownMetrics | None = None) -> Counting:
        model_dir = unpacked(model, "eager")
        monkeypatch.setattr(bundle, "HOME", model_dir.resolve() / "handlers")
        context = FakeContext.at(model_dir, batch_size=8)
        context.metrics = known = known or KnownMetrics(DECLARED)
        begun.append(handler_class(model)())
        begun[-1].initialize(context)
        return Counting(begun[-1], context, known)

    yield start
    for handler in begun:
        handler.meters.close()


def bare(known: Any, **changes: Any) -> Meters:
    """Meters of digits, without a worker around them."""
    return Meters(known, replace(archives.spec("digits"), **changes), model="digits", version="1.0")


@dataclass
class Done:
    """A request whose batch is over."""

    call: str = "predict"
    status: int = 200
    seconds: float = 0.001
    rows: slice = field(default_factory=lambda: slice(0, 1))


def outputs(*rows: list[float]) -> dict[str, Any]:
    return {"probabilities": np.array(rows, np.float32)}


def pictures(count: int, height: int = 16, width: int = 16) -> Any:
    return np.random.default_rng(1).integers(0, 256, (count, 1, height, width), np.uint8)


def test_the_servers_file_declares_exactly_what_handlers_count() -> None:
    document = yaml.safe_load(DECLARED.read_text())
    declared = [(entry["name"], entry["unit"], entry["dimensions"]) for entry in document["model_metrics"]["counter"]]
    assert sorted(declared) == sorted(row for metric in METRICS for row in metric.declared())


def test_every_status_has_its_kind() -> None:
    assert KINDS.keys() == PHRASES.keys()


def test_a_start_puts_every_series_of_a_classifier_at_zero_but_for_its_own_times(count: Any) -> None:
    worker = count()
    own = {"load_seconds_sum", "load_seconds_count", "warm_up_seconds_sum", "warm_up_seconds_count"}
    grown = {key[0].removeprefix("marwright_") for key, value in worker.known.sums.items() if value}
    assert grown == own
    assert (worker.sum("load_seconds_count"), worker.sum("warm_up_seconds_count")) == (1, 1)
    names = {key[0] for key in worker.known.sums}
    everything = {name for metric in METRICS for name, _, _ in metric.declared()}
    explained = {f"marwright_explain_seconds_{part}" for part in ("bucket", "sum", "count")}
    assert everything - names == explained | {"marwright_captured_total", "marwright_capture_dropped_total"}


def test_nothing_is_counted_later_that_was_not_there_at_zero(count: Any) -> None:
    worker = count()
    before = set(worker.known.sums)
    kserve = {"instances": [{"b64": zoo.b64(PNG)}, {"b64": zoo.b64(PNG)}]}
    worker.ask(Sent({"body": PNG}, HTTP), Sent({"body": b"no"}, HTTP), Sent({"body": kserve}, HTTP))
    worker.ask(Sent({"body": {"image": 1, "b64": 2}}, HTTP), Sent({}, {"describe": "True"}))
    worker.ask(Sent({"body": PNG}, {**HTTP, "explain": "True"}))
    assert set(worker.known.sums) == before


def test_a_mixed_batch_is_counted_by_call_code_and_kind(count: Any) -> None:
    worker = count()
    many = {"instances": [{"b64": zoo.b64(PNG)}] * 257}
    statuses = worker.ask(
        Sent({"body": PNG}, HTTP),
        Sent({"data": PNG}, GRPC),
        Sent({"data": b"not a picture"}, GRPC),  # TorchServe sends no status of it; the count has it
        Sent({"body": b"not a picture"}, HTTP),
        Sent({"body": b"{"}, HTTP),
        Sent({"body": many}, HTTP),
        Sent({"body": PNG}, {**HTTP, "explain": "True"}),
        Sent({}, {"describe": "True"}),
    )
    assert statuses == [200, 200, 200, 415, 400, 413, 501, 200]
    assert worker.grown("requests_total") == {
        ("predict", "200"): 2, ("predict", "415"): 2, ("predict", "400"): 1, ("predict", "413"): 1,
        ("explain", "501"): 1, ("describe", "200"): 1,
    }  # fmt: skip
    assert worker.grown("errors_total") == {
        ("predict", "unsupported"): 2, ("predict", "malformed"): 1, ("predict", "too_large"): 1,
        ("explain", "not_offered"): 1,
    }  # fmt: skip
    counts = [worker.sum(f"{name}_seconds_count") for name in ("decode", "inference", "handle")]
    assert counts == [6, 2, 6]
    assert (worker.sum("batch_size_count"), worker.sum("batch_size_sum")) == (1, 7)
    assert worker.grown("batch_size_bucket") == {
        ("8",): 1,
        ("16",): 1,
        ("32",): 1,
        ("64",): 1,
        ("128",): 1,
        ("+Inf",): 1,
    }


def test_times_are_of_the_right_size_and_inside_one_another(count: Any) -> None:
    worker = count()
    begun = time.perf_counter()
    worker.ask(*[Sent({"body": PNG}, HTTP)] * 5)
    took = time.perf_counter() - begun
    decode, inference, handle = (worker.sum(f"{name}_seconds_sum") for name in ("decode", "inference", "handle"))
    assert 0 < decode < handle / 5
    assert 0 < inference < handle < 5 * took


def test_confidence_entropy_and_classes_are_those_of_the_answers(count: Any) -> None:
    worker = count()
    images = [zoo.encoded(zoo.picture("L", (16, 16)).rotate(angle)) for angle in range(0, 360, 40)]
    asked = [Sent({"body": image}, {**HTTP, "X-Top-K": "10"}) for image in images]
    answers = [answer.json for answer in worker.context.ask(worker.handler, asked)]
    worker.handler.meters.flush()
    best = [max(answer.values()) for answer in answers]
    entropy = [-sum(p * math.log(p) for p in answer.values() if p) / math.log(10) for answer in answers]
    assert (worker.sum("confidence_count"), worker.sum("entropy_count")) == (9, 9)
    assert worker.sum("confidence_sum") == pytest.approx(sum(best), rel=1e-5)
    assert worker.sum("entropy_sum") == pytest.approx(sum(entropy), rel=1e-4)
    assert worker.sum("confidence_bucket", "0.5") == sum(value <= 0.5 for value in best)
    classes = Counter(next(iter(answer)) for answer in answers)
    assert {unquote(name): value for (name,), value in worker.grown("predictions_total").items()} == classes


def test_brightness_and_contrast_are_those_of_the_pixels(count: Any) -> None:
    worker = count()
    black, white = (zoo.encoded(zoo.Image.new("L", (16, 16), shade)) for shade in (0, 255))
    worker.ask(Sent({"body": black}, HTTP), Sent({"body": white}, HTTP), Sent({"body": PNG}, HTTP))
    pixels = instances.array(PNG, worker.handler.spec) / 255
    assert worker.sum("brightness_count") == worker.sum("contrast_count") == 3
    assert worker.sum("brightness_sum") == pytest.approx(1 + pixels.mean(), rel=1e-5)
    assert worker.sum("contrast_sum") == pytest.approx(pixels.std(), rel=1e-5)
    assert worker.sum("brightness_bucket", "0.1") == 1


def test_a_batch_without_a_single_picture_leaves_the_others_figures_alone(
    count: Any, caplog: pytest.LogCaptureFixture
) -> None:
    worker = count()
    assert worker.ask(Sent({"body": b"no picture"}, HTTP)) == [415]
    assert worker.ask(Sent({"body": PNG}, HTTP), Sent({"body": b"no picture"}, HTTP)) == [200, 415]
    assert worker.sum("brightness_count") == 1
    assert not [one for one in caplog.records if "incomplete" in one.getMessage()]


def test_a_regressor_has_requests_and_times_and_no_classes(count: Any) -> None:
    worker = count("diabetes")
    assert worker.ask(Sent({"body": zoo.ROW}, HTTP), Sent({"body": [1]}, HTTP))[0] == 200
    assert worker.sum("requests_total", "predict", "200") == 1
    assert worker.sum("inference_seconds_count") == 1
    names = {key[0] for key in worker.known.sums}
    assert not names & {"marwright_confidence_count", "marwright_predictions_total", "marwright_brightness_count"}


def test_an_instance_without_a_finite_answer_is_an_error_and_no_confidence(count: Any) -> None:
    worker = count()
    run = worker.handler.runtime.run

    class Half:
        device = "cpu"

        def run(self, batch: Any) -> Any:
            given = run(batch)
            given["probabilities"][0] = np.nan
            return given

    worker.handler.runtime = Half()
    assert worker.ask(Sent({"body": PNG}, HTTP), Sent({"body": PNG}, HTTP)) == [500, 200]
    assert worker.grown("errors_total") == {("predict", "failed"): 1}
    assert worker.sum("confidence_count") == sum(worker.grown("predictions_total").values()) == 1
    assert worker.sum("inference_seconds_count") == 2


def test_a_batch_that_the_handler_could_not_answer_at_all_is_counted(count: Any) -> None:
    worker = count()
    worker.handler.inference = None
    with pytest.raises(TypeError):
        worker.ask(Sent({"body": PNG}, HTTP), Sent({"body": PNG}, HTTP))
    worker.handler.meters.flush()
    assert worker.grown("requests_total") == {("predict", "503"): 2}
    assert worker.grown("errors_total") == {("predict", "failed"): 2}


def test_a_row_that_is_explained_is_no_prediction() -> None:
    known = KnownMetrics(DECLARED)
    meters = bare(known)
    requests = [Done("explain", rows=slice(0, 1)), Done(rows=slice(1, 3)), Done("explain", 422, rows=slice(0))]
    rows = outputs([1.0] + [0.0] * 9, *[[0.0] * 9 + [1.0]] * 2)
    meters.batch(requests, pictures(3), rows, 0.1, 0.2)
    meters.explained(0.3)
    meters.flush()
    sums = {key[0].removeprefix("marwright_"): value for key, value in known.sums.items() if len(key) == 3}
    assert (sums["confidence_count"], sums["brightness_count"], sums["inference_seconds_count"]) == (2, 2, 1)
    assert (sums["explain_seconds_count"], sums["explain_seconds_sum"]) == (1, 0.3)
    assert (sums["batch_size_sum"], sums["handle_seconds_count"], sums["decode_seconds_count"]) == (3, 1, 1)
    predicted = {key[3]: value for key, value in known.sums.items() if key[0] == "marwright_predictions_total"}
    assert predicted == {"n%C3%BCll": 2}
    calls = {key[3:]: value for key, value in known.sums.items() if key[0] == "marwright_requests_total"}
    assert calls == {("explain", "200"): 1, ("explain", "422"): 1, ("predict", "200"): 1}


@given(st.lists(st.floats(0, 100) | st.sampled_from(metrics.SECONDS), max_size=40))
def test_a_bucket_holds_what_is_no_greater_than_its_bound(seconds: list[float]) -> None:
    known = KnownMetrics(DECLARED)
    meters = bare(known)
    for value in seconds:
        meters.explained(value)
    meters.flush()
    found = {key[3]: count for key, count in known.sums.items() if key[0] == "marwright_explain_seconds_bucket"}
    expected = {metrics.le(bound): sum(value <= bound for value in seconds) for bound in (*metrics.SECONDS, math.inf)}
    assert found == {bound: count for bound, count in expected.items() if count}
    counted = known.sums.get(("marwright_explain_seconds_count", "digits", "1.0"), 0)
    assert counted == len(seconds)


def test_bounds_are_written_as_prometheus_writes_them() -> None:
    written = [metrics.le(bound) for bound in (0.0005, 0.005, 1.0, 2.5, 128.0, math.inf)]
    assert written == ["0.0005", "0.005", "1", "2.5", "128", "+Inf"]


@given(st.text(min_size=1))
def test_a_label_is_one_that_the_server_can_carry_and_can_be_read_back(text: str) -> None:
    safe = metrics.text(text)
    assert safe.isascii()
    assert not set(safe) & set(',|#:"\\\r\n\t()')
    assert unquote(safe, errors="surrogatepass") == text


def test_usual_names_are_left_as_they_are() -> None:
    for name in ("digits", "1.10", "my_model-2", "quer gestreift", "2.0+cpu"):
        assert metrics.text(name) == name
    assert metrics.text("") == "(empty)"


def test_classes_beyond_the_hundredth_share_a_name() -> None:
    known = KnownMetrics(DECLARED)
    meters = bare(known, classes=(*(f"c{index}" for index in range(102)), "(other)"))
    rows = np.zeros((103, 103), np.float32)
    np.fill_diagonal(rows, 1.0)
    meters.batch([Done(rows=slice(0, 103))], pictures(103), {"probabilities": rows}, 0.1, 0.2)
    meters.flush()
    predicted = {key[3]: value for key, value in known.sums.items() if key[0] == "marwright_predictions_total"}
    assert predicted == {**{f"c{index}": 1 for index in range(100)}, "(other)": 3}


def test_of_a_large_picture_enough_pixels_are_looked_at_and_no_more_are_kept() -> None:
    known = KnownMetrics(DECLARED)
    spec = archives.spec("digits")
    meters = bare(known, input=replace(spec.input, height=300, width=500))
    array = pictures(2, 300, 500)
    array[0, :, :, 250:] = 0
    meters.batch([Done(), Done()], array, outputs(*[[0.1] * 10] * 2), 0.1, 0.2)
    kept = meters._batches[0].pixels
    assert kept is not None
    assert kept[0].size <= 4096
    assert not np.shares_memory(kept, array)
    meters.flush()
    for name, value in {"brightness": (array / 255).mean((1, 2, 3)), "contrast": (array / 255).std((1, 2, 3))}.items():
        assert known.sums[(f"marwright_{name}_sum", "digits", "1.0")] == pytest.approx(value.sum(), rel=0.05)


def test_what_waits_is_bounded_although_nobody_works_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_WAITING", 10_000)
    known = KnownMetrics(DECLARED)
    meters = bare(known)
    array, rows = pictures(8), outputs(*[[0.1] * 10] * 8)
    longest = 0
    for _ in range(100):
        meters.batch([Done()] * 8, array, rows, 0.1, 0.2)
        longest = max(longest, len(meters._batches))
    assert 1 <= longest <= 10_000 // array.nbytes
    meters.flush()
    assert known.sums[("marwright_requests_total", "digits", "1.0", "predict", "200")] == 800


def test_no_count_is_lost_between_threads() -> None:
    """Batches come while others flush as fast as they can."""
    known = KnownMetrics(DECLARED)
    meters = bare(known)
    over = threading.Event()

    def flush() -> None:
        while not over.is_set():
            meters.flush()

    others = [threading.Thread(target=flush) for _ in range(3)]
    for other in others:
        other.start()
    array, rows = pictures(2), outputs([1.0] + [0.0] * 9, [0.0] * 9 + [1.0])
    for _ in range(2000):
        meters.batch([Done(rows=slice(0, 1)), Done(status=415, rows=slice(0))], array, rows, 0.1, 0.2)
        meters.explained(0.25)
    over.set()
    for other in others:
        other.join()
    meters.flush()
    sums = known.sums
    assert sums[("marwright_requests_total", "digits", "1.0", "predict", "200")] == 2000
    assert sums[("marwright_errors_total", "digits", "1.0", "predict", "unsupported")] == 2000
    assert sums[("marwright_brightness_count", "digits", "1.0")] == 4000
    assert sums[("marwright_explain_seconds_sum", "digits", "1.0")] == 500.0
    assert meters._put == meters._taken


def test_its_own_thread_emits_by_itself_until_it_is_closed(count: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PERIOD", 0.02)
    known = KnownMetrics(DECLARED)
    meters = bare(known)
    meters.begin(0.5, 0.25)
    alive = [thread for thread in threading.enumerate() if thread.name == "marwright-metrics"]
    assert alive
    assert all(thread.daemon for thread in alive)
    assert known.sums[("marwright_load_seconds_sum", "digits", "1.0")] == 0.5
    assert known.sums[("marwright_warm_up_seconds_sum", "digits", "1.0")] == 0.25
    meters.batch([Done()], pictures(1), outputs([0.1] * 10), 0.1, 0.2)
    series = ("marwright_requests_total", "digits", "1.0", "predict", "200")
    until = time.monotonic() + 20
    while not known.sums[series] and time.monotonic() < until:
        time.sleep(0.01)
    assert known.sums[series] == 1
    meters.close()
    for thread in alive:
        thread.join(20)
        assert not thread.is_alive()


def test_what_is_captured_is_at_zero_where_a_worker_captures_and_counted_by_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ending, "_before_sigterm", lambda: None)
    known = KnownMetrics(DECLARED)
    meters = Meters(known, archives.spec("digits"), model="digits", version="1.0", captures=True)
    meters.begin(0.1, 0.1)
    series = {(name, *labels): value for (name, _, _, *labels), value in known.sums.items() if "captur" in name}
    expected = {("marwright_capture_dropped_total", reason): 0.0 for reason in metrics.DROPS}
    assert series == {**expected, ("marwright_captured_total",): 0.0}
    for count, reason in ((3, ""), (2, "disk"), (4, ""), (1, "queue")):
        meters.captured(count, reason)
    meters.close()
    sums = {(name, *labels): value for (name, _, _, *labels), value in known.sums.items() if "captur" in name and value}
    assert sums == {
        ("marwright_captured_total",): 7,
        ("marwright_capture_dropped_total", "disk"): 2,
        ("marwright_capture_dropped_total", "queue"): 1,
    }


class Broken(KnownMetrics):
    """Declares everything and takes nothing."""

    def get_metric(self, metric_name: str) -> Any:
        counter = super().get_metric(metric_name)
        counter.add_or_update = self.refuse  # type: ignore[method-assign]
        return counter

    def refuse(self, value: float, dimension_values: list[str]) -> None:
        raise OSError("the pipe is gone")


def test_a_failing_metric_harms_no_request_and_is_said_once(count: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker = count(known=Broken(DECLARED))
    assert [worker.ask(Sent({"body": PNG}, HTTP)) for _ in range(3)] == [[200]] * 3
    said = [record for record in caplog.records if "metrics" in record.getMessage()]
    assert len(said) == 1
    assert said[0].exc_info is not None


def test_a_figure_that_cannot_be_made_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    known = KnownMetrics(DECLARED)
    meters = bare(known)
    meters.batch([Done()], pictures(1), {"probabilities": np.array([["odd"]])}, 0.1, 0.2)
    meters.flush()
    assert known.sums[("marwright_requests_total", "digits", "1.0", "predict", "200")] == 1
    assert known.sums[("marwright_brightness_count", "digits", "1.0")] == 1
    assert "incomplete" in caplog.text


def test_a_server_that_declares_none_of_it_is_told_once_and_serves(
    count: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.yaml"
    path.write_text("model_metrics:\n  gauge: []\n")
    before = threading.active_count()
    worker = count(known=KnownMetrics(path))
    assert worker.ask(Sent({"body": PNG}, HTTP)) == [200]
    assert threading.active_count() == before
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "deploy/metrics.yaml" in said[0]


def test_a_counter_declared_with_other_labels_is_left_out_and_the_others_count(
    count: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = yaml.safe_load(DECLARED.read_text())
    next(entry for entry in document["model_metrics"]["counter"] if entry["name"] == "marwright_requests_total")[
        "dimensions"
    ] = ["model_name"]
    path = tmp_path / "metrics.yaml"
    path.write_text(yaml.safe_dump(document))
    worker = count(known=KnownMetrics(path))
    assert worker.ask(Sent({"body": b"no"}, HTTP)) == [415]
    assert worker.sum("errors_total", "predict", "unsupported") == 1
    assert "declare 1 of the" in caplog.text
    assert "marwright_requests_total" in caplog.text


def test_metrics_can_be_switched_off(count: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARWRIGHT_METRICS", "off")
    worker = count()
    assert worker.ask(Sent({"body": PNG}, HTTP)) == [200]
    assert worker.known.sums == {}


@pytest.mark.parametrize(
    ("environ", "section", "expected"),
    [
        ({}, {}, True),
        ({}, {"metrics": False}, False),
        ({}, {"metrics": "off"}, False),
        ({}, {"metrics": True}, True),
        ({"MARWRIGHT_METRICS": "on"}, {"metrics": False}, True),
        ({"MARWRIGHT_METRICS": "OFF"}, {"metrics": True}, False),
        ({"MARWRIGHT_METRICS": "false"}, None, False),
        ({"MARWRIGHT_METRICS": ""}, {"metrics": False}, False),
    ],
)
def test_the_environment_beats_the_archive(environ: Any, section: Any, expected: bool) -> None:
    assert WorkerSettings.read(environ, {"handler": section}).metrics is expected


@pytest.mark.parametrize(
    ("environ", "section", "name"),
    [
        ({"MARWRIGHT_METRICS": "maybe"}, {}, "MARWRIGHT_METRICS is 'maybe'"),
        ({}, {"metrics": 1}, "model-config.yaml: handler.metrics is 1"),
        ({}, {"metrics": []}, "model-config.yaml: handler.metrics is []"),
    ],
)
def test_an_unusable_switch_is_named(environ: Any, section: Any, name: str) -> None:
    with pytest.raises(LoadError) as refused:
        WorkerSettings.read(environ, {"handler": section})
    assert str(refused.value).startswith(name)


CHILD = """
import sys
from pathlib import Path
from handlers import metrics
from handlers.spec import ModelSpec
from tests.handlers.context import KnownMetrics

metrics._PERIOD = 3600.0
known = KnownMetrics(Path("deploy/metrics.yaml"))
for name, counter in known._counters.items():
    def said(value, labels, name=name):
        if value and name.endswith("explain_seconds_count"):
            print("counted", value, flush=True)
    counter.add_or_update = said
meters = metrics.Meters(known, ModelSpec.from_json(sys.argv[2]), model="digits", version="1.0")
meters.begin(1.0, 1.0)
meters.explained(0.5)
print("ready", flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("ended", ["by itself", "told to end"])
def test_what_was_not_said_yet_is_said_at_the_end(ended: str) -> None:
    words = [sys.executable, "-c", CHILD, "wait" if ended == "told to end" else "go", archives.spec("digits").to_json()]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        if ended == "told to end":
            os.kill(child.pid, signal.SIGTERM)
        assert child.stdout.read() == "counted 1\n"
    assert child.returncode == (-signal.SIGTERM if ended == "told to end" else 0)
