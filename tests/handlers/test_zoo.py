"""Every odd request gets the status that it deserves, and harms nobody."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.handlers.context import Answer, Sent
from tests.zoo import ZOO, Oddity

NAMES = {model: [name for name, oddity in ZOO.items() if oddity.model == model] for model in ("digits", "diabetes")}


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(finite(inner) for inner in value.values())
    if isinstance(value, list):
        return all(finite(inner) for inner in value)
    return not isinstance(value, float) or math.isfinite(value)


def check(oddity: Oddity, answer: Answer) -> None:
    assert answer.status == oddity.status, answer.body[:300]
    assert answer.headers["content-type"] == "application/json"
    assert {"X-Model-Name", "X-Model-Version", "X-Bundle-Digest", "X-Worker-Pid"} <= answer.headers.keys()
    assert "ts_stream_next" not in answer.headers
    assert finite(answer.json)
    if oddity.status != 200:
        assert answer.json.keys() == {"code", "reason"}
        assert answer.json["code"] == oddity.status
        assert 5 < len(answer.json["reason"]) < 700


def test_the_zoo_is_large_and_its_names_are_unique() -> None:
    assert len(ZOO) >= 120
    assert sum(oddity.status != 200 for oddity in ZOO.values()) >= 60


@pytest.mark.parametrize("name", NAMES["digits"])
def test_an_odd_request_for_the_classifier_gets_its_status(digits: Any, name: str) -> None:
    handler, context = digits
    check(ZOO[name], context.ask(handler, [ZOO[name].sent])[0])


@pytest.mark.parametrize("name", NAMES["diabetes"])
def test_an_odd_request_for_the_regressor_gets_its_status(diabetes: Any, name: str) -> None:
    handler, context = diabetes
    check(ZOO[name], context.ask(handler, [ZOO[name].sent])[0])


def test_over_grpc_the_refusal_is_in_the_body(started: Any) -> None:
    handler, context = started
    for name in NAMES[handler.model]:
        oddity = ZOO[name]
        if oddity.grpc is None:
            continue
        fields = {key: bytearray(value) for key, value in oddity.grpc.items()}
        answer = context.ask(handler, [Sent(fields, {key: {"content-type": ""} for key in fields})])[0]
        assert answer.headers == {"ts_stream_next": "false"}
        refused = isinstance(answer.json, dict) and "code" in answer.json
        if name not in ("base64-as-text",):  # text in a gRPC field is bytes: nobody says that it is base64
            assert (answer.json["code"] if refused else 200) == oddity.status, name


def test_in_one_batch_everybody_gets_what_they_would_have_got_alone(started: Any) -> None:
    handler, context = started
    everyone = [ZOO[name] for name in NAMES[handler.model]]
    alone = [context.ask(handler, [oddity.sent])[0] for oddity in everyone]
    together = context.ask(handler, [oddity.sent for oddity in everyone])
    for oddity, one, other in zip(everyone, alone, together, strict=True):
        assert (one.status, one.headers) == (other.status, other.headers), oddity.name
        same(one.json, other.json)


def same(one: Any, other: Any) -> None:
    """The same labels in the same order; numbers within 1e-6 of one another, relative for large ones."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=2e-6, abs=1e-6)
    else:
        assert one == other
