"""The tables of a recipe: what each key means, its default, and what it may be.

`recipe.Recipe` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from handlers.spec import ImageInput, Limits

Share = Annotated[float, Field(gt=0, lt=0.9)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Side = Annotated[int, Field(ge=1, le=4096)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]

Source = Literal["digits", "mnist", "cifar10", "diabetes", "folder"]
VECTOR_SOURCES = ("diabetes",)
BUILT_IN = ("digits", "diabetes")
DOWNLOADED = ("mnist", "cifar10")


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(Table):
    """Where examples come from, how a picture becomes an input, and how they are split."""

    source: Source
    path: str | None = None
    """Folder or zip in ImageFolder layout; for mnist and cifar10 instead of the download."""
    channels: Literal[1, 3] | None = None
    height: Side | None = None
    width: Side | None = None
    resize: Literal["stretch", "crop"] = "stretch"
    decoder: Literal["turbo", "pillow"] = "turbo"
    """What decodes pictures, in training and in the worker. Both give the same pixels; "pillow" needs Pillow alone."""
    validation_share: Share = 0.1
    test_share: Share = 0.2
    """Taken from all examples where the data has no test part of its own."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    on_unreadable: Literal["error", "skip"] = "error"
    memory_limit: Annotated[int, Field(ge=0, lt=2**63)] = 2 * 2**30
    """Bytes of decoded pictures that are held in memory; more stream from disk. Results are the same."""

    def image(self) -> ImageInput | None:
        """What a picture is made into; None for rows of numbers."""
        if self.channels is None or self.height is None or self.width is None:
            return None
        return ImageInput(self.channels, self.height, self.width, self.resize, self.decoder)


class NetChoice(Table):
    """A net of `handlers.nets.NETS`, or `torchvision:<name>` with a new head."""

    name: str
    args: dict[str, int | float | bool | str] = {}
    """Arguments of the net other than the input's shape and the number of classes."""
    weights: str | None = None
    """torchvision nets only: a local weights file, or "download" for torchvision's own; None starts from random."""
    freeze: Strings = ()
    """torchvision nets only: names of layers that keep their weights ("layer1"), or "backbone" for all of them."""


class Sgd(Table):
    name: Literal["sgd"]
    lr: Positive
    momentum: Fraction = 0.0
    nesterov: bool = False
    bias_lr: Positive = 1.0
    """Times the learning rate, for biases and norms. Their weight decay is 0 as ever."""


class Adam(Table):
    name: Literal["adam", "adamw"]
    lr: Positive
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999


class RmsProp(Table):
    name: Literal["rmsprop"]
    lr: Positive
    alpha: Fraction = 0.99
    momentum: Fraction = 0.0


class Adagrad(Table):
    name: Literal["adagrad"]
    lr: Positive
    lr_decay: NotNegative = 0.0


Optimiser = Annotated[Sgd | Adam | RmsProp | Adagrad, Field(discriminator="name")]


class Constant(Table):
    name: Literal["none"]


class Step(Table):
    """Times `factor` after every `every` epochs."""

    name: Literal["step"]
    every: Count
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1


class InverseTime(Table):
    """1 / (1 + rate·epoch)."""

    name: Literal["inverse_time"]
    rate: NotNegative


class Exponential(Table):
    """factor^epoch."""

    name: Literal["exponential"]
    factor: Annotated[float, Field(gt=0, le=1)]


class Cosine(Table):
    """Linear warm-up over `warmup` epochs, then half a cosine down to `floor` (a share of lr) at the last step."""

    name: Literal["cosine"]
    warmup: NotNegative = 0.0
    floor: Fraction = 0.0


class Plateau(Table):
    """Times `factor` when the validation loss has not fallen for more than `patience` epochs."""

    name: Literal["plateau"]
    patience: Annotated[int, Field(ge=0)] = 5
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    threshold: Fraction = 1e-4
    """A loss counts as lower below best·(1 − threshold)."""


Schedule = Annotated[Constant | Step | InverseTime | Exponential | Cosine | Plateau, Field(discriminator="name")]


class Regularisation(Table):
    """Against overfitting. Penalties are on weight matrices and kernels, not on biases and norms."""

    l1: NotNegative = 0.0
    l2: NotNegative = 0.0
    """Weight decay; decoupled with adamw."""
    dropout: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    flip: bool = False
    """Mirror half of the training pictures, left to right."""
    alternate: bool = False
    """With `flip`: each picture by turns from either side, instead of by chance."""
    crop: Annotated[int, Field(ge=0, le=64)] = 0
    """Pad by so many pixels, then cut the input's size out at a random place."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many epochs without a better validation score; None trains all epochs. The best is kept."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.alternate and not self.flip:
            raise ValueError("alternate = true only with flip = true")
        return self


class Training(Table):
    epochs: Annotated[int, Field(ge=1, le=100_000)]
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    optimiser: Optimiser
    schedule: Schedule = Constant(name="none")
    regularisation: Regularisation = Regularisation()
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and convolutions while training; weights and what is served stay float32."""
    compile: bool = False
    """Train a compiled net (torch.compile; a CPU needs a C++ compiler for it)."""


class LimitsChoice(Table):
    """What one request may ask of a worker; training data keeps to the same limits."""

    max_bytes: Count = Limits.max_bytes
    max_pixels: Count = Limits.max_pixels
    max_instances: Count = Limits.max_instances
    explain_seconds: Positive = Limits.explain_seconds
    """What one explanation may take, and all of one batch together."""


class Serving(Table):
    """How the model is exported, and what goes into the archive's `model-config.yaml`."""

    PROFILES: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "latency": {"workers": 1, "batch_size": 1, "max_batch_delay": 1, "threads": 1},
        "balanced": {"workers": 2, "batch_size": 4, "max_batch_delay": 1, "threads": 1},
        "throughput": {"workers": 2, "batch_size": 8, "max_batch_delay": 1, "threads": 1},
    }
    """Few clients, a handful, many. Fixed numbers, so that a recipe makes the same archive on every machine."""

    format: Literal["onnx", "eager"] = "onnx"
    profile: Literal["latency", "balanced", "throughput"] | None = None
    """Sets those of the next four keys that are not given."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    max_batch_delay: Annotated[int, Field(ge=1, le=60_000)] = 1
    """Milliseconds. At least 1: TorchServe takes 0 for 100."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Of one worker."""
    response_timeout: Annotated[int, Field(ge=1, le=3600)] = 30
    startup_timeout: Annotated[int, Field(ge=1, le=3600)] = 120
    top_k: Annotated[int, Field(ge=1, le=10_000)] = 5
    explain: bool = False
    """Pack the eager net beside a compiled artifact, so that a worker can say why it answers so."""
    capture: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the requests that workers keep to learn from, where the machine gives them a spool."""
    limits: LimitsChoice = LimitsChoice()

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        """What the profile says, under what the recipe says itself. An unknown profile is refused by its field."""
        profile = given.get("profile") if isinstance(given, dict) else None
        return {**cls.PROFILES[profile], **given} if isinstance(profile, str) and profile in cls.PROFILES else given

    def under(self, profile: str) -> Self:
        """With all that the profile sets, whatever the recipe says."""
        return self.model_copy(update={"profile": profile, **self.PROFILES[profile]})
