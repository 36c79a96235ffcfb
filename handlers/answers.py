"""The artifact's outputs → one JSON body for each request, in the form in which it was asked.

    sheet = Sheet.of({"probabilities": rows}, spec, k=5)
    answers.encode(answers.answer(payload, sheet, slice(0, 1), spec, model="digits", version="1.0"))

| form      | classification                                   | regression                     |
|-----------|--------------------------------------------------|--------------------------------|
| stock     | `{label: probability}`, best first               | `{target: value}`              |
| list      | a list of those, one for each instance           | the same                       |
| kserve-v1 | `{"predictions": [{label: probability}, …]}`     | `{"predictions": [value, …]}`  |
| kserve-v2 | `labels` BYTES and `probabilities` FP32, [N, k]  | the target's name, FP32 [N, 1] |

In v2 `labels[n][i]` belongs to `probabilities[n][i]`, best first. A v2 request may name the outputs that it wants;
`embedding` (FP32 [N, D]) is given to who asks for it by name.

An explanation is one JSON object (`explained` says what is in it), a PNG, or the bytes of a `.npy` file. KServe's forms
hold it as the only one in `"explanations"`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers import kserve, overlay
from handlers.errors import BadRequest
from handlers.explanations import Explanation
from handlers.payloads import Payload
from handlers.spec import ModelSpec, VectorInput

Outputs = Mapping[str, NDArray[Any]]

JSON = "application/json"
CONTENT_TYPES = {"json": JSON, "png": "image/png", "npy": "application/octet-stream"}
"""Of an explanation, by its format."""

LARGEST = 20_000_000
"""Bytes of one answer. The server's `max_response_size` (config.properties) must be above it: an answer that is longer
than that kills the worker, and with it the whole batch."""

_fast: Callable[[Any], bytes] | None = None
with contextlib.suppress(ImportError):
    from orjson import dumps as _fast  # a fifth of the time; the same values without it

_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Sheet:
    """A batch's outputs as plain values, ranked once for all of its requests. One entry for each row."""

    labels: list[list[str]]
    """Best first; of equals the class that comes first. Empty lists for regression."""
    values: list[list[float]]
    """The labels' probabilities, or the one value."""
    finite: list[bool]
    embedding: NDArray[Any] | None

    @classmethod
    def of(cls, outputs: Outputs, spec: ModelSpec, k: int) -> Sheet:
        """The `k` best of each row."""
        first = outputs[spec.outputs[0]]
        finite: list[bool] = np.logical_and.reduce(np.isfinite(first), axis=1).tolist()
        embedding = outputs.get("embedding")
        if spec.task == "regression":
            return cls([[]] * len(first), first.tolist(), finite, embedding)
        order = np.argsort(-first, axis=1, kind="stable")[:, :k]
        labels = [[spec.classes[index] for index in row] for row in order.tolist()]
        return cls(labels, np.take_along_axis(first, order, axis=1).tolist(), finite, embedding)


def answer(payload: Payload, sheet: Sheet, rows: slice, spec: ModelSpec, *, model: str, version: str) -> Any:
    """What to send, as JSON-ready values. `BadRequest` 500 where the model gave NaN or infinity."""
    if payload.form == "stock" and spec.task == "classification" and sheet.finite[rows.start]:
        best, k = rows.start, payload.top_k
        return dict(zip(sheet.labels[best][:k], sheet.values[best][:k], strict=True))
    if not all(sheet.finite[rows]):
        raise BadRequest(500, "the model gave no finite answer to this input")
    values = sheet.values[rows]
    if payload.form == "kserve-v2":
        return _kserve_v2(payload, sheet, rows, spec, model, version)
    if spec.task == "regression":
        if payload.form == "kserve-v1":
            return {"predictions": [value for row in values for value in row]}
        answers = [{spec.target: row[0]} for row in values]
    else:
        k = payload.top_k
        answers = [
            dict(zip(names[:k], row[:k], strict=True)) for names, row in zip(sheet.labels[rows], values, strict=True)
        ]
        if payload.form == "kserve-v1":
            return {"predictions": answers}
    return answers[0] if payload.form == "stock" else answers


def explained(
    explanation: Explanation, payload: Payload, sheet: Sheet, rows: slice, spec: ModelSpec, *, model: str, version: str
) -> Any:
    """Why, beside what: bytes of a PNG or a `.npy` file, or JSON-ready values.

    Of a picture: method, target (label and index), the top k, and the attributions as H×W, channels summed, in logits.
    Of a row: the same with the one value, and an attribution for each feature, in the target's units (slopes: for each
    standard deviation of the feature). Where they apply: baseline, a row's value there, steps, and the completeness
    delta of integrated gradients. `BadRequest` 500 where the model gave NaN or infinity.
    """
    ask, found = explanation.ask, explanation.attributions
    prediction = answer(payload._replace(form="stock"), sheet, rows, spec, model=model, version=version)
    if ask.format == "npy":
        stream = io.BytesIO()
        np.save(stream, found)
        return stream.getvalue()
    if ask.format == "png":
        return overlay.png(explanation.row, found)
    regression = spec.task == "regression"
    label = spec.target if regression else spec.classes[explanation.target]
    document: dict[str, Any] = {
        "method": ask.method,
        "target": {"label": label} if regression else {"label": label, "index": explanation.target},
        "output": "value" if regression else "logit",
        "prediction": prediction[spec.target] if regression else prediction,
    }
    if ask.baseline:
        document["baseline"] = ask.baseline
        if regression:
            document["baseline_prediction"] = explanation.baseline_output
    if ask.steps is not None:
        document["steps"] = ask.steps
    if explanation.delta is not None:
        document["completeness_delta"] = explanation.delta
    if isinstance(spec.input, VectorInput):
        document["attributions"] = dict(zip(spec.input.features, found.tolist(), strict=True))
    else:
        summed = found.sum(axis=0)
        document |= {"shape": list(summed.shape), "attributions": summed.tolist()}
    if not payload.form.startswith("kserve"):
        return document
    return {**_identity(payload, model, version), "explanations": [document]}


def encode(value: Any, *, finite: bool = False) -> bytes:
    """Compact JSON, never with NaN in it. Half of a surrogate pair, echoed from a request, is escaped.

    With orjson (where it is installed) for what is known to be `finite`: it would write NaN as null.
    """
    if finite and _fast is not None:
        try:
            return _fast(value)
        except TypeError:  # half of a surrogate pair, for one
            pass
    try:
        return _JSON.encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def refusal(error: BadRequest) -> dict[str, Any]:
    """The body of a request that was refused."""
    return {"code": error.status, "reason": error.reason}


def _kserve_v2(
    payload: Payload, sheet: Sheet, rows: slice, spec: ModelSpec, model: str, version: str
) -> dict[str, Any]:
    count = rows.stop - rows.start
    width = payload.top_k if spec.task == "classification" else 1
    values = [value for row in sheet.values[rows] for value in row[:width]]
    if spec.task == "classification":
        labels = [label for row in sheet.labels[rows] for label in row[:width]]
        tensors = [
            kserve.tensor("labels", "BYTES", (count, width), labels),
            kserve.tensor("probabilities", "FP32", (count, width), values),
        ]
    else:
        tensors = [kserve.tensor(spec.target, "FP32", (count, width), values)]
    by_name = {tensor["name"]: tensor for tensor in tensors}
    if "embedding" in payload.outputs and sheet.embedding is not None:
        embedding = sheet.embedding[rows]
        if not np.isfinite(embedding).all():
            raise BadRequest(500, "the model gave no finite embedding for this input")
        by_name["embedding"] = kserve.tensor("embedding", "FP32", embedding.shape, embedding.ravel().tolist())
    chosen = [by_name[name] for name in payload.outputs] or tensors
    return {**_identity(payload, model, version), "outputs": chosen}


def _identity(payload: Payload, model: str, version: str) -> dict[str, str]:
    """What KServe's answers begin with."""
    said = {"model_name": model, "model_version": version}
    return said if payload.identifier is None else {**said, "id": payload.identifier}
