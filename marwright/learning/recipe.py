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
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from handlers.spec import Limits
from marwright.errors import SettingsError
from marwright.learning.tables import BUILT_IN, VECTOR_SOURCES, Cosine, Data, NetChoice, Serving, Sgd, Table, Training

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

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")


class Recipe(Table):
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


def load(
    name_or_path: str | Path, *, recipes_dir: Path = RECIPES, overrides: Mapping[str, Any] | None = None
) -> Recipe:
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
        hint=f"did you mean {close[0]!r}?"
        if close
        else f"copy one to {recipes_dir}/{Path(text).stem}.toml, or name one",
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
    from marwright.learning import graphs

    problems = []
    if not _NAME.fullmatch(recipe.name) or recipe.name.lower().startswith("token"):
        problems.append(
            f"name is {recipe.name!r}; allowed: letters, digits, '_', '-' and '.', a letter or digit first, "
            "and not starting with 'token' (TorchServe's own paths)"
        )
    data, task = recipe.data, recipe.task
    vectors = data.source in VECTOR_SOURCES
    if vectors != (task == "regression"):
        problems.append(
            f"task is {task!r} but data.source {data.source!r} is for {'regression' if vectors else 'classification'}"
        )
    shape = {"data.channels": data.channels, "data.height": data.height, "data.width": data.width}
    if vectors:
        problems += [
            f"{key} is {value}; allowed: nothing, rows of numbers have none" for key, value in shape.items() if value
        ]
    else:
        problems += [f"{key} is missing" for key, value in shape.items() if value is None]
    if data.path is not None and data.source in BUILT_IN:
        problems.append(f"data.path is {data.path!r}; allowed: nothing, {data.source} comes with scikit-learn")
    if data.validation_share + data.test_share > 0.9:
        both = data.validation_share + data.test_share
        problems.append(f"data.validation_share + data.test_share is {both:g}; allowed: up to 0.9")
    regular = recipe.training.regularisation
    for key, value in (("flip", regular.flip), ("crop", regular.crop), ("label_smoothing", regular.label_smoothing)):
        if task == "regression" and value:
            problems.append(
                f"training.regularisation.{key} is {value!r}; allowed: nothing, it is for pictures and classes"
            )
    optimiser = recipe.training.optimiser
    if isinstance(optimiser, Sgd) and optimiser.nesterov and not optimiser.momentum:
        problems.append("training.optimiser.nesterov is true; allowed: with momentum above 0")
    schedule = recipe.training.schedule
    if isinstance(schedule, Cosine) and schedule.warmup >= recipe.training.epochs:
        problems.append(f"training.schedule.warmup is {schedule.warmup:g}; allowed: less than training.epochs")
    serving, seconds = recipe.serving, recipe.limits.explain_seconds
    if serving.explain and 2 * seconds >= serving.response_timeout:
        # A worker stops explaining at twice the limit; TorchServe kills one that has not answered its batch in time.
        problems.append(
            f"serving.limits.explain_seconds is {seconds:g}; allowed: less than half of serving.response_timeout"
            f" ({serving.response_timeout})"
        )
    return problems + graphs.problems(recipe)
