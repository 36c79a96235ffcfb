"""Archives as TorchServe unpacks them, with small random nets: for tests of what runs inside a worker."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import torch

import handlers
from handlers import nets
from handlers.nets import ServingGraph
from handlers.spec import ImageInput, Limits, ModelSpec, VectorInput
from tests.zoo import FEATURES

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nüll")

MODELS = ("digits", "diabetes")
"""What the zoo is asked with; benchmarks ask `cifar10`, too."""
HANDLERS = {
    "digits": "handlers.image_classifier",
    "cifar10": "handlers.image_classifier",
    "diabetes": "handlers.vector_regressor",
}


def spec(model: str, format: str = "", artifact: str = "", limits: Limits | None = None) -> ModelSpec:
    """`digits`: 1×16×16 images, `cifar10`: 3×32×32, ten labels each. `diabetes`: ten features, one value."""
    common = {"format": format, "artifact": artifact, "run": "0123456789ab", "data_digest": "d" * 16}
    if model == "digits":
        return ModelSpec(
            task="classification", net="small_cnn",
            net_args={"channels": 1, "height": 16, "width": 16, "classes": 10, "dropout": 0.5},
            input=ImageInput(1, 16, 16), classes=LABELS, outputs=("probabilities", "embedding"),
            metrics={"accuracy": 0.5}, limits=limits or Limits(), **common,
        )  # fmt: skip
    if model == "cifar10":
        return ModelSpec(
            task="classification", net="lenet", net_args={"channels": 3, "height": 32, "width": 32, "classes": 10},
            input=ImageInput(3, 32, 32), classes=LABELS, outputs=("probabilities", "embedding"),
            limits=limits or Limits(), **common,
        )  # fmt: skip
    return ModelSpec(
        task="regression", net="mlp", net_args={"features": 10, "hidden": 20}, input=VectorInput(FEATURES),
        target="progression", outputs=("value", "embedding"), limits=limits or Limits(), **common,
    )  # fmt: skip


def graph(model: str) -> ServingGraph:
    """The same random net at every call."""
    wanted = spec(model)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = nets.serving_graph(wanted.net, dict(wanted.net_args), task=wanted.task)
    made.std.fill_(0.3)
    made.mean.fill_(0.1)
    if model != "diabetes":
        with torch.no_grad():
            for parameter in made.net.parameters():
                parameter.mul_(2.0)  # answers that differ from one picture to the next
    else:
        made.target_mean.fill_(150.0)
        made.target_std.fill_(70.0)
    return made.eval()


def write(root: Path, model: str, format: str, limits: Limits | None = None, *, explain: bool = False) -> Path:
    """Everything that a `.mar` of that model has, unpacked in `root`; with `explain`, the twin too."""
    artifact = "weights.pt" if format == "eager" else "model.onnx"
    shutil.copytree(Path(handlers.__file__).parent, root / "handlers", ignore=shutil.ignore_patterns("__pycache__"))
    net = graph(model)
    if format == "eager":
        torch.save(net.state_dict(), root / artifact)
    else:
        export_onnx(net, spec(model), root / artifact)
    written = spec(model, format, artifact, limits)
    if explain:
        twin = artifact if format == "eager" else "twin.pt"
        torch.save(net.state_dict(), root / twin)
        written = written.exported(format, artifact, twin)
    (root / "spec.json").write_text(written.to_json(), encoding="utf-8")
    (root / "model-config.yaml").write_text("minWorkers: 1\nhandler:\n  threads: 1\n")
    manifest = {"model": {"modelName": model, "modelVersion": "1.0", "handler": HANDLERS[model],
                          "configFile": "model-config.yaml"}}  # fmt: skip
    (root / "MAR-INF").mkdir()
    (root / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    seal(root)
    return root


def seal(root: Path) -> str:
    """Write `digests.json` for what is there now; the bundle's digest."""
    members = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.name != "digests.json"
    }
    content = json.dumps(members, indent=2).encode()
    (root / "MAR-INF" / "digests.json").write_bytes(content)
    return hashlib.sha256(content).hexdigest()[:16]


def export_onnx(net: torch.nn.Module, wanted: ModelSpec, path: Path) -> None:
    """Quickly; the real exporter is tested elsewhere."""
    example = torch.zeros(
        (2, *wanted.input.shape), dtype=torch.uint8 if wanted.task == "classification" else torch.float32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (example,), str(path), dynamo=False, input_names=["input"],
                          output_names=list(wanted.outputs), dynamic_axes={"input": {0: "n"}})  # fmt: skip
