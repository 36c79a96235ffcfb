"""From a run to an artifact: the file that a worker loads, and the proof that it answers like the eager net.

    artifact = exporting.export(run, "onnx")
    artifact.path, artifact.spec, artifact.parity.difference

`EXPORTERS` has one function for each format that `handlers.runtime.LOADERS` can load. Parity is measured through that
very loader on up to 1000 of the run's real examples, at several batch sizes.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handlers import runtime
from handlers.nets import ServingGraph
from handlers.spec import ImageInput, ModelSpec
from marwright import files
from marwright.errors import ExportError, ParityError
from marwright.learning import graphs
from marwright.runs import Run

TOLERANCE = 1e-4
"""Allowed |Δ| of a probability, and of a regressor's value in units of its targets' standard deviation."""

BATCHES = (1, 3, 32)
"""Batch sizes that the parity check goes through: a fixed batch dimension would fail at the second."""

EXAMPLES = 1000

OPSET = 18


@dataclass(frozen=True)
class Parity:
    """How far the artifact's answers are from the eager net's, over `examples` real examples."""

    difference: float
    allowed: float
    examples: int


@dataclass(frozen=True)
class Artifact:
    """One exported format of one run."""

    path: Path
    spec: ModelSpec
    parity: Parity


def export(run: Run, format: str) -> Artifact:
    """The run as an artifact; what is there already is not made again. `ExportError`, `ParityError`."""
    if format not in EXPORTERS:
        raise ExportError(f"no format {format!r}", hint=f"there are: {', '.join(sorted(EXPORTERS))}")
    folder = run.export(format)
    made_by = _maker()
    if (folder / "export.json").is_file() and files.read_json(folder / "export.json").get("made_by") == made_by:
        return _read(folder)
    graph = graphs.load(run).eval()
    holdout = np.load(run.file("examples.npz", made_by="train"))["inputs"]
    inputs = holdout[np.linspace(0, len(holdout) - 1, min(EXAMPLES, len(holdout))).round().astype(int)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{format}."))
    try:
        name = EXPORTERS[format](graph, run.spec, inputs, temporary)
        spec = run.spec.exported(format, name)
        files.write_text(temporary / "spec.json", spec.to_json())
        parity = check_parity(graph, spec, temporary, inputs)
        files.write_json(temporary / "export.json", {"format": format, "parity": asdict(parity), "made_by": made_by})
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _read(folder)


def twin(run: Run, artifact: Artifact) -> Artifact:
    """The eager net of the run that `artifact` came from, for explanations: it passed the same parity check, so what
    is explained is what answers. ExportError where a worker could not load it."""
    if artifact.spec.format == "eager":
        return artifact
    if ":" in run.spec.net:
        raise ExportError(
            f"net {run.spec.net!r} exists at training time only, so a worker cannot explain its answers",
            hint="explain = false under [serving] in the recipe",
        )
    return export(run, "eager")


def _maker() -> dict[str, str]:
    """What an artifact depends on beside its run: this file, and the packages that write and run it."""
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    return {name: metadata.version(name) for name in packages} | {"code": files.sha256(Path(__file__))}


def _read(folder: Path) -> Artifact:
    spec = ModelSpec.from_json((folder / "spec.json").read_text(encoding="utf-8"))
    parity = Parity(**files.read_json(folder / "export.json")["parity"])
    return Artifact(folder / spec.artifact, spec, parity)


def check_parity(graph: ServingGraph, spec: ModelSpec, folder: Path, inputs: np.ndarray) -> Parity:
    """Compare the artifact in `folder` with `graph` on N real inputs. `ParityError` names the worst example.

    Classification also wants the same top class wherever the eager net's lead is more than the tolerance.
    """
    loaded = runtime.load(spec, folder, threads=1, gpu=None)
    first = spec.outputs[0]
    with torch.inference_mode():
        expected = graph(torch.from_numpy(inputs))[0].numpy()
    scale = float(graph.target_std) if spec.task == "regression" else 1.0
    worst, difference = 0, 0.0
    for size in BATCHES:
        got = np.concatenate([loaded.run(inputs[at : at + size])[first] for at in range(0, len(inputs), size)])
        if got.shape != expected.shape:
            raise ExportError(f"{spec.format} gives {first} of shape {got.shape}, the eager net {expected.shape}")
        gaps = np.abs(got - expected).max(axis=1) / scale
        if not np.isfinite(gaps).all():
            raise ExportError(
                f"{spec.format} answers with NaN or infinity at example {int(np.argmin(np.isfinite(gaps)))}"
            )
        if gaps.max() > difference:
            worst, difference = int(gaps.argmax()), float(gaps.max())
        if spec.task == "classification":
            lead = np.sort(expected, axis=1)
            sure = lead[:, -1] - lead[:, -2] > TOLERANCE
            flipped = np.flatnonzero(sure & (got.argmax(1) != expected.argmax(1)))
            if len(flipped):
                worst, difference = int(flipped[0]), max(difference, float(gaps[flipped[0]]))
                raise _parity_error(spec, difference, worst, f"has another top class for {len(flipped)} examples")
    if difference > TOLERANCE:
        raise _parity_error(spec, difference, worst, "differs from the eager net")
    return Parity(difference, TOLERANCE, len(inputs))


def _parity_error(spec: ModelSpec, difference: float, worst: int, what: str) -> ParityError:
    return ParityError(
        f"the {spec.format} artifact {what}: max |Δ| {difference:.2e}, allowed {TOLERANCE:.0e}, worst example {worst}",
        difference=difference,
        allowed=TOLERANCE,
        worst=worst,
        hint="the format eager serves the net as it is: --format eager, or make archive FORMAT=eager",
    )


def _eager(graph: ServingGraph, spec: ModelSpec, inputs: np.ndarray, folder: Path) -> str:
    """The state_dict itself. A net that only the trainer knows (torchvision) cannot be loaded by a worker."""
    if ":" in spec.net:
        raise ExportError(
            f"net {spec.net!r} exists at training time only: a worker has no torchvision",
            hint="export it to a compiled format: --format onnx",
        )
    torch.save(graph.state_dict(), folder / "weights.pt")
    return "weights.pt"


def _onnx(graph: ServingGraph, spec: ModelSpec, inputs: np.ndarray, folder: Path) -> str:
    """ONNX with a free batch dimension; names and shapes in, nothing of this machine (paths, stack traces) kept."""
    import onnx

    example = torch.from_numpy(inputs[:2])
    if len(example) < 2:
        raise ExportError("a run needs at least two examples to export with a free batch dimension")
    with warnings.catch_warnings():
        # torch.onnx and onnxscript warn about their own insides; what matters is checked below and by parity.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (example,),
            input_names=["input"],
            output_names=list(graph.outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise ExportError(f"torch.onnx gave nothing for net {spec.net!r}")
    model = program.model_proto
    _forget_machine(model)
    onnx.checker.check_model(model, full_check=True)
    rank = len(spec.input.shape) + 1 if isinstance(spec.input, ImageInput) else 2
    shape = model.graph.input[0].type.tensor_type.shape.dim
    if len(shape) != rank or not shape[0].dim_param:
        raise ExportError(f"torch.onnx fixed the batch size of net {spec.net!r}", hint="use --format eager")
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return "model.onnx"


def _forget_machine(model: object) -> None:
    """Drop what the exporter notes about where it ran, so that the same net gives the same bytes anywhere."""
    import onnx

    assert isinstance(model, onnx.ModelProto)
    del model.metadata_props[:]
    model.doc_string = ""
    parts: list[Any] = [
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ]
    for part in [*parts, *model.graph.initializer, *model.functions]:
        part.doc_string = ""
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]


EXPORTERS: dict[str, Callable[[ServingGraph, ModelSpec, np.ndarray, Path], str]] = {"eager": _eager, "onnx": _onnx}
"""Format → function that writes the artifact into a folder and returns its file name."""
