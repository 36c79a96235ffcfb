"""Load an archive in a clean process and replay its golden examples.

    replay.prove(Path("digits-1.0.mar"))        # ArchiveInvalid where it does not load or answers otherwise

The process sees the unpacked archive first on its path, as a TorchServe worker does, and gets every golden example in
one batch through the handler's own `handle`. TorchServe itself is not in it; tests/test_worker_contract.py holds the
stand-in against the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from marwright.errors import ArchiveInvalid
from marwright.packing import clean_worker, container, golden

SECONDS = 120.0


def prove(path: Path) -> None:
    """The archive loads and its golden answers are right; ArchiveInvalid lists what is not."""
    with tempfile.TemporaryDirectory(prefix="marwright-") as name:
        folder = Path(name)
        container.unpack(path, folder)
        answers = _ask(path.name, folder)
        wrong = golden.differences(golden.read(folder), answers)
        if wrong:
            raise ArchiveInvalid(f"{path.name} answers its golden examples wrongly", wrong)


def _ask(name: str, folder: Path) -> list[dict[str, float]]:
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
    answers: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return answers
