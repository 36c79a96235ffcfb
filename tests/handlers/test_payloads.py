"""However a request was sent, the same instances are found in it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers import answers, instances, payloads
from handlers.errors import BadRequest
from handlers.payloads import Headers, Payload
from tests import zoo
from tests.handlers import archives

DIGITS, DIABETES = archives.spec("digits"), archives.spec("diabetes")
HTTP = Headers(http=True)


def parse(fields: dict[str, Any], spec: Any = DIGITS, headers: Headers = HTTP) -> Payload:
    return payloads.parse(fields, headers, spec)


def arrays(fields: dict[str, Any], spec: Any = DIGITS) -> list[Any]:
    return [instances.array(instance, spec) for instance in parse(fields, spec).instances]


PNG = zoo.encoded(zoo.picture("L", (16, 16)))
PIXELS = np.asarray(zoo.picture("L", (16, 16)))
NESTED = PIXELS.tolist()
FLAT = PIXELS.ravel().tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"body": bytearray(PNG)},
        {"data": PNG},
        {"anything": PNG},
        {"body": zoo.b64(PNG)},
        {"body": f"data:image/png;base64,{zoo.b64(PNG)}"},
        {"body": {"data": zoo.b64(PNG)}},
        {"body": json.dumps({"image": zoo.b64(PNG)}).encode()},
        {"body": {"b64": zoo.b64(PNG)}},
        {"body": NESTED},
        {"body": [NESTED]},
        {"body": (PIXELS[..., None]).tolist()},
        {"body": {"data": NESTED}},
        {"body": zoo.npy(PIXELS)},
        {"body": zoo.npy(PIXELS[None])},
        {"body": zoo.npy(PIXELS[None, None])},
        {"body": zoo.npy(PIXELS.astype(">i4"))},
        {"body": zoo.npy(np.asfortranarray(PIXELS))},
        {"body": zoo.npy(PIXELS / 255)},
        {"body": zoo.npy(PIXELS.astype(np.uint16) * 257)},
        {"body": {"instances": [{"b64": zoo.b64(PNG)}]}},
        {"body": {"instances": [zoo.b64(PNG)]}},
        {"body": {"instances": [NESTED]}},
        {"body": {"inputs": [{"shape": [1, 1, 16, 16], "datatype": "UINT8", "data": FLAT}]}},
        {"body": {"inputs": [{"shape": [16, 16], "datatype": "INT64", "data": NESTED}]}},
        {"body": {"inputs": [{"shape": [1, 16, 16, 1], "datatype": "FP32", "data": (PIXELS / 255).ravel().tolist()}]}},
        {"body": {"inputs": [{"shape": [1], "datatype": "BYTES", "data": [zoo.b64(PNG)]}]}},
    ],
)
def test_one_picture_is_the_same_array_however_it_was_sent(fields: dict[str, Any]) -> None:
    found = arrays(fields)
    assert len(found) == 1
    np.testing.assert_array_equal(found[0], PIXELS[None])


@pytest.mark.parametrize(
    "fields",
    [
        {"body": zoo.ROW},
        {"body": [zoo.ROW]},
        {"data": json.dumps(zoo.ROW).encode()},
        {"body": dict(zip(zoo.FEATURES, zoo.ROW, strict=True))},
        {"body": dict(reversed(list(zip(zoo.FEATURES, zoo.ROW, strict=True))))},
        {"body": {"data": [zoo.ROW]}},
        {"body": {"data": dict(zip(zoo.FEATURES, zoo.ROW, strict=True))}},
        {"body": zoo.npy(zoo.ROW, np.float32)},
        {"body": zoo.npy([zoo.ROW], ">f8")},
        {"body": {"instances": [{"data": zoo.ROW}]}},
        {"body": {"inputs": [{"shape": [10], "datatype": "FP32", "data": zoo.ROW}]}},
    ],
)
def test_one_row_is_the_same_array_however_it_was_sent(fields: dict[str, Any]) -> None:
    found = arrays(fields, DIABETES)
    assert len(found) == 1
    np.testing.assert_array_equal(found[0], np.asarray(zoo.ROW, np.float32))


@pytest.mark.parametrize(
    ("body", "form", "count"),
    [
        (zoo.ROW, "stock", 1),
        ([zoo.ROW], "list", 1),
        ([zoo.ROW] * 3, "list", 3),
        ({"data": [zoo.ROW] * 2}, "list", 2),
        ({"instances": [zoo.ROW] * 2}, "kserve-v1", 2),
        ({"inputs": [{"shape": [2, 10], "datatype": "FP32", "data": zoo.ROW * 2}]}, "kserve-v2", 2),
    ],
)
def test_the_form_of_the_request_is_the_form_of_the_answer(body: Any, form: str, count: int) -> None:
    payload = parse({"body": body}, DIABETES)
    assert (payload.form, len(payload.instances)) == (form, count)


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"data": PNG, "top_k": bytearray(b"3")}, HTTP),
        ({"data": PNG, "top_k": "3"}, HTTP),
        ({"body": {"data": zoo.b64(PNG), "top_k": 3}}, HTTP),
        ({"body": {"instances": [zoo.b64(PNG)], "parameters": {"top_k": 3}}}, HTTP),
        ({"body": PNG, "top_k": b"7"}, Headers.read({"x-TOP-k": " 3 "})),
    ],
)
def test_k_is_found_wherever_it_was_said_and_the_header_wins(fields: dict[str, Any], headers: Headers) -> None:
    assert parse(fields, headers=headers).top_k == 3


def test_k_is_the_models_own_when_nobody_says_and_never_more_than_the_classes() -> None:
    assert parse({"body": PNG}).top_k == 5
    assert parse({"body": PNG, "top_k": b"1000"}).top_k == 10


@pytest.mark.parametrize("k", [b"0", b"-1", b"1.0", b"x", b"", "٣", "²", True, 1.0, [1], "9" * 30])
def test_a_wrong_k_is_400(k: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        parse({"body": PNG, "top_k": k})
    assert refused.value.status == 400


def test_headers_are_told_from_content_types_of_fields() -> None:
    assert not Headers.read({"data": {"content-type": "image/png"}}).http
    assert not Headers.read({"data": {"content-type": ""}, "ts_request_sequence_id": "a"}).http
    assert Headers.read({"data": {"content-type": ""}, "host": "x"}).http
    assert Headers.read({"describe": "True"}) == Headers(describe=True)
    assert Headers.read({"describe": "False", "explain": "False"}) == Headers()
    assert Headers.read({"Explain": "True"}).explain
    assert Headers.read({"CONTENT-type": "Application/X-WWW-form-urlencoded; charset=utf-8"}).form_encoded
    assert not Headers.read({"describe": {"content-type": "True"}}).describe


def test_a_form_encoded_body_is_told_what_to_type() -> None:
    with pytest.raises(BadRequest, match="curl -T") as refused:
        parse({"x": b""}, headers=Headers(http=True, form_encoded=True))
    assert refused.value.status == 415


@pytest.mark.parametrize("missing", ["age", "s6"])
def test_a_row_by_name_that_lacks_a_feature_says_which(missing: str) -> None:
    row = {name: 1 for name in zoo.FEATURES if name != missing}
    with pytest.raises(BadRequest, match=f"lacks {missing}"):
        arrays({"body": row}, DIABETES)


def test_an_npy_header_cannot_reserve_memory_or_name_objects() -> None:
    for name in ("npy-claims-terabytes", "npy-objects", "npy-truncated"):
        with pytest.raises(BadRequest) as refused:
            arrays({"body": zoo.ZOO[name].body})
        assert refused.value.status == 400


PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The machine that runs this may be busy with something else."""

KEYS = st.sampled_from([
    "data", "image", "b64", "body", "instances", "inputs", "parameters", "top_k", "id", "shape", "datatype", "outputs",
    "explain", "meta", "name", "x", *zoo.FEATURES,
])  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["BYTES", "FP32", "UINT8", "INT64", "BOOL", zoo.b64(PNG), 10**400, -(2**63), 2**64])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=11) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=24
)
TENSOR = st.fixed_dictionaries({
    "shape": st.lists(st.integers(-1, 17), max_size=6),
    "datatype": st.sampled_from(["BYTES", "FP16", "FP32", "FP64", "UINT8", "INT8", "UINT64", "INT64", "BOOL", "?"]),
    "data": st.lists(st.integers() | st.floats() | st.booleans() | st.text(max_size=3), max_size=20),
})  # fmt: skip
DOCUMENTS = (
    JSON | st.dictionaries(KEYS, JSON, max_size=5) | st.fixed_dictionaries({"inputs": st.lists(TENSOR, max_size=2)})
)
SPECS = st.sampled_from([DIGITS, DIABETES])


def attempt(fields: Any, headers: Headers, spec: Any) -> None:
    """Parsing and decoding end in arrays of the right shape or in a BadRequest with a reason; nothing else."""
    refused = None
    try:
        payload = payloads.parse(fields, headers, spec)
        found = [instances.array(instance, spec) for instance in payload.instances]
    except BadRequest as error:
        refused = error
    if refused:
        assert 400 <= refused.status <= 501
        assert 0 < len(refused.reason) < 700
        assert answers.encode(answers.refusal(refused))
        return
    assert 0 < len(found) <= spec.limits.max_instances
    assert 0 <= payload.top_k <= len(spec.classes)
    for array in found:
        assert array.shape == spec.input.shape
        assert array.dtype == (np.uint8 if spec is DIGITS else np.float32)
        assert np.isfinite(array).all()


@settings(parent=PATIENT, max_examples=600)
@given(DOCUMENTS, SPECS, st.booleans())
def test_any_json_is_understood_or_a_bad_request(document: Any, spec: Any, as_bytes: bool) -> None:
    body = json.dumps(document).encode() if as_bytes else document
    attempt({"body": body}, HTTP, spec)


@settings(parent=PATIENT, max_examples=300)
@given(
    st.binary(max_size=200) | st.text(max_size=100), st.sampled_from([b"", b"\x93NUMPY", b"{", b"[", b"GIF89a"]), SPECS
)
def test_any_bytes_are_understood_or_a_bad_request(body: bytes | str, start: bytes, spec: Any) -> None:
    attempt({"body": start.decode("latin-1") + body if isinstance(body, str) else start + body}, HTTP, spec)


@settings(parent=PATIENT, max_examples=300)
@given(
    st.dictionaries(KEYS, st.binary(max_size=12) | JSON, max_size=4),
    st.dictionaries(
        st.sampled_from(["X-Top-K", "Content-Type", "explain", "Host", "data"]), st.text(max_size=6) | JSON
    ),
    SPECS,
)
def test_any_fields_and_headers_are_understood_or_a_bad_request(fields: Any, headers: Any, spec: Any) -> None:
    attempt(fields, Headers.read(headers), spec)


@settings(parent=PATIENT, max_examples=300)
@given(
    st.integers(0, 200),
    st.integers(0, 255),
    st.sampled_from([PIXELS, PIXELS / 255, np.zeros((3, 1, 16, 16), np.uint8), np.float32(5), np.array(zoo.ROW)]),
    SPECS,
)
def test_a_damaged_npy_is_an_array_or_a_bad_request(place: int, value: int, values: Any, spec: Any) -> None:
    damaged = bytearray(zoo.npy(values))
    if place < len(damaged):
        damaged[place] = value
    attempt({"body": damaged}, HTTP, spec)
