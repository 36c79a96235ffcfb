"""From a handler's own capture into the store: what the net saw and said is what is learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers import bundle, capture, ending, images
from handlers.spec import ModelSpec
from marwright.feedback.store import Store
from tests import zoo
from tests.feedback import spools
from tests.feedback.spools import said
from tests.handlers import archives
from tests.handlers.conftest import handler_class
from tests.handlers.context import FakeContext, Sent

PNG = zoo.encoded(zoo.picture("L", (16, 16)))
COLOUR = zoo.encoded(zoo.picture("RGB", (40, 30)))
ASKED: dict[str, list[Any]] = {
    "digits": [
        {"data": PNG}, {"data": COLOUR}, {"data": {"instances": [{"b64": zoo.b64(PNG)}, {"b64": zoo.b64(COLOUR)}]}},
    ],
    "diabetes": [{"data": [0.25 * n for n in range(10)]}, {"data": {"instances": [[float(n)] * 10 for n in range(3)]}}],
}  # fmt: skip


@pytest.mark.parametrize("model", ["digits", "diabetes"])
def test_what_the_net_saw_and_said_is_in_the_store(
    model: str, unpacked: Any, threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_PERIOD", 3600.0)
    monkeypatch.setattr(ending, "_before_sigterm", lambda: None)
    monkeypatch.setenv("MARWRIGHT_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("MARWRIGHT_CAPTURE", "1")
    folder = unpacked(model, "eager")
    monkeypatch.setattr(bundle, "HOME", folder.resolve() / "handlers")
    context = FakeContext.at(folder, batch_size=8)
    handler = handler_class(model)()
    handler.initialize(context)
    saw: list[Any] = []
    infer = handler.inference
    handler.inference = lambda batch: (saw.append((batch.array.copy(), made := infer(batch))), made)[1]
    replies = context.ask(handler, [Sent(fields) for fields in ASKED[model]])
    assert all(reply.status == 200 for reply in replies)
    handler.recorder.close()
    ((arrays, outputs),) = saw
    spec: ModelSpec = archives.spec(model)
    with Store.open(tmp_path / "feedback") as store:
        taken = store.ingest(tmp_path / "spool")
        assert (taken.requests, taken.instances, taken.undecodable) == (len(replies), len(arrays), 0)
        rows = {(each.request, each.instance): each for each in store.answered(model)}
        spools.labels(
            tmp_path / "spool",
            [
                said(request, "zero" if spec.classes else 1, uid=f"{n}", instance=k)
                for n, (request, k) in enumerate(rows)
            ],
        )
        assert store.ingest(tmp_path / "spool").labels == len(arrays)
        assert len(store.labelled(model)) == len(arrays)
    output = np.asarray(outputs[spec.outputs[0]])
    found = {}
    for each in rows.values():
        assert each.path is not None
        body = each.path.read_bytes()
        picture = images.decode(body, spec.input, spec.limits) if spec.classes else np.float32(json.loads(body))
        said_so = each.probabilities if spec.classes else np.float32([each.value])
        found[np.asarray(picture).tobytes()] = np.asarray(said_so)
        assert each.embedding is not None
    assert len(found) == len({array.tobytes() for array in arrays})
    for array, row in zip(arrays, output, strict=True):
        assert found[array.tobytes()] == pytest.approx(row, abs=1e-6), "the very array, and its answer"
    if spec.classes:
        assert {each.answer for each in rows.values()} <= {spec.classes[int(row.argmax())] for row in output}
    assert context.manifest is not None
    assert {each.version for each in rows.values()} == {str(context.manifest["model"]["modelVersion"])}
