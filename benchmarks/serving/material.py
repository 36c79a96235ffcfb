"""What every system is given: the same weights in two forms, the same pictures, and the answers that are right.

    made = material.make(Path("runs/serving"), data=Path("cifar10.zip"))
    made.nets["small"].onnx, made.nets["small"].weights
    made.pictures["png32"][0].encoded, made.answer("small", "png32", 0)

The nets learn from 300 pictures of each class for a few epochs: what they answer matters here, how often they are
right does not. A picture is chosen so that the numbers of its best six labels are all at least 0.003 apart for the net
that is asked: then labels must agree exactly, in order, though numbers may differ by 0.001.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.serving.names import KINDS
from handlers import images
from handlers.nets import ServingGraph
from handlers.spec import Limits
from marwright.learning import data, graphs, recipe, training
from marwright.packing import exporting
from marwright.packing.exporting import Artifact
from marwright.runs import Run

ROOT = Path(__file__).parent.parent.parent
RECIPES = {"small": "cifar10", "resnet": "cifar10-resnet"}
EPOCHS = {"small": 4, "resnet": 2}
COUNT = {"png1080": 4, "jpeg1080": 4}
APART = 0.003
K = 5


@dataclass(frozen=True)
class Net:
    """One net in every form in which it is served."""

    name: str
    run: Run
    artifact: Artifact
    graph: ServingGraph
    weights: Path
    """state_dict of the bare net, as the stock handler loads it."""

    @property
    def onnx(self) -> Path:
        return self.artifact.path

    @property
    def labels(self) -> tuple[str, ...]:
        return self.artifact.spec.classes

    def args(self) -> dict[str, Any]:
        """What the net's class is called with."""
        return dict(self.artifact.spec.net_args)

    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, of pixels from 0 to 1."""
        return self.graph.mean.flatten().tolist(), self.graph.std.flatten().tolist()

    def answer(self, pixels: np.ndarray[Any, Any]) -> dict[str, float]:
        """The top five of one uint8 C×H×W, by the eager net."""
        with torch.inference_mode():
            row = self.graph(torch.from_numpy(pixels)[None])[0][0].tolist()
        best = sorted(range(len(row)), key=lambda index: -row[index])
        return {self.labels[index]: row[index] for index in best[:K]}

    def clear(self, pixels: np.ndarray[Any, Any]) -> bool:
        """Are the six best numbers apart, so that every system must rank the five best alike?"""
        with torch.inference_mode():
            row = np.sort(self.graph(torch.from_numpy(pixels)[None])[0][0].numpy())[::-1][: K + 1]
        return bool((row[:-1] - row[1:]).min() > APART)


@dataclass(frozen=True)
class Picture:
    """What is sent, and what two ways of preparing it make of it. Small pictures are the same both ways."""

    encoded: bytes
    ours: np.ndarray[Any, Any]
    """uint8 C×H×W by the worker's own decoder and resizing, Pillow's."""
    stock: np.ndarray[Any, Any]
    """The same by torchvision's Resize, as the stock handler does it."""


@dataclass
class Material:
    folder: Path
    nets: dict[str, Net]
    pictures: dict[str, dict[str, list[Picture]]] = field(default_factory=dict)
    """By net and by kind."""


def make(folder: Path, data_path: Path | None) -> Material:
    """Trains, exports and draws; what an earlier call made is taken again where the code is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    small = subset(data_path, folder / "cifar10-small.zip")
    nets = {name: _net(name, folder, small) for name in RECIPES}
    made = Material(folder, nets)
    found = originals(small)
    for name, net in nets.items():
        kinds = tuple(KINDS) if name == "small" else ("png32",)
        made.pictures[name] = {kind: _pictures(net, kind, found) for kind in kinds}
    return made


def subset(data_path: Path | None, small: Path, *, train: int = 300, test: int = 60) -> Path:
    """A few pictures of each class, in a zip of the same layout."""
    if small.is_file():
        return small
    if data_path is None:
        raise SystemExit("which pictures? --data cifar10.zip (ImageFolder layout: cifar10/train/cat/0001.jpg)")
    taken: dict[tuple[str, ...], int] = {}
    part = small.with_suffix(".part")
    with zipfile.ZipFile(data_path) as source, zipfile.ZipFile(part, "w") as target:
        for entry in sorted(source.namelist()):
            parts = Path(entry).parts
            if entry.endswith("/") or len(parts) < 3:
                continue
            where = parts[-3:-1]
            if taken.get(where, 0) < (train if where[0] == "train" else test):
                taken[where] = taken.get(where, 0) + 1
                target.writestr("/".join(("cifar10", *parts[-3:])), source.read(entry))
    part.replace(small)
    return small


def originals(small: Path) -> list[Image.Image]:
    """The test part's pictures, in a fixed order."""
    with zipfile.ZipFile(small) as source:
        names = sorted(name for name in source.namelist() if "/test/" in name)
        found = [Image.open(io.BytesIO(source.read(name))).convert("RGB") for name in names]
    random.Random(6).shuffle(found)
    return found


def _net(name: str, folder: Path, small: Path) -> Net:
    given = {"epochs": EPOCHS[name], "data.path": str(small), "serving.explain": False}
    chosen = recipe.load(RECIPES[name], recipes_dir=ROOT / "recipes", overrides=given)
    examples = data.load(chosen, cache=folder / "cache", progress=False)
    run = training.train(chosen, examples, folder / "runs", progress=False)
    artifact = exporting.export(run, "onnx")
    graph = graphs.load(run).eval()
    weights = folder / f"{name}.pth"
    torch.save(graph.net.state_dict(), weights)
    return Net(name, run, artifact, graph, weights)


def _pictures(net: Net, kind: str, found: list[Image.Image]) -> list[Picture]:
    """The first of this kind whose answers are clear both ways."""
    chosen: list[Picture] = []
    wanted = COUNT.get(kind, 16)
    for drawn in _drawn(kind, found):
        encoded = _encoded(kind, drawn)
        picture = Picture(encoded, *_prepared(kind, encoded, net))
        if net.clear(picture.ours) and net.clear(picture.stock):
            chosen.append(picture)
        if len(chosen) == wanted:
            return chosen
    raise SystemExit(f"only {len(chosen)} pictures of {kind} have clear answers; {wanted} are wanted")


def _drawn(kind: str, found: list[Image.Image]) -> Iterator[Image.Image]:
    if kind.endswith("32"):
        yield from found
    elif kind.endswith("224"):
        yield from (one.resize((224, 224), Image.Resampling.BICUBIC) for one in found)
    else:  # a wall of enlarged pictures: as much detail as a photograph has; one of them fills most of the frame
        rng = random.Random(1080)
        while True:
            wall = Image.new("RGB", (1920, 1080))
            for top in range(0, 1080, 128):
                for left in range(0, 1920, 128):
                    wall.paste(rng.choice(found).resize((128, 128), Image.Resampling.BICUBIC), (left, top))
            large = rng.choice(found).resize((1920, 1080), Image.Resampling.BICUBIC)
            yield Image.blend(wall, large, 0.7)


def _encoded(kind: str, drawn: Image.Image) -> bytes:
    stream = io.BytesIO()
    if kind.startswith("raw"):
        np.save(stream, np.ascontiguousarray(np.asarray(drawn).transpose(2, 0, 1)))
    elif kind.startswith("png"):
        drawn.save(stream, "PNG", compress_level=1 if drawn.width > 1000 else 6)
    else:
        drawn.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _prepared(kind: str, encoded: bytes, net: Net) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    if kind.startswith("raw"):
        pixels = np.load(io.BytesIO(encoded))
        return pixels, pixels
    spec_input = with_pillow(net.artifact).spec.input
    ours = images.decode(encoded, spec_input, Limits())  # type: ignore[arg-type]
    whole = Image.open(io.BytesIO(encoded)).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    return ours, np.ascontiguousarray(np.asarray(whole).transpose(2, 0, 1))


def with_pillow(artifact: Artifact) -> Artifact:
    """The same artifact, its pictures decoded by Pillow."""
    spec = artifact.spec
    return replace(artifact, spec=replace(spec, input=replace(spec.input, decoder="pillow")))  # type: ignore[arg-type]


def write_labels(net: Net, path: Path) -> Path:
    """The classes in the net's order, as JSON."""
    path.write_text(json.dumps(net.labels))
    return path
