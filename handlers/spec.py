"""What a model takes and gives, in one value that travels with it.

`ModelSpec` is written as `spec.json` at the root of every archive. The trainer makes it, the exporter completes it, the
worker obeys it; nothing about the input's shape, the decoder, the classes or the artifact is said anywhere else.

    spec = ModelSpec.from_json(path.read_text())
    ModelSpec.from_json(spec.to_json()) == spec
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

SCHEMA = 1

Task = Literal["classification", "regression"]
Resize = Literal["stretch", "crop"]


class SpecError(ValueError):
    """A `spec.json` that says something impossible; the message names the field and the value."""


@dataclass(frozen=True)
class ImageInput:
    """One image: `channels`×`height`×`width` uint8 after decoding and resizing.

    `resize` is "stretch" (both sides to size, aspect ratio given up) or "crop" (shorter side to size, centre kept).
    `decoder` names what may decode, a key of `handlers.images.PACKAGES`: training used it, so serving must.
    """

    channels: int
    height: int
    width: int
    resize: Resize = "stretch"
    decoder: str = "turbo"

    def __post_init__(self) -> None:
        _check(self.channels in (1, 3), "input.channels", self.channels, "1 or 3")
        for name in ("height", "width"):
            size = getattr(self, name)
            _check(isinstance(size, int) and 1 <= size <= 4096, f"input.{name}", size, "1 to 4096")
        _check(self.resize in ("stretch", "crop"), "input.resize", self.resize, "'stretch' or 'crop'")

    @property
    def shape(self) -> tuple[int, int, int]:
        """C×H×W."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class VectorInput:
    """One row of numbers, float32, in the order of `features`."""

    features: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(len(self.features) > 0, "input.features", self.features, "at least one name")
        _check(len(set(self.features)) == len(self.features), "input.features", self.features, "each name once")

    @property
    def shape(self) -> tuple[int]:
        """F."""
        return (len(self.features),)


@dataclass(frozen=True)
class Limits:
    """What one request may ask of a worker before it is refused with 413."""

    max_bytes: int = 8 * 2**20
    """Bytes of one encoded instance."""
    max_pixels: int = 32 * 10**6
    """Pixels of one image before resizing, read from its header before any of it is decoded."""
    max_instances: int = 256
    """Instances in one request."""
    explain_seconds: float = 2.0
    """Seconds that one explanation may take, and all those of one batch together: neighbours wait for them."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "explain_seconds":
                real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                _check(real and value > 0, f"limits.{name}", value, "a positive number of seconds")
            else:
                _check(isinstance(value, int) and value > 0, f"limits.{name}", value, "a positive whole number")


@dataclass(frozen=True)
class ModelSpec:
    """Everything a worker must know to answer like the trainer meant it."""

    task: Task
    net: str
    """Name in `handlers.nets.NETS`; a name with a colon (`torchvision:resnet18`) exists at training time only."""
    net_args: Mapping[str, Any]
    input: ImageInput | VectorInput
    classes: tuple[str, ...] = ()
    """Labels, by index (classification)."""
    target: str = ""
    """Name of the predicted quantity (regression)."""
    outputs: tuple[str, ...] = ("probabilities",)
    """Names of the artifact's outputs, in order: "probabilities" or "value", then "embedding" if the net has one."""
    top_k: int = 5
    format: str = ""
    """How the artifact is stored: a key of `handlers.runtime.LOADERS`; empty until exported."""
    artifact: str = ""
    """The artifact's file name beside `spec.json`; empty until exported."""
    twin: str = ""
    """File name of the net's state_dict, which explanations differentiate: the artifact itself where that is eager, a
    file beside it where it is compiled; empty means that none are offered."""
    run: str = ""
    """Id of the training run: the digest of recipe, data and code."""
    data_digest: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scores on the test part, by name."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _check(self.task in ("classification", "regression"), "task", self.task, "'classification' or 'regression'")
        _check(bool(self.net), "net", self.net, "a name")
        if self.task == "classification":
            _check(isinstance(self.input, ImageInput), "input", self.input, "an image, to classify")
            _check(all(isinstance(label, str) for label in self.classes), "classes", self.classes, "texts")
            _check(len(self.classes) >= 2, "classes", self.classes, "at least two labels")
            _check(len(set(self.classes)) == len(self.classes), "classes", self.classes, "each label once")
            _check(self.outputs[:1] == ("probabilities",), "outputs", self.outputs, "'probabilities' first")
        else:
            _check(isinstance(self.input, VectorInput), "input", self.input, "rows of numbers, for a regression")
            _check(bool(self.target), "target", self.target, "a name")
            _check(self.outputs[:1] == ("value",), "outputs", self.outputs, "'value' first")
        _check(isinstance(self.top_k, int) and self.top_k >= 1, "top_k", self.top_k, "1 or more")
        for name, value in self.metrics.items():
            _check(isinstance(value, int | float) and math.isfinite(value), f"metrics.{name}", value, "a finite number")
        for name in ("artifact", "twin"):
            value = getattr(self, name)
            _check(isinstance(value, str) and "/" not in value, name, value, "a bare file name")

    def exported(self, format: str, artifact: str, twin: str = "") -> ModelSpec:
        """The same model as an artifact, with the twin that explains it where one is packed."""
        return replace(self, format=format, artifact=artifact, twin=twin)

    def to_json(self) -> str:
        """Same spec, same bytes: sorted keys, two spaces, one final newline."""
        document = {"schema": SCHEMA, **asdict(self)}
        document["input"]["kind"] = "image" if isinstance(self.input, ImageInput) else "vector"
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Parse and validate; a `SpecError` says which field is wrong."""
        try:
            document = json.loads(text)
        except ValueError as error:
            raise SpecError(f"spec.json is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise SpecError("spec.json is not a JSON object")
        schema = document.pop("schema", None)
        _check(schema == SCHEMA, "schema", schema, str(SCHEMA))
        try:
            given = dict(document.pop("input"))
            kind = given.pop("kind", None)
            _check(kind in ("image", "vector"), "input.kind", kind, "'image' or 'vector'")
            if kind == "image":
                model_input: ImageInput | VectorInput = ImageInput(**given)
            else:
                model_input = VectorInput(features=tuple(given.pop("features")), **given)
            limits = Limits(**document.pop("limits", {}))
            for name in ("classes", "outputs"):
                document[name] = tuple(document.get(name, ()))
            return cls(input=model_input, limits=limits, **document)
        except (KeyError, TypeError) as error:
            raise SpecError(f"spec.json lacks a field or has one too many: {error}") from None


def _check(right: bool, name: str, value: object, allowed: str) -> None:
    if not right:
        raise SpecError(f"spec.json: {name} is {value!r}; allowed: {allowed}")
