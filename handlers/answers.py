"""The artifact's outputs → one JSON body for each request, in the form in which it was asked.

    answers.body(payload, {"probabilities": rows}, spec, model="digits", version="1.0")

| form      | classification                                   | regression                     |
|-----------|--------------------------------------------------|--------------------------------|
| stock     | `{label: probability}`, best first               | `{target: value}`              |
| list      | a list of those, one for each instance           | the same                       |
| kserve-v1 | `{"predictions": [{label: probability}, …]}`     | `{"predictions": [value, …]}`  |
| kserve-v2 | `labels` BYTES and `probabilities` FP32, [N, k]  | the target's name, FP32 [N, 1] |

In v2 `labels[n][i]` belongs to `probabilities[n][i]`, best first. A v2 request may name the outputs that it wants;
`embedding` (FP32 [N, D]) is given to who asks for it by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers import kserve
from handlers.errors import BadRequest
from handlers.payloads import Payload
from handlers.spec import ModelSpec

Outputs = Mapping[str, NDArray[Any]]


def answer(payload: Payload, outputs: Outputs, spec: ModelSpec, *, model: str, version: str) -> Any:
    """What to send, as JSON-ready values. `BadRequest` 500 where the model gave NaN or infinity."""
    first = outputs[spec.outputs[0]]
    if not np.isfinite(first).all():
        raise BadRequest(500, "the model gave no finite answer to this input")
    if payload.form == "kserve-v2":
        return _kserve_v2(payload, outputs, spec, model, version)
    if spec.task == "regression":
        values = first[:, 0].tolist()
        if payload.form == "kserve-v1":
            return {"predictions": values}
        rows = [{spec.target: value} for value in values]
    else:
        indices, probabilities = best(first, payload.top_k)
        rows = [
            {spec.classes[index]: value for index, value in zip(*pair, strict=True)}
            for pair in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]
        if payload.form == "kserve-v1":
            return {"predictions": rows}
    return rows[0] if payload.form == "stock" else rows


def best(probabilities: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Indices and probabilities of the k most probable classes, N×k each, best first; of equals the lower index."""
    indices = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return indices, np.take_along_axis(probabilities, indices, axis=1)


def encode(value: Any) -> bytes:
    """Compact JSON, never with NaN in it. Half of a surrogate pair, echoed from a request, is escaped."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def refusal(error: BadRequest) -> dict[str, Any]:
    """The body of a request that was refused."""
    return {"code": error.status, "reason": error.reason}


def _kserve_v2(payload: Payload, outputs: Outputs, spec: ModelSpec, model: str, version: str) -> dict[str, Any]:
    first = outputs[spec.outputs[0]]
    if spec.task == "regression":
        tensors = [kserve.tensor(spec.target, first)]
    else:
        indices, probabilities = best(first, payload.top_k)
        labels = [spec.classes[index] for index in indices.ravel().tolist()]
        tensors = [kserve.strings("labels", indices.shape, labels), kserve.tensor("probabilities", probabilities)]
    if "embedding" in payload.outputs:
        if not np.isfinite(outputs["embedding"]).all():
            raise BadRequest(500, "the model gave no finite embedding for this input")
        tensors.append(kserve.tensor("embedding", outputs["embedding"]))
    by_name = {tensor["name"]: tensor for tensor in tensors}
    chosen = [by_name[name] for name in payload.outputs] or tensors
    identity = {"model_name": model, "model_version": version}
    return {**identity, **({} if payload.identifier is None else {"id": payload.identifier}), "outputs": chosen}
