"""A recipe: one TOML file that says everything about one model, from its data to how it is served.

    mine = recipe.load("digits", overrides={"epochs": 3})
    mine.training.epochs            # 3
    mine.to_dict()                  # every default filled in: what `recipe.json` holds

The file's name is the model's name. Whatever is wrong with a file is said in one `SettingsError`, all of it at once:
key, value, what is allowed.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from handlers.spec import ImageInput, Limits
from marwright.errors import SettingsError

RECIPES = Path("recipes")
ALIASES = {
    "epochs": "training.epochs",
    "seed": "training.seed",
    "batch_size": "training.batch_size",
    "lr": "training.optimiser.lr",
    "data": "data.path",
    "path": "data.path",
    "weights": "net.weights",
    "format": "serving.format",
}
"""Short names of overrides; any other key of a recipe can be given with its dots (`"serving.workers": 2`)."""

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_\-.]*$")

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


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(_Table):
    """Where examples come from, how a picture becomes an input, and how they are split."""

    source: Source
    path: str | None = None
    """Folder or zip in ImageFolder layout; for mnist and cifar10 instead of the download."""
    channels: Literal[1, 3] | None = None
    height: Side | None = None
    width: Side | None = None
    resize: Literal["stretch", "crop"] = "stretch"
    validation_share: Share = 0.1
    test_share: Share = 0.2
    """Taken from all examples where the data has no test part of its own."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    on_unreadable: Literal["error", "skip"] = "error"
    memory_limit: Count = 2 * 2**30
    """Bytes of decoded pictures that are held in memory; more stream from disk. Results are the same."""

    def image(self) -> ImageInput | None:
        """What a picture is made into; None for rows of numbers."""
        if self.channels is None or self.height is None or self.width is None:
            return None
        return ImageInput(self.channels, self.height, self.width, self.resize)


class NetChoice(_Table):
    """A net of `handlers.nets.NETS`, or `torchvision:<name>` with a new head."""

    name: str
    args: dict[str, int | float | bool | str] = {}
    """Arguments of the net other than the input's shape and the number of classes."""
    weights: str | None = None
    """torchvision nets only: a local weights file, or "download" for torchvision's own; None starts from random."""
    freeze: Strings = ()
    """torchvision nets only: names of layers that keep their weights ("layer1"), or "backbone" for all of them."""


class Sgd(_Table):
    name: Literal["sgd"]
    lr: Positive
    momentum: Fraction = 0.0
    nesterov: bool = False


class Adam(_Table):
    name: Literal["adam", "adamw"]
    lr: Positive
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999


class RmsProp(_Table):
    name: Literal["rmsprop"]
    lr: Positive
    alpha: Fraction = 0.99
    momentum: Fraction = 0.0


class Adagrad(_Table):
    name: Literal["adagrad"]
    lr: Positive
    lr_decay: NotNegative = 0.0


Optimiser = Annotated[Sgd | Adam | RmsProp | Adagrad, Field(discriminator="name")]


class Constant(_Table):
    name: Literal["none"]


class Step(_Table):
    """Times `factor` after every `every` epochs."""

    name: Literal["step"]
    every: Count
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1


class InverseTime(_Table):
    """1 / (1 + rate·epoch)."""

    name: Literal["inverse_time"]
    rate: NotNegative


class Exponential(_Table):
    """factor^epoch."""

    name: Literal["exponential"]
    factor: Annotated[float, Field(gt=0, le=1)]


class Cosine(_Table):
    """Linear warm-up over `warmup` epochs, then half a cosine down to `floor` (a share of lr) at the last step."""

    name: Literal["cosine"]
    warmup: NotNegative = 0.0
    floor: Fraction = 0.0


class Plateau(_Table):
    """Times `factor` when the validation loss has not fallen for more than `patience` epochs."""

    name: Literal["plateau"]
    patience: Annotated[int, Field(ge=0)] = 5
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    threshold: Fraction = 1e-4
    """A loss counts as lower below best·(1 − threshold)."""


Schedule = Annotated[Constant | Step | InverseTime | Exponential | Cosine | Plateau, Field(discriminator="name")]


class Regularisation(_Table):
    """Against overfitting. Penalties are on weight matrices and kernels, not on biases and norms."""

    l1: NotNegative = 0.0
    l2: NotNegative = 0.0
    """Weight decay; decoupled with adamw."""
    dropout: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    flip: bool = False
    """Mirror half of the training pictures, left to right."""
    crop: Annotated[int, Field(ge=0, le=64)] = 0
    """Pad by so many pixels, then cut the input's size out at a random place."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many epochs without a better validation score; None trains all epochs. The best is kept."""


class Training(_Table):
    epochs: Annotated[int, Field(ge=1, le=100_000)]
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    optimiser: Optimiser
    schedule: Schedule = Constant(name="none")
    regularisation: Regularisation = Regularisation()


class LimitsChoice(_Table):
    """What one request may ask of a worker; training data keeps to the same limits."""

    max_bytes: Count = Limits.max_bytes
    max_pixels: Count = Limits.max_pixels
    max_instances: Count = Limits.max_instances


class Serving(_Table):
    """How the model is exported, and what goes into the archive's `model-config.yaml`."""

    format: Literal["onnx", "eager"] = "onnx"
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    max_batch_delay: Annotated[int, Field(ge=1, le=60_000)] = 1
    """Milliseconds. At least 1: TorchServe takes 0 for 100."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Of one worker."""
    response_timeout: Annotated[int, Field(ge=1, le=3600)] = 30
    startup_timeout: Annotated[int, Field(ge=1, le=3600)] = 120
    top_k: Annotated[int, Field(ge=1, le=10_000)] = 5
    limits: LimitsChoice = LimitsChoice()


class Recipe(_Table):
    """One model, whole."""

    name: str
    task: Literal["classification", "regression"]
    description: str = ""
    data: Data
    net: NetChoice
    training: Training
    serving: Serving = Serving()

    @property
    def limits(self) -> Limits:
        return Limits(**self.serving.limits.model_dump())

    def to_dict(self) -> dict[str, Any]:
        """Every key, defaults filled in; plain values that TOML and JSON can hold. `from_dict` gives it back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, origin: str = "recipe") -> Recipe:
        """Parse and validate; a `SettingsError` lists all that is wrong."""
        try:
            recipe = cls.model_validate(dict(document))
        except ValidationError as error:
            raise _refused(origin, [_sentence(dict(one)) for one in error.errors()]) from None
        problems = _contradictions(recipe)
        if problems:
            raise _refused(origin, problems)
        return recipe


def load(name_or_path: str | Path, *, recipes_dir: Path = RECIPES, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name in `recipes_dir`, or the file, with `overrides` (None values say nothing) put over it."""
    path = _find(name_or_path, recipes_dir)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}", hint="compare it with recipes/digits.toml") from None
    given = document.setdefault("name", path.stem)
    if given != path.stem:
        raise SettingsError(
            f"{path}: name is {given!r}, but the file is {path.name!r}",
            hint=f"leave `name` out: the file's name is the model's name ({path.stem})",
        )
    for key, value in (overrides or {}).items():
        if value is not None:
            _put(document, ALIASES.get(key, key), str(value) if isinstance(value, Path) else value)
    return Recipe.from_dict(document, origin=str(path))


def names(recipes_dir: Path = RECIPES) -> list[str]:
    """The recipes there are."""
    return sorted(path.stem for path in recipes_dir.glob("*.toml"))


def _find(name_or_path: str | Path, recipes_dir: Path) -> Path:
    text = str(name_or_path)
    path = Path(text) if text.endswith(".toml") or "/" in text else recipes_dir / f"{text}.toml"
    if path.is_file():
        return path
    there = names(recipes_dir)
    close = difflib.get_close_matches(Path(text).stem, there, n=1)
    raise SettingsError(
        f"no recipe {text!r}; in {recipes_dir}/ there are: {', '.join(there) or 'none'}",
        hint=f"did you mean {close[0]!r}?" if close else f"copy one to {recipes_dir}/{Path(text).stem}.toml, or name one",
    )


def _put(document: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        document = document.setdefault(table, {})
        if not isinstance(document, dict):
            raise SettingsError(f"{key} cannot be set: {table} is not a table", hint="see recipes/digits.toml")
    document[last] = value


def _refused(origin: str, problems: list[str]) -> SettingsError:
    lines = "\n".join(f"  - {problem}" for problem in problems)
    count = "one thing" if len(problems) == 1 else f"{len(problems)} things"
    return SettingsError(f"{origin}: {count} not allowed\n{lines}", hint="recipes/digits.toml shows each table")


def _sentence(error: dict[str, Any]) -> str:
    """One pydantic complaint → `key is value; allowed: …`."""
    keys, table = _walk(error["loc"])
    key, kind, value = ".".join(keys), error["type"], error.get("input")
    if kind == "extra_forbidden":
        allowed = sorted(table.model_fields) if table else []
        close = difflib.get_close_matches(keys[-1], allowed, n=1)
        return f"{key} is unknown{f' (did you mean {close[0]}?)' if close else ''}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key} is missing"
    context = error.get("ctx") or {}
    if kind == "union_tag_not_found":
        return f"{key}.name is missing; allowed: {context.get('discriminator')}"
    if kind == "union_tag_invalid":
        return f"{key}.name is {context.get('tag')!r}; allowed: {context.get('expected_tags')}"
    says = error["msg"].removeprefix("Input should be ")
    return f"{key} is {value!r}; allowed: {says}"


def _walk(location: tuple[Any, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """The key as it is in the file (pydantic puts the tag of a union in between), and the table that holds it."""
    table: type[BaseModel] | None = Recipe
    keys: list[str] = []
    steps = list(location)
    while steps:
        step = steps.pop(0)
        keys.append(str(step))
        field = table.model_fields.get(str(step)) if table else None
        if field is None or not steps:
            continue
        tables = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_table(kind)]
        if field.discriminator and steps:
            tag = steps.pop(0)
            tables = [kind for kind in tables if tag in get_args(kind.model_fields["name"].annotation)]
        table = tables[0] if tables else None
    return keys, table


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _contradictions(recipe: Recipe) -> list[str]:
    """What each key allows and the whole does not."""
    from marwright.learning import choosing

    problems = []
    if not _NAME.match(recipe.name) or recipe.name.lower().startswith("token"):
        problems.append(
            f"name is {recipe.name!r}; allowed: letters, digits, '_', '-' and '.', a letter or digit first, "
            "and not starting with 'token' (TorchServe's own paths)"
        )
    data, task = recipe.data, recipe.task
    vectors = data.source in VECTOR_SOURCES
    if vectors != (task == "regression"):
        problems.append(f"task is {task!r} but data.source {data.source!r} is for {'regression' if vectors else 'classification'}")
    shape = {"data.channels": data.channels, "data.height": data.height, "data.width": data.width}
    if vectors:
        problems += [f"{key} is {value}; allowed: nothing, rows of numbers have none" for key, value in shape.items() if value]
    else:
        problems += [f"{key} is missing" for key, value in shape.items() if value is None]
    if data.path is not None and data.source in BUILT_IN:
        problems.append(f"data.path is {data.path!r}; allowed: nothing, {data.source} comes with scikit-learn")
    if data.validation_share + data.test_share > 0.9:
        problems.append(f"data.validation_share + data.test_share is {data.validation_share + data.test_share:g}; allowed: up to 0.9")
    regular = recipe.training.regularisation
    for key, value in (("flip", regular.flip), ("crop", regular.crop), ("label_smoothing", regular.label_smoothing)):
        if task == "regression" and value:
            problems.append(f"training.regularisation.{key} is {value!r}; allowed: nothing, it is for pictures and classes")
    optimiser = recipe.training.optimiser
    if isinstance(optimiser, Sgd) and optimiser.nesterov and not optimiser.momentum:
        problems.append("training.optimiser.nesterov is true; allowed: with momentum above 0")
    schedule = recipe.training.schedule
    if isinstance(schedule, Cosine) and schedule.warmup >= recipe.training.epochs:
        problems.append(f"training.schedule.warmup is {schedule.warmup:g}; allowed: less than training.epochs")
    return problems + choosing.problems(recipe)
