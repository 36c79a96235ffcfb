"""Handlers that are ready to answer, in this process."""

from __future__ import annotations

import copy
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


def begin(model_dir: Path, *, batch_size: int = 8, model: str | None = None) -> Started:
    """Initialize a handler as if `handlers` had been imported from `model_dir`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "HOME", model_dir.resolve() / "handlers")
        context = FakeContext.at(model_dir, batch_size=batch_size)
        handler = handler_class(model or (context.manifest or {})["model"]["modelName"])()
        handler.initialize(context)
    return handler, context


@pytest.fixture
def start(threads: None) -> Callable[..., Started]:
    """`start(model_dir)`: see `begin`; torch gets its threads back."""
    return begin


@pytest.fixture(scope="session")
def ready(unpacked: Any) -> Callable[[str, str], Started]:
    """A started handler, made once for all tests; each test gets a copy to change."""
    begun: dict[tuple[str, str], Started] = {}

    def get(model: str, format: str) -> Started:
        if (model, format) not in begun:
            begun[model, format] = begin(unpacked(model, format))
        handler, context = begun[model, format]
        return copy.copy(handler), copy.copy(context)

    return get


@pytest.fixture(params=["eager", "onnx"])
def digits(request: pytest.FixtureRequest, threads: None, ready: Any) -> Started:
    """The classifier, in each format."""
    return ready("digits", request.param)


@pytest.fixture(params=["eager", "onnx"])
def diabetes(request: pytest.FixtureRequest, threads: None, ready: Any) -> Started:
    """The regressor, in each format."""
    return ready("diabetes", request.param)


@pytest.fixture(params=[(model, format) for model in archives.MODELS for format in ("eager", "onnx")], ids="-".join)
def started(request: pytest.FixtureRequest, threads: None, ready: Any) -> Started:
    """Both handlers, in each format."""
    return ready(*request.param)


@pytest.fixture
def copied(unpacked: Any, tmp_path: Path) -> Callable[..., Path]:
    """A model folder of one's own, to damage."""

    def copy(model: str = "digits", format: str = "eager") -> Path:
        return Path(shutil.copytree(unpacked(model, format), tmp_path / "archive"))

    return copy
