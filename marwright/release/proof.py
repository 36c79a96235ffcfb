"""Proof that a version which should be answering is the one that does.

    proof.prove(client, record, golden.read(store / record.file))

Asked at the pinned URL, so that it can be had before and after a version becomes the default.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from marwright.errors import IdentityMismatch, NotReady
from marwright.packing import golden
from marwright.packing.golden import Golden
from marwright.packing.records import ArchiveRecord
from marwright.release.answers import Answer
from marwright.release.client import Client


@dataclass(frozen=True)
class Proof:
    """What was seen of one version: its identity, its golden answers, and how long they took."""

    model: str
    version: str
    bundle: str
    examples: int
    seconds: float
    """Median of one golden request over REST."""
    first: tuple[str, float]
    """What the first golden example was answered: the best label and its probability, or the target and its value."""


def prove(client: Client, record: ArchiveRecord, examples: Sequence[Golden], *, pinned: bool = True) -> Proof:
    """READY workers, the right bundle, and right golden answers over REST and gRPC.

    NotReady where workers lack or answers are wrong; IdentityMismatch where another bundle or version answers.
    """
    version = record.version if pinned else None
    status = client.describe(record.model, version, customized=True)[0]
    if status.ready_workers < record.workers:
        raise NotReady(
            f"{record.model} {record.version} has {status.ready_workers} of {record.workers} workers ready",
            hint="logs/model_log.log has the workers' own words",
        )
    _same(record, str((status.customized or {}).get("bundle")), status.version)
    captures = "capture" in (status.customized or {})  # a version from before that takes the field for a second input
    seconds, rest, grpc = [], [], []
    labels = str(max(len(example.answer) for example in examples))
    for example in examples:
        kind = "application/json" if example.kind == "json" else "application/octet-stream"
        began = time.perf_counter()
        answer = client.predict(
            record.model,
            example.body,
            version=version,
            headers={"X-Top-K": labels},
            content_type=kind,
            capture=False,
        )
        seconds.append(time.perf_counter() - began)
        rest.append(_checked(record, answer))
        fields: dict[str, bytes | str] = {"data": example.body, "top_k": labels}
        grpc.append(_checked(record, client.predict_grpc(record.model, fields, version=version, capture=not captures)))
    for way, answers in (("REST", rest), ("gRPC", grpc)):
        wrong = golden.differences(examples, answers)
        if wrong:
            raise NotReady(
                f"{record.model} {record.version} answers {len(wrong)} of {len(examples)} golden examples wrongly"
                f" over {way}",
                last_words="\n".join(wrong[:5]),
            )
    first = next(iter(rest[0].items()))
    return Proof(record.model, record.version, record.bundle, len(examples), sorted(seconds)[len(seconds) // 2], first)


def _checked(record: ArchiveRecord, answer: Answer) -> dict[str, float]:
    _same(record, str(answer.bundle), str(answer.version))
    value: dict[str, float] = json.loads(answer.body)
    return value


def _same(record: ArchiveRecord, bundle: str, version: str) -> None:
    if (version, bundle) != (record.version, record.bundle):
        raise IdentityMismatch(
            f"another {record.model} answers",
            expected=f"{record.version} (bundle {record.bundle})",
            serving=f"{version} (bundle {bundle})",
            hint="`make stop && make serve` starts the released version",
        )
