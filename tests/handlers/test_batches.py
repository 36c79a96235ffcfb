"""One batch, many requests: each is answered for itself."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers import base, instances
from tests import zoo
from tests.handlers import archives
from tests.handlers.context import Sent

HTTP = {"Host": "localhost:8080"}
GRPC = {"data": {"content-type": ""}}


def png(shade: int) -> bytes:
    image = zoo.picture("L", (16, 16)).point(lambda value: (value + shade) % 256)
    return zoo.encoded(image)


class Picky:
    """A runtime that fails on any batch with a wholly white picture in it, and counts its runs."""

    device = "cpu"

    def __init__(self, inner: Any) -> None:
        self.inner, self.sizes = inner, []

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(len(batch))
        if (batch == 255).all(axis=(1, 2, 3)).any():
            raise ValueError("white")
        return self.inner.run(batch)


WHITE = zoo.encoded(zoo.Image.new("L", (16, 16), 255))


def test_a_stock_answer_is_the_top_five_best_first(digits: Any) -> None:
    handler, context = digits
    answer = context.ask(handler, [Sent({"body": png(0)}, HTTP)])[0]
    values = list(answer.json.values())
    assert len(values) == 5
    assert values == sorted(values, reverse=True)
    assert answer.json.keys() <= set(archives.LABELS)
    everything = context.ask(handler, [Sent({"body": png(0)}, {**HTTP, "x-top-k": "10"})])[0].json
    assert list(everything)[:5] == list(answer.json)
    assert sum(everything.values()) == pytest.approx(1, abs=1e-6)


def test_every_answer_over_rest_says_who_gave_it(digits: Any) -> None:
    handler, context = digits
    good, bad = context.ask(handler, [Sent({"body": png(0)}, HTTP), Sent({"body": b"no"}, HTTP)])
    identity = {"X-Model-Name": "digits", "X-Model-Version": "1.0", "X-Bundle-Digest": handler.bundle.digest}
    identity["X-Worker-Pid"] = str(os.getpid())
    assert identity.items() <= good.headers.items()
    assert good.headers == bad.headers
    assert (good.status, bad.status) == (200, 415)


def test_answers_agree_with_the_eager_graph(digits: Any) -> None:
    handler, context = digits
    image = instances.array(png(30), handler.spec)
    expected = archives.graph("digits")(archives.torch.from_numpy(image[None]))[0][0].tolist()
    given = context.ask(handler, [Sent({"body": png(30)}, {**HTTP, "X-Top-K": "10"})])[0].json
    assert given == {
        label: pytest.approx(value, abs=1e-6) for label, value in zip(archives.LABELS, expected, strict=True)
    }


def test_a_regressor_answers_with_its_targets_name(diabetes: Any) -> None:
    handler, context = diabetes
    row, rows, v1 = context.ask(
        handler,
        [
            Sent({"body": zoo.ROW}, HTTP),
            Sent({"body": [zoo.ROW] * 2}, HTTP),
            Sent({"body": {"instances": [zoo.ROW]}}, HTTP),
        ],
    )
    assert row.json.keys() == {"progression"}
    assert rows.json == [row.json, row.json]
    assert v1.json == {"predictions": [row.json["progression"]]}


def test_kserve_v1_has_one_prediction_for_each_instance(digits: Any) -> None:
    handler, context = digits
    body = {"instances": [{"b64": zoo.b64(png(shade))} for shade in (0, 90)], "parameters": {"top_k": 2}}
    both, first, second = context.ask(
        handler, [Sent({"body": body}, HTTP), *(Sent({"body": png(shade), "top_k": "2"}, HTTP) for shade in (0, 90))]
    )
    assert both.json == {"predictions": [first.json, second.json]}
    assert first.json != second.json


def test_kserve_v2_answers_with_labels_beside_their_probabilities(digits: Any) -> None:
    handler, context = digits
    tensor = {"name": "input", "shape": [2], "datatype": "BYTES", "data": [zoo.b64(png(0)), zoo.b64(png(90))]}
    body = {"id": "abc", "inputs": [tensor], "parameters": {"top_k": 3}}
    v2, one, two = context.ask(
        handler, [Sent({"body": body}, HTTP), *(Sent({"body": png(shade), "top_k": "3"}, HTTP) for shade in (0, 90))]
    )
    labels, probabilities = v2.json["outputs"]
    assert (v2.json["model_name"], v2.json["model_version"], v2.json["id"]) == ("digits", "1.0", "abc")
    assert (labels["name"], labels["shape"], labels["datatype"]) == ("labels", [2, 3], "BYTES")
    assert (probabilities["name"], probabilities["shape"], probabilities["datatype"]) == (
        "probabilities",
        [2, 3],
        "FP32",
    )
    assert labels["data"] == [*one.json, *two.json]
    assert probabilities["data"] == [*one.json.values(), *two.json.values()]


def test_kserve_v2_gives_the_outputs_that_were_asked_for(digits: Any) -> None:
    handler, context = digits
    tensor = {"name": "input", "shape": [1], "datatype": "BYTES", "data": [zoo.b64(png(0))]}
    body = {"inputs": [tensor], "outputs": [{"name": "embedding"}, {"name": "labels"}]}
    outputs = context.ask(handler, [Sent({"body": body}, HTTP)])[0].json["outputs"]
    assert [(output["name"], output["shape"]) for output in outputs] == [("embedding", [1, 128]), ("labels", [1, 5])]


def test_kserve_v2_of_a_regressor_is_named_after_its_target(diabetes: Any) -> None:
    handler, context = diabetes
    body = {"inputs": [{"name": "x", "shape": [2, 10], "datatype": "FP32", "data": zoo.ROW * 2}]}
    output = context.ask(handler, [Sent({"body": body}, HTTP)])[0].json["outputs"][0]
    assert (output["name"], output["shape"], output["datatype"]) == ("progression", [2, 1], "FP32")


def test_one_bad_instance_refuses_its_request_and_is_named(digits: Any) -> None:
    handler, context = digits
    body = {"instances": [{"b64": zoo.b64(png(0))}, {"b64": zoo.b64(b"nothing")}]}
    bad, good = context.ask(handler, [Sent({"body": body}, HTTP), Sent({"body": png(0)}, HTTP)])
    assert (bad.status, good.status) == (415, 200)
    assert bad.json["reason"].startswith("instance 1: ")


def test_over_grpc_meta_puts_everything_in_the_body(digits: Any) -> None:
    handler, context = digits
    fields = {"data": bytearray(png(0)), "meta": bytearray(b"1")}
    plain, good, bad = context.ask(
        handler,
        [Sent({"data": bytearray(png(0))}, GRPC), Sent(fields, GRPC), Sent({"data": b"", "meta": b"1"}, GRPC)],
    )
    identity = {"model": "digits", "version": "1.0", "bundle": handler.bundle.digest, "worker": os.getpid()}
    assert good.json == {"prediction": plain.json, "status": 200, **identity, "request_id": "request-1"}
    reason = "the image is empty: no bytes arrived"
    assert bad.json == {"prediction": None, "status": 400, **identity, "request_id": "request-2", "reason": reason}


def test_meta_means_nothing_over_rest(digits: Any) -> None:
    handler, context = digits
    answer = context.ask(handler, [Sent({"data": png(0), "meta": b"1"}, HTTP)])[0]
    assert answer.json.keys() <= set(archives.LABELS)


def test_only_grpc_answers_end_a_stream(digits: Any) -> None:
    handler, context = digits
    grpc, rest = context.ask(handler, [Sent({"data": png(0)}, GRPC), Sent({"data": png(0)}, HTTP)])
    assert grpc.headers == {"ts_stream_next": "false"}
    assert "ts_stream_next" not in rest.headers


def test_a_description_says_what_is_serving_and_shares_a_batch(started: Any) -> None:
    handler, context = started
    answer, bad = context.ask(handler, [Sent({}, {"describe": "True"}), Sent({}, HTTP)])
    assert (answer.status, bad.status, answer.headers) == (200, 400, {})
    assert answer.json == {
        "wire": handler.wire,
        "model": handler.model,
        "version": "1.0",
        "bundle": handler.bundle.digest,
        "run": "0123456789ab",
        "data_digest": "d" * 16,
        "artifact": handler.spec.artifact,
        "artifact_sha256": handler.bundle.members[handler.spec.artifact],
        "format": handler.spec.format,
        "task": handler.spec.task,
        "labels": list(handler.spec.classes),
        "target": handler.spec.target,
        "metrics": dict(handler.spec.metrics),
        "explanations": [],
        "device": "cpu",
        "threads": 1,
        "capture": 0.0,
        "pid": os.getpid(),
    }


def test_explanations_are_refused_with_a_reason(digits: Any) -> None:
    handler, context = digits
    by_header = Sent({"body": png(0)}, {**HTTP, "explain": "True"})
    by_field = Sent({"data": png(0), "explain": b"1"}, GRPC)
    by_key = Sent({"body": {"data": zoo.b64(png(0)), "explain": True}}, HTTP)
    not_at_all = Sent({"data": png(0), "explain": b"0"}, GRPC)
    first, second, third, fourth = context.ask(handler, [by_header, by_field, by_key, not_at_all])
    assert (first.status, third.status) == (501, 501)
    assert second.json == {"code": 501, "reason": "this model offers no explanations"}
    assert fourth.json.keys() <= set(archives.LABELS)


def test_only_the_culprit_fails_when_the_model_fails(digits: Any, caplog: pytest.LogCaptureFixture) -> None:
    handler, context = digits
    shades = [png(0), WHITE, png(90)]
    alone = [context.ask(handler, [Sent({"body": body}, HTTP)])[0].json for body in shades]
    handler.runtime = Picky(handler.runtime)
    first, culprit, last = context.ask(handler, [Sent({"body": body}, HTTP) for body in shades])
    assert (first.status, culprit.status, last.status) == (200, 500, 200)
    assert list(first.json) == list(alone[0])
    assert last.json == pytest.approx(alone[2], abs=1e-6)
    assert culprit.json["code"] == 500
    assert handler.runtime.sizes == [3, 1, 1, 1]
    assert "white" in caplog.text


def test_when_the_model_fails_on_everything_everybody_gets_500(digits: Any) -> None:
    handler, context = digits
    handler.runtime = Picky(handler.runtime)
    assert [answer.status for answer in context.ask(handler, [Sent({"body": WHITE}, HTTP)] * 3)] == [500] * 3


def test_a_whole_chunk_that_fails_leaves_the_next_chunk_alone(digits: Any) -> None:
    handler, context = digits
    handler.runtime = Picky(handler.runtime)
    answers = context.ask(handler, [Sent({"body": WHITE}, HTTP)] * 64 + [Sent({"body": png(0)}, HTTP)])
    assert [answer.status for answer in answers] == [500] * 64 + [200]


def test_a_culprit_in_the_second_chunk_is_still_the_only_one(digits: Any) -> None:
    handler, context = digits
    handler.runtime = Picky(handler.runtime)
    bodies = [png(0)] * 66
    bodies[65] = WHITE
    statuses = [answer.status for answer in context.ask(handler, [Sent({"body": body}, HTTP) for body in bodies])]
    assert statuses == [200] * 65 + [500]


def test_an_answer_that_is_not_finite_is_our_fault_and_its_own(diabetes: Any) -> None:
    handler, context = diabetes

    class Overflowing:
        device = "cpu"

        def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
            value = np.where(batch[:, :1] > 100, np.inf, 1.0).astype(np.float32)
            return {"value": value, "embedding": batch}

    handler.runtime = Overflowing()
    good, bad = context.ask(handler, [Sent({"body": [1.0] * 10}, HTTP), Sent({"body": [1000.0] * 10}, HTTP)])
    assert (good.status, bad.status) == (200, 500)
    assert good.json == {"progression": 1.0}
    assert "no finite answer" in bad.json["reason"]


def test_large_batches_run_in_chunks_and_stay_in_order(digits: Any) -> None:
    handler, context = digits
    handler.runtime = Picky(handler.runtime)
    shades = [shade % 250 for shade in range(150)]
    answers = context.ask(handler, [Sent({"body": png(shade)}, HTTP) for shade in shades])
    assert handler.runtime.sizes == [64, 64, 22]
    for place in (0, 63, 64, 149):
        alone = context.ask(handler, [Sent({"body": png(shades[place])}, HTTP)])[0]
        assert list(answers[place].json) == list(alone.json)
        assert answers[place].json == pytest.approx(alone.json, abs=1e-6)


@pytest.mark.parametrize("nothing", [None, []])
def test_no_requests_means_no_answers(digits: Any, nothing: Any) -> None:
    handler, context = digits
    assert handler.handle(nothing, context) == []


@pytest.mark.parametrize("fields", [{}, {"top_k": b"3"}])
def test_a_request_without_input_is_400(digits: Any, fields: Any) -> None:
    handler, context = digits
    assert context.ask(handler, [Sent(fields, HTTP)])[0].status == 400


def test_an_unforeseen_exception_is_500_for_its_request_alone(
    digits: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handler, context = digits
    write = instances.write

    def fragile(out: Any, instance: Any, spec: Any) -> None:
        if instance == b"dynamite":
            raise KeyError("boom")
        write(out, instance, spec)

    monkeypatch.setattr(instances, "write", fragile)
    bad, good = context.ask(handler, [Sent({"body": b"dynamite"}, HTTP), Sent({"body": png(0)}, HTTP)])
    assert (bad.status, good.status) == (500, 200)
    assert "boom" not in bad.body.decode()
    assert "boom" in caplog.text


def test_handlers_say_nothing_about_good_requests(digits: Any, caplog: pytest.LogCaptureFixture) -> None:
    handler, context = digits
    with caplog.at_level(logging.DEBUG, logger=base.__name__):
        context.ask(handler, [Sent({"body": png(0)}, HTTP)])
    assert caplog.records == []


ODD = st.sampled_from([oddity.sent for oddity in zoo.ZOO.values() if len(oddity.body) < 10**6])
ANYTHING = st.builds(
    Sent,
    st.dictionaries(
        st.sampled_from(["body", "data", "top_k", "meta", "explain", "x"]), st.binary(max_size=9) | st.none()
    ),
    st.dictionaries(st.sampled_from(["Host", "X-Top-K", "explain", "describe", "data"]), st.text(max_size=5)),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ODD | ANYTHING, max_size=6), st.lists(ODD | ANYTHING, max_size=6), st.sampled_from(["eager", "onnx"]))
def test_no_company_changes_a_good_answer(ready: Any, before: list[Sent], after: list[Sent], format: str) -> None:
    handler, context = ready("digits", format)
    good = Sent({"body": png(40)}, HTTP)
    alone = context.ask(handler, [good])[0]
    together = context.ask(handler, [*before, good, *after])
    mine = together[len(before)]
    assert (mine.status, list(mine.json), mine.headers) == (200, list(alone.json), alone.headers)
    assert mine.json == pytest.approx(alone.json, abs=1e-6)
    for answer in together:
        assert answer.json is not None
        assert answer.status in (200, 400, 413, 415, 422, 501)
