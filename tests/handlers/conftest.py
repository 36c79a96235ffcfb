"""Handlers that are ready to answer, in this process."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handlers import base, bundle
from tests.handlers import archives
from tests.handlers.context import FakeContext

Started = tuple[base.BatchHandler, FakeContext]


def handler_class(model: str) -> Any:
    """As TorchServe finds it: the one class defined in the module that the manifest names."""
    module = importlib.import_module(archives.HANDLERS[model])
    classes = [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    assert len(classes) == 1
    return classes[0]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, threads: None) -> Callable[..., Started]:
    """`start(model_dir)`: initialize a handler as if `handlers` had been imported from there."""

    def begin(model_dir: Path, *, batch_size: int = 8, model: str | None = None) -> Started:
        monkeypatch.setattr(bundle, "HOME", model_dir.resolve() / "handlers")
        context = FakeContext.at(model_dir, batch_size=batch_size)
        handler = handler_class(model or (context.manifest or {})["model"]["modelName"])()
        handler.initialize(context)
        return handler, context

    return begin


@pytest.fixture(params=["eager", "onnx"])
def digits(request: pytest.FixtureRequest, unpacked: Any, start: Any) -> Started:
    """The classifier, in each format."""
    return start(unpacked("digits", request.param))


@pytest.fixture(params=["eager", "onnx"])
def diabetes(request: pytest.FixtureRequest, unpacked: Any, start: Any) -> Started:
    """The regressor, in each format."""
    return start(unpacked("diabetes", request.param))


@pytest.fixture(params=[(model, format) for model in archives.HANDLERS for format in ("eager", "onnx")], ids="-".join)
def started(request: pytest.FixtureRequest, unpacked: Any, start: Any) -> Started:
    """Both handlers, in each format."""
    return start(unpacked(*request.param))


@pytest.fixture
def copied(unpacked: Any, tmp_path: Path) -> Callable[..., Path]:
    """A model folder of one's own, to damage."""

    def copy(model: str = "digits", format: str = "eager") -> Path:
        return Path(shutil.copytree(unpacked(model, format), tmp_path / "archive"))

    return copy
