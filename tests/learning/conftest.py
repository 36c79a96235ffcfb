"""Tiny made-up picture folders, small recipes, and the bundled digits once for all."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from marwright.learning import data, recipe
from marwright.learning.dataset import Dataset
from marwright.learning.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "recipes"


def picture(seed: int, *, size: tuple[int, int] = (12, 12), hue: int = 0, kind: str = "PNG") -> bytes:
    """A noisy picture; `hue` says which channel is bright, so that classes can be told apart."""
    noise = np.random.default_rng(seed).integers(0, 100, (*size, 3), dtype=np.uint8)
    noise[:, :, hue] += 150
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def fill(root: Path, layout: dict[str, int]) -> Path:
    """`{"train/cats": 4}`: so many pictures in that folder, different in each."""
    seed = 0
    for number, (folder, count) in enumerate(layout.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed += 1
            (root / folder / f"{i:03d}.png").write_bytes(picture(seed, hue=number % 3))
    return root


def zipped(root: Path, target: Path) -> Path:
    """The folder as a zip, without directory entries."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root).as_posix())
    return target


def members(target: Path, names: Iterable[str]) -> Path:
    """A zip with pictures under exactly these names."""
    with zipfile.ZipFile(target, "w") as archive:
        for seed, name in enumerate(names):
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            archive.writestr(info, picture(seed))
    return target


def document(**changes: Any) -> dict[str, Any]:
    """A small recipe for pictures of 8×8; `changes` by dotted key with `__` for the dot."""
    made: dict[str, Any] = {
        "name": "tiny",
        "task": "classification",
        "data": {"source": "folder", "channels": 3, "height": 8, "width": 8},
        "net": {"name": "small_cnn"},
        "training": {"epochs": 2, "batch_size": 8, "optimiser": {"name": "adam", "lr": 0.01}},
    }
    for key, value in changes.items():
        table = made
        *steps, last = key.split("__")
        for step in steps:
            table = table.setdefault(step, {})
        table[last] = value
    return made


def tiny(**changes: Any) -> Recipe:
    return Recipe.from_dict(document(**changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, train and test."""
    layout = {f"{part}/{label}": count for part, count in (("train", 10), ("test", 4)) for label in ("a", "b", "c")}
    return fill(tmp_path / "pictures", layout)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_set(folder: Path, cache: Path) -> Dataset:
    return data.load(tiny(), path=folder, cache=cache, progress=False)


@pytest.fixture(scope="session")
def digits(cache: Path) -> Dataset:
    return data.load(recipe.load("digits", recipes_dir=RECIPES), cache=cache, progress=False)


@pytest.fixture(scope="session")
def diabetes(cache: Path) -> Dataset:
    return data.load(recipe.load("diabetes-linear", recipes_dir=RECIPES), cache=cache, progress=False)


@pytest.fixture
def plain_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots: drawing them takes longer than training a tiny net."""
    monkeypatch.setattr("marwright.learning.reporting.page", lambda *_: "<!doctype html>")


@pytest.fixture
def real() -> Callable[[str], Path]:
    """`real("cifar10.zip")`: a file of the real sets, from MARWRIGHT_TEST_DATA or ../shared/data; skipped if absent."""

    def find(name: str) -> Path:
        where = Path(os.environ.get("MARWRIGHT_TEST_DATA") or ROOT.parent / "shared" / "data") / name
        if not where.is_file():
            pytest.skip(f"NOT TESTED on real data: no {name}; set MARWRIGHT_TEST_DATA to the folder that has it")
        return where

    return find
