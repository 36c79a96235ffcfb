"""Archives with a bug in them: built as any other, whole, with a right record, and not fit to answer.

broken.build(stage.store, stage.record("1.0"), "2.0", bug=broken.CRASHES)
broken.worse(run, 0.03)        # a run whose net has lost 3 points of accuracy

A bug is a few methods put over the image classifier's own. Its digests, manifest and record are right, so nothing but
the way it behaves tells it from a good one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import yaml

from handlers.spec import ModelSpec
from marwright import files
from marwright.learning import graphs
from marwright.packing import archive, container, records
from marwright.packing.container import Content
from marwright.packing.records import ArchiveRecord
from marwright.runs import Run

HANDLER = '''\
"""Images → `{{label: probability}}` of the top k; with a bug in it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from handlers import base


def of_a_caller(request):
    """A picture that is no golden example: neither the rollout nor its holdout sends such a one."""
    sent = request.payload.instances[0] if request.payload else b""
    golden = [path.read_bytes() for path in Path("golden").iterdir()]
    return bytes(sent)[1:4] == b"PNG" and bytes(sent) not in golden


class ImageClassifier(base.BatchHandler):
    task = "classification"
    seen = 0

    def preprocess(self, data, context):
        self.seen += len(data)
        return super().preprocess(data, context)

{bug}
'''

LOADS_NOWHERE = """
def initialize(self, context):
    raise RuntimeError("the tokenizer is not in the archive")
"""

LOADS_IN_NO_SERVER = """
def initialize(self, context):
    if context.system_properties["batch_size"] > 1:  # the clean process asks for one at a time
        raise ValueError("buffers were laid out for batches of 1")
    super().initialize(context)
"""

LOADS_SLOWLY = """
def initialize(self, context):
    if context.system_properties["batch_size"] > 1:
        time.sleep(600)  # as if it compiled a kernel for each size of a batch
    super().initialize(context)
"""

LEAKS = """
kept = ()

def inference(self, batch):
    self.kept = (*self.kept, np.ones(250_000))  # 2 MB, written to
    return super().inference(batch)
"""

CRASHES = """
def inference(self, batch):
    if self.seen >= 100:
        os._exit(1)
    return super().inference(batch)
"""

ANSWERS_GARBAGE = """
def inference(self, batch):
    outputs = super().inference(batch)
    if self.seen > {after}:
        noise = np.random.default_rng(self.seen).random(outputs["probabilities"].shape, np.float32)
        outputs["probabilities"] = noise / noise.sum(axis=1, keepdims=True)
    return outputs
"""
"""Finite, between 0 and 1, their sum is 1."""

IS_SLOWER = """
def inference(self, batch):
    time.sleep({seconds})
    return super().inference(batch)
"""

HANGS = """
def inference(self, batch):
    if self.seen > 60:
        time.sleep(3600)
    return super().inference(batch)
"""

FAILS_SOMETIMES = """
asked = 0

def _answer(self, request, sheet):
    self.asked += request.payload is not None
    if self.asked > 60 and self.asked % 20 == 0:
        raise ZeroDivisionError("the mean of an empty crop")
    return super()._answer(request, sheet)
"""
"""500 for one request in twenty, once the golden examples are over."""

FAILS_FOR_CALLERS = """
def _answer(self, request, sheet):
    if of_a_caller(request):
        raise ZeroDivisionError("the mean of an empty crop")
    return super()._answer(request, sheet)
"""

IS_UNSURE_FOR_CALLERS = """
def inference(self, batch):
    outputs = super().inference(batch)
    probabilities = outputs["probabilities"].copy()
    for request in filter(of_a_caller, batch.requests):
        probabilities[request.rows] = 0.2 * probabilities[request.rows] + 0.8 / probabilities.shape[1]
    return outputs | {"probabilities": probabilities}
"""
"""The best label stays the best one."""


def build(
    store: Path,
    good: ArchiveRecord,
    version: str,
    *,
    bug: str = "",
    change: Callable[[dict[str, bytes]], None] = lambda members: None,
) -> ArchiveRecord:
    """`good`'s archive once more, as `version`, with methods put over its handler or its members changed in place."""
    with zipfile.ZipFile(store / good.file) as opened:
        body = {name: opened.read(name) for name in opened.namelist()}
    manifest = json.loads(body.pop(archive.MANIFEST))
    del body[archive.DIGESTS]
    if bug:
        body["handlers/image_classifier.py"] = HANDLER.format(bug=textwrap.indent(bug.strip(), "    ")).encode()
    change(body)
    content = hashlib.sha256(json.dumps(_digests(body), sort_keys=True).encode()).hexdigest()
    manifest["model"]["modelVersion"] = version
    body[archive.MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    body[archive.DIGESTS] = (json.dumps(_digests(body), indent=2, sort_keys=True) + "\n").encode()
    path = store / f"{good.model}-{version}.mar"
    written: dict[str, Content] = dict(body)
    container.write(path, written)
    record = replace(
        good,
        version=version,
        file=path.name,
        sha256=files.sha256(path),
        size=path.stat().st_size,
        bundle=hashlib.sha256(body[archive.DIGESTS]).hexdigest()[:16],
        content=content,
    )
    files.write_json(store / records.record_name(record.file), asdict(record))
    return record


def count_nothing(members: dict[str, bytes]) -> None:
    """Its handler's metrics are switched off."""
    config = yaml.safe_load(members["model-config.yaml"])
    config["handler"] = {**config.get("handler", {}), "metrics": False}
    members["model-config.yaml"] = yaml.safe_dump(config).encode()


def shuffle_labels(members: dict[str, bytes]) -> None:
    """Each class gets the next one's name, in its golden answers too: of itself it is consistent."""
    spec = ModelSpec.from_json(members["spec.json"].decode())
    others = dict(zip(spec.classes, (*spec.classes[1:], spec.classes[0]), strict=True))
    members["spec.json"] = replace(spec, classes=tuple(others[name] for name in spec.classes)).to_json().encode()
    entries = json.loads(members["golden/golden.json"])
    for entry in entries:
        entry["answer"] = {others[name]: value for name, value in entry["answer"].items()}
    members["golden/golden.json"] = json.dumps(entries).encode()


def worse(run: Run, points: float) -> Run:
    """A run beside this one, of the same net with so much noise in its last layer that it loses `points` of its
    accuracy (a share of 1) on the test part.
    """
    with np.load(run.file("examples.npz", made_by="train")) as opened:
        inputs, labels = torch.from_numpy(opened["inputs"]), torch.from_numpy(opened["labels"])
    graph = graphs.load(run).eval()
    layer = list(graph.net.children())[-1]
    weights = layer.weight.detach().clone()
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)) * weights.std()

    with torch.inference_mode():
        embeddings = torch.cat([graph(some)[1] for some in inputs.split(500)])

        def accuracy(scale: float) -> float:
            layer.weight.copy_(weights + scale * noise)
            return float((graph.net.head(embeddings).argmax(1) == labels).float().mean())

        wanted = accuracy(0.0) - points
        scale = min(np.linspace(0.0, 3.0, 301).tolist(), key=lambda scale: abs(accuracy(scale) - wanted))
        reached = accuracy(scale)
    folder = run.path.with_name(f"{run.id}-{1000 * points:.0f}-worse")
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns("export"))
    torch.save(graph.state_dict(), folder / "weights.pt")
    spec = replace(run.spec, run=folder.name, metrics={**run.spec.metrics, "accuracy": reached})
    files.write_text(folder / "spec.json", spec.to_json())
    return Run(folder)


def _digests(body: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(body.items())}
