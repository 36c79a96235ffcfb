"""What every test may ask for: the zoo of odd requests, and unpacked archives with small random nets in them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import archives as built_archives
from tests import zoo as menagerie
from tests.handlers import archives

# In the background of a script a process ignores Ctrl-C, and so does what it starts: tests send Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = ("test_readme.py", "test_demo.py", "test_tune.py", "test_serving.py", "test_events.py", "test_retrain_served.py")
"""Files that take minutes: begun first, so that of two that are tested at a time none is left over for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def zoo() -> dict[str, menagerie.Oddity]:
    """Odd requests by name; see `tests/zoo.py`."""
    return menagerie.ZOO


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`unpacked("digits", "onnx")`: a folder as TorchServe would unzip it. Made once; copy before changing."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, format: str) -> Path:
        if (model, format) not in made:
            made[model, format] = archives.write(tmp_path_factory.mktemp(f"{model}-{format}"), model, format)
        return made[model, format]

    return make


@pytest.fixture
def threads() -> Iterator[None]:
    """One thread, as a worker has, and the others back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> built_archives.Built:
    """digits-1.0.mar, onnx, from one epoch of the project's own recipe."""
    folder = tmp_path_factory.mktemp("digits")
    return built_archives.build(built_archives.train("digits", folder), folder / "store")


@pytest.fixture(scope="session")
def regressor(tmp_path_factory: pytest.TempPathFactory) -> built_archives.Built:
    """diabetes-mlp-1.0.mar, onnx, from one epoch of the project's own recipe."""
    folder = tmp_path_factory.mktemp("diabetes")
    return built_archives.build(built_archives.train("diabetes-mlp", folder), folder / "store")
