"""Artifact formats that are served, and how each is loaded and run.

    runtime = load(spec, model_dir, threads=1, gpu=None)
    runtime.run(batch)          # {"probabilities": N×K float32, "embedding": N×D float32}

A format is one entry in `LOADERS`, and one in the exporters' table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from handlers import nets
from handlers.errors import LoadError
from handlers.spec import ImageInput, ModelSpec

Array = NDArray[Any]


class Runtime(Protocol):
    """A loaded artifact."""

    device: str
    """"cpu" or "cuda:0"."""

    def run(self, batch: Array) -> dict[str, Array]:
        """uint8 N×C×H×W or float32 N×F → one float32 array of N rows for each name in `spec.outputs`."""


class Eager:
    """A state_dict in a named net: `torch.load(weights_only=True)`, strict, inference mode."""

    def __init__(self, path: Path, spec: ModelSpec, threads: int, gpu: int | None) -> None:
        try:
            self.graph = nets.serving_graph(spec.net, dict(spec.net_args), task=spec.task)
            self.graph.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
        except Exception as error:
            raise LoadError(f"{path.name} does not fit net {spec.net!r}: {_one_line(error)}") from None
        if self.graph.outputs != spec.outputs:
            raise LoadError(f"net {spec.net!r} gives {list(self.graph.outputs)}; spec.json says {list(spec.outputs)}")
        self.names = spec.outputs
        self.device = f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu"
        self.graph.eval().to(self.device)

    def run(self, batch: Array) -> dict[str, Array]:
        with torch.inference_mode():
            given = self.graph(torch.from_numpy(batch).to(self.device))
            return {name: tensor.cpu().numpy() for name, tensor in zip(self.names, given, strict=True)}


class Onnx:
    """ONNX Runtime with its threads counted, and none of them spinning while idle."""

    def __init__(self, path: Path, spec: ModelSpec, threads: int, gpu: int | None) -> None:
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise LoadError(f"format 'onnx' needs onnxruntime: {_one_line(error)}") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        self.device = "cpu"
        if gpu is not None and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": gpu}))
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            raise LoadError(f"ONNX Runtime cannot load {path.name}: {_one_line(error)}") from None
        if self.session.get_providers()[0] == "CUDAExecutionProvider":
            self.device = f"cuda:{gpu}"
        outputs = tuple(output.name for output in self.session.get_outputs())
        if outputs != spec.outputs:
            raise LoadError(f"{path.name} gives {list(outputs)}; spec.json says {list(spec.outputs)}")
        inputs = self.session.get_inputs()
        dtype = "tensor(uint8)" if isinstance(spec.input, ImageInput) else "tensor(float)"
        if len(inputs) != 1 or inputs[0].name != "input" or inputs[0].type != dtype:
            takes = ", ".join(f"{entry.name}: {entry.type}" for entry in inputs)
            raise LoadError(f"{path.name} takes {takes}; expected one input 'input': {dtype}")
        if tuple(inputs[0].shape[1:]) != spec.input.shape or isinstance(inputs[0].shape[0], int):
            raise LoadError(
                f"{path.name} takes the shape {inputs[0].shape}; expected any number of {list(spec.input.shape)}"
            )
        self.names = list(outputs)

    def run(self, batch: Array) -> dict[str, Array]:
        return dict(zip(self.names, self.session.run(self.names, {"input": batch}), strict=True))


LOADERS: dict[str, Callable[[Path, ModelSpec, int, int | None], Runtime]] = {"eager": Eager, "onnx": Onnx}


def load(spec: ModelSpec, model_dir: Path, *, threads: int, gpu: int | None) -> Runtime:
    """The archive's artifact, ready to run. `LoadError` says in one line what does not match `spec.json`."""
    if spec.format not in LOADERS:
        raise LoadError(f"spec.json names the format {spec.format!r}; served here: {', '.join(LOADERS)}")
    path = model_dir / spec.artifact
    if not spec.artifact or not path.is_file():
        raise LoadError(f"spec.json names the artifact {spec.artifact!r}, which is not in the archive")
    return LOADERS[spec.format](path, spec, threads, gpu)


def blank(spec: ModelSpec, count: int) -> Array:
    """`count` instances of nothing: black images or rows of zeros."""
    return np.zeros((count, *spec.input.shape), np.uint8 if isinstance(spec.input, ImageInput) else np.float32)


def warm_up(runtime: Runtime, spec: ModelSpec, sizes: set[int]) -> dict[str, int]:
    """Run each batch size once and look at what comes out, so that the first caller neither waits nor is surprised.

    Gives each output's number of columns.
    """
    width = len(spec.classes) if spec.task == "classification" else 1
    for size in sorted(sizes):
        try:
            outputs = runtime.run(blank(spec, size))
        except Exception as error:
            raise LoadError(f"{spec.artifact} fails on a batch of {size}: {_one_line(error)}") from None
        first = outputs[spec.outputs[0]]
        if first.shape != (size, width):
            raise LoadError(f"{spec.artifact} answers with shape {list(first.shape)}; expected {[size, width]}")
        if any(output.ndim != 2 or len(output) != size for output in outputs.values()):
            raise LoadError(f"{spec.artifact} does not give one row for each of {size} instances")
        if not np.isfinite(first).all():
            raise LoadError(f"{spec.artifact} answers NaN or infinity to a blank input")
    return {name: outputs[name].shape[1] for name in spec.outputs}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
