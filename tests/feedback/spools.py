"""Spools as workers and the collector leave them, of made-up requests: what is in them is known."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from handlers import spool
from handlers.spec import ModelSpec
from tests.handlers import archives

DIGITS = archives.spec("digits")
DIABETES = archives.spec("diabetes")
DIMENSIONS = 4


@dataclass(frozen=True)
class Asked:
    """One request. Its pictures (or rows) and its answers follow from its id."""

    id: str
    time: float = 1000.0
    rows: int = 1
    body: bool = True
    spec: ModelSpec = DIGITS

    def instance(self, number: int) -> Any:
        """uint8 16×16, or ten floats."""
        random = np.random.default_rng(list(f"{self.id}/{number}".encode()))
        if self.spec.task == "regression":
            return random.normal(size=10).astype(np.float32)
        return random.integers(0, 256, (16, 16), np.uint8)

    def output(self, number: int) -> Any:
        """Ten probabilities, or a value."""
        random = np.random.default_rng(list(f"answer {self.id}/{number}".encode()))
        if self.spec.task == "regression":
            return random.normal(150, 50, 1).astype(np.float32)
        return random.dirichlet(np.ones(10)).astype(np.float32)

    def answer(self, number: int = 0) -> str:
        return self.spec.classes[int(self.output(number).argmax())] if self.spec.classes else ""

    @property
    def sent(self) -> tuple[dict[str, Any], bytes]:
        """What the frame says of the body, and the body: a PNG, or JSON of several instances or rows."""
        if self.rows == 1 and self.spec.classes:
            return {"type": "image/png"}, png(self.instance(0))
        given = [self.instance(number).tolist() for number in range(self.rows)]
        return {"type": "application/json", "form": "json"}, json.dumps({"instances": given}).encode()


def png(picture: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def frame(asked: Sequence[Asked]) -> tuple[dict[str, Any], bytes]:
    """One batch: header and payload."""
    payload, heads = b"", []
    for one in asked:
        about, body = one.sent
        head = {"id": one.id, "rows": one.rows, "sha256": hashlib.sha256(body).hexdigest(), "http": True, **about}
        heads.append({**head, "body": [len(payload), len(body)] if one.body else None})
        payload += body if one.body else b""
    numbered = [(one, number) for one in asked for number in range(one.rows)]
    output = np.stack([one.output(number) for one, number in numbered])
    embedding = np.stack([np.full(DIMENSIONS, number, np.float16) for _, number in numbered])
    outputs = {}
    for name, array in ((asked[0].spec.outputs[0], output), ("embedding", embedding)):
        outputs[name] = [len(payload), *array.shape, array.dtype.name]
        payload += array.tobytes()
    return {"time": asked[0].time, "requests": heads, "outputs": outputs}, payload


def requests(
    folder: Path, *batches: Sequence[Asked], model: str = "digits", version: str = "1.0", finish: bool = True
) -> spool.Writer:
    """A segment with a frame for each batch."""
    spec = batches[0][0].spec
    head = {"v": 1, "model": model, "version": version, "bundle": "b" * 16, "spec": json.loads(spec.to_json())}
    writer = spool.Writer(folder, "requests", head)
    for batch in batches:
        writer.append(*frame(batch))
    if finish:
        writer.close()
    return writer


def said(
    request: str, label: object, *, uid: str, instance: int = 0, source: str = "api", time: float | None = None
) -> dict[str, Any]:
    """One label, as the collector writes it."""
    return {"uid": uid, "request": request, "instance": instance, "label": label, "source": source, "time": time}


def labels(
    folder: Path, *frames: Sequence[dict[str, Any]], received: float = 2000.0, finish: bool = True
) -> spool.Writer:
    """A segment with a frame for each list of labels."""
    writer = spool.Writer(folder, "labels", {"v": 1, "collector": "1.0"})
    for some in frames:
        writer.append({"received": received, "labels": list(some)})
    if finish:
        writer.close()
    return writer
