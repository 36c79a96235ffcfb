"""What a run was made of, and the name that follows from it.

provenance.run_id(recipe, dataset)         # "digits-3f2a9c0d41b7"
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import handlers
from marwright import files
from marwright.learning import methods, transfer
from marwright.learning.dataset import Dataset
from marwright.learning.methods import Method
from marwright.learning.recipe import Recipe
from marwright.runs import Run

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "deflate", "pyspng", "simplejpeg", "scikit-learn")
HERE = Path(__file__).parent
HANDLERS = Path(handlers.__file__).parent


def run_id(recipe: Recipe, dataset: Dataset, start: Run | None = None, method: Method | None = None) -> str:
    """`<recipe>-<12 hex digits>` of the resolved recipe, the data, the code, the weights of `start` and the method,
    unless that learns from everything as ever. Where the data lies does not matter."""
    # What was skipped follows from the serving limits too, which are not in the recipe's digest.
    digests: list[Any] = [recipe_digest(recipe), dataset.digest, code_digest(), *dataset.split.get("skipped", ())]
    start = methods.start_of(method, start)
    if start is not None:
        digests.append({"start": files.sha256(start.weights)})
    if method is not None and not method.everything:
        digests.append({"method": asdict(method)})
    return f"{recipe.name}-{hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]}"


def recipe_digest(recipe: Recipe) -> str:
    """sha256 of every key that can change the weights; a local weights file counts by its content."""
    document = recipe.to_dict()
    document.pop("serving")
    document.pop("description")
    document["data"].pop("path")
    document["data"].pop("memory_limit")
    weights = recipe.net.weights
    if weights not in (None, transfer.DOWNLOAD):
        path = Path(str(weights)).expanduser()
        document["net"]["weights"] = files.sha256(path) if path.is_file() else weights
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def code_digest() -> str:
    """sha256 of the nets, the decoder and this room: what turns data and a recipe into weights."""
    sources = [HANDLERS / "nets.py", HANDLERS / "images.py", HANDLERS / "turbo.py", *sorted(HERE.glob("*.py"))]
    lines = [f"{path.parent.name}/{path.name} {files.sha256(path)}" for path in sources]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def about(
    recipe: Recipe, dataset: Dataset, *, run: str, start: Run | None = None, method: Method | None = None
) -> dict[str, Any]:
    """`run.json`, less the times. `start` in it is the run whose weights were the initial ones, or null."""
    return {
        "id": run,
        "recipe": recipe.name,
        "task": recipe.task,
        "seed": recipe.training.seed,
        "recipe_digest": recipe_digest(recipe),
        "data_digest": dataset.digest,
        "code_digest": code_digest(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "machine": {"platform": platform.platform(), "processor": platform.machine()},
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "start": {"run": start.id, "weights": files.sha256(start.weights)} if start else None,
        "method": method.name if method else "warm" if start else "scratch",
        "examples": {part.name: len(part) for part in dataset.parts},
        "new_examples": len(dataset.split.get("new", ())),
        "streamed": dataset.streamed,
        "notes": list(dataset.notes),
    }


def commit() -> str | None:
    """The checkout's git commit, "+" after it where files have changed since; None outside git."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return None
    return f"{head}+" if _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
