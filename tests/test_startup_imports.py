"""What is not needed at the start is not imported at the start: by a worker, and by commands that people wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK = ("stop", "token", "predict", "status", "releases", "watch", "rollback", "explain", "feedback", "exporter")
"""Commands that compute nothing of their own."""
HEAVY = {"torch", "scipy.stats", "sklearn", "river", "onnxruntime", "captum", "matplotlib", "pandas", "model_archiver"}


def last_line(script: str) -> str:
    """Of what a clean process prints that runs `script`."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def imported(script: str) -> set[str]:
    """The modules of a clean process in which `script` has run."""
    return set(last_line(f"{script}\nimport sys\nprint(*sys.modules)").split())


def test_a_worker_imports_nothing_that_only_other_workers_need() -> None:
    """TorchServe's own code imports torch and yaml before it looks for a handler."""
    ours = imported("import handlers.image_classifier") - imported("import torch, yaml")
    assert "handlers.base" in ours
    others = {
        "handlers.feedback_collector",
        "handlers.inbox",
        "handlers.labels",
        "PIL.ImageFilter",
        "PIL.PngImagePlugin",
    }
    assert not ours & (HEAVY | others)


def test_what_reads_requests_and_explanations_needs_no_torch() -> None:
    assert not imported("import handlers.capture, handlers.labels, handlers.overlay, handlers.spec") & HEAVY


def test_a_command_that_computes_nothing_imports_nothing_that_computes() -> None:
    script = (
        "import importlib, sys, scripts.__main__\n"
        "guilty = {}\n"
        f"for verb in {QUICK!r}:\n"
        "    importlib.import_module(f'scripts.{verb}')\n"
        f"    for name in {HEAVY!r} & set(sys.modules):\n"
        "        guilty.setdefault(name, verb)\n"
        "print(len([name for name in sys.modules if name.startswith('scripts.')]), guilty)"
    )
    count, _, guilty = last_line(script).partition(" ")
    assert int(count) > len(QUICK)
    assert guilty == "{}", "which module came with which command"


def test_help_imports_none_of_the_commands() -> None:
    found = imported("from scripts.__main__ import main\nassert main(['--help']) == 0")
    assert not {name for name in found if name.startswith("scripts.")} - {"scripts.__main__"}
    assert not found & (HEAVY | {"numpy", "grpc", "sqlalchemy", "pydantic"})
