"""Load an archive in a clean process and replay its golden examples.

    replay.prove(Path("digits-1.0.mar"))        # ArchiveInvalid where it does not load or answers otherwise

The process sees the unpacked archive first on its path, as a TorchServe worker does, and gets every golden example in
one batch through the handler's own `handle`; an archive with a twin explains the first one, too, by every method that
it offers. TorchServe itself is not in it; tests/test_worker_contract.py holds the
stand-in against the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handlers.spec import ImageInput, ModelSpec
from marwright.errors import ArchiveInvalid
from marwright.packing import clean_worker, container, golden
from marwright.packing.golden import Golden

SECONDS = 120.0
LEFT_OVER = 0.05
"""Allowed completeness delta of integrated gradients, as a share of the sum of the attributions' sizes."""


def prove(path: Path) -> None:
    """The archive loads and its golden answers are right; ArchiveInvalid lists what is not."""
    with tempfile.TemporaryDirectory(prefix="marwright-") as name:
        folder = Path(name)
        container.unpack(path, folder)
        said, examples = _ask(path.name, folder), golden.read(folder)
        wrong = golden.differences(examples, said["answers"])
        if wrong:
            raise ArchiveInvalid(f"{path.name} answers its golden examples wrongly", wrong)
        if not (folder / "spec.json").is_file():  # the collector of labels has no net
            return
        spec = golden.spec(folder)
        if spec.twin:
            wrong = unexplained(said["explanations"], examples[0], spec)
            if wrong:
                raise ArchiveInvalid(f"{path.name} cannot explain its answers", wrong)


def unexplained(explanations: Mapping[str, Any], example: Golden, spec: ModelSpec) -> list[str]:
    """What is wrong with the explanations of one golden example, by method; empty when all are right.

    Each is of the right size and finite, comes with the golden answer, and integrated gradients add up.
    """
    wrong = [] if explanations else ["no method is offered"]
    for method, said in explanations.items():
        if "reason" in said:
            wrong.append(f"{method}: {said['reason']}")
            continue
        given, prediction = said["attributions"], said["prediction"]
        shape: tuple[int, ...] = spec.input.shape
        if isinstance(spec.input, ImageInput):
            shape = shape[1:]
        else:
            given, prediction = [given.get(name) for name in spec.input.features], {spec.target: prediction}
        numbers = np.asarray(given, dtype=float)
        if numbers.shape != shape or not np.isfinite(numbers).all():
            wrong.append(f"{method}: attributions of shape {list(numbers.shape)}; expected {list(shape)}, all finite")
            continue
        left_over = abs(said.get("completeness_delta", 0.0))
        if not left_over <= LEFT_OVER * np.abs(numbers).sum() + 1e-6:
            wrong.append(f"{method}: the attributions miss what they should add up to by {left_over:.3g}")
        wrong += [f"{method}: {line}" for line in golden.differences([example], [prediction])]
    return wrong


def _ask(name: str, folder: Path) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MARWRIGHT_")}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", clean_worker.__file__, str(folder)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ArchiveInvalid(f"{name} does not load", [f"no answer from a clean process in {SECONDS:.0f} s"]) from None
    if done.returncode:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-3:]
        raise ArchiveInvalid(f"{name} does not load in a clean process", last or [f"exit code {done.returncode}"])
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said
