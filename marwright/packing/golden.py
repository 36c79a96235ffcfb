"""Golden examples: real requests with their right answers, packed in every archive.

    golden/golden.json    [{"file": "00.png", "kind": "image", "label": "7", "answer": {"7": 0.98, …}}, …]
    golden/00.png         the request's body, as a client would send it

The answers are the eager net's, over the body decoded by the handlers' own code. Whoever replays them, a clean process
or a live server, compares with `differences`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from handlers.spec import ImageInput, ModelSpec
from marwright import files
from marwright.errors import ArchiveError
from marwright.runs import Run

TOLERANCE = 1e-3
"""Allowed |Δ| of a probability, or relative to a regressor's value: ten times what export allows, for other CPUs."""

LEAST = 16


@dataclass(frozen=True)
class Golden:
    """One request body and its answer: {label: probability} or {target: value}."""

    name: str
    body: bytes
    kind: str
    answer: Mapping[str, float]


def members(run: Run, spec: ModelSpec) -> dict[str, bytes]:
    """The run's golden bodies and the eager net's answers, by path in the archive. ArchiveError: too few of them."""
    import torch  # not at the top: whoever only replays needs no torch

    from marwright.learning import graphs

    folder = run.file("golden", made_by="train")
    entries: list[dict[str, Any]] = files.read_json(folder / "golden.json")
    if len(entries) < LEAST:
        raise ArchiveError(
            f"run {run.id} has {len(entries)} golden examples, an archive wants {LEAST}",
            hint="train on more examples",
        )
    bodies = {entry["file"]: (folder / entry["file"]).read_bytes() for entry in entries}
    inputs = np.stack([decode(bodies[entry["file"]], spec) for entry in entries])
    with torch.inference_mode():
        outputs = graphs.load(run).eval()(torch.from_numpy(inputs))[0].numpy()
    for entry, output in zip(entries, outputs, strict=True):
        names = spec.classes if spec.task == "classification" else (spec.target,)
        entry["answer"] = {name: round(float(value), 6) for name, value in zip(names, output, strict=True)}
    found = {f"golden/{name}": body for name, body in bodies.items()}
    found["golden/golden.json"] = (json.dumps(entries, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    return found


def decode(body: bytes, spec: ModelSpec) -> np.ndarray:
    """A body as the artifact takes it: uint8 C×H×W, or float32 F."""
    if isinstance(spec.input, ImageInput):
        from handlers import images

        return images.decode(body, spec.input, spec.limits)
    return np.asarray(json.loads(body), dtype=np.float32)


def read(path: Path) -> tuple[Golden, ...]:
    """The golden examples of an archive (a `.mar`, or the folder it was unpacked into). ArchiveError: there is none."""
    folder = _root(path) / "golden"
    entries = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return tuple(
        Golden(entry["file"], (folder / entry["file"]).read_bytes(), entry["kind"], entry["answer"])
        for entry in entries
    )


def spec(path: Path) -> ModelSpec:
    """`spec.json` of an archive (a `.mar`, or the folder it was unpacked into). ArchiveError: there is none."""
    return ModelSpec.from_json((_root(path) / "spec.json").read_text(encoding="utf-8"))


def _root(path: Path) -> zipfile.Path | Path:
    if path.is_dir():
        return path
    try:
        return zipfile.Path(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"{path} cannot be read: {error}", hint="put the built file back") from None


def differences(golden: Sequence[Golden], answers: Sequence[Mapping[str, float]]) -> list[str]:
    """What is wrong with the answers, a line each; empty when all are right.

    An answer may hold the top k labels only; its first label must be the golden one unless the two best were closer
    than the tolerance.
    """
    wrong = []
    for expected, answer in zip(golden, answers, strict=True):
        if not answer:
            wrong.append(f"{expected.name}: no answer")
            continue
        strange = sorted(set(answer) - set(expected.answer))
        if strange:
            wrong.append(f"{expected.name}: unknown label {strange[0]!r}")
            continue
        gaps = {name: abs(value - expected.answer[name]) for name, value in answer.items()}
        worst = max(gaps, key=lambda name: gaps[name])
        allowed = TOLERANCE * max(1.0, abs(expected.answer[worst]))
        if not gaps[worst] <= allowed:
            right, got = expected.answer[worst], answer[worst]
            wrong.append(f"{expected.name}: {worst} is {got:.6g}, should be {right:.6g} (± {allowed:.1g})")
            continue
        first, best = next(iter(answer)), max(expected.answer.values())
        if best - expected.answer[first] > allowed:
            wrong.append(f"{expected.name}: answered {first!r} first")
    return wrong
