"""Archives for the tests, built once a session by the library itself: two epochs are enough to be an archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from marwright.learning import data, recipe, training
from marwright.learning.recipe import Recipe
from marwright.packing import archive, exporting, golden
from marwright.packing.golden import Golden
from marwright.packing.records import ArchiveRecord
from marwright.runs import Run

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Built:
    """One archive, the run that it came from, and what it should answer."""

    run: Run
    record: ArchiveRecord
    store: Path

    @property
    def path(self) -> Path:
        return self.store / self.record.file

    @property
    def golden(self) -> tuple[Golden, ...]:
        return golden.read(self.path)


def train(name: str, folder: Path, **overrides: object) -> Run:
    """A quick run of one of the project's recipes."""
    # No twin unless asked for: a worker that can explain takes longer to start.
    given = {"epochs": 2, "serving.explain": False, **overrides}
    chosen = recipe.load(name, recipes_dir=ROOT / "recipes", overrides=given)
    examples = data.load(chosen, cache=folder / "cache", progress=False)
    return training.train(chosen, examples, folder / "runs", progress=False)


def build(run: Run, store: Path, format: str = "onnx", version: str | None = None, **serving: object) -> Built:
    """An archive of a run; `serving` overrides the recipe's serving section (`explain=True` packs the twin)."""
    chosen = Recipe.model_validate(run.recipe)
    chosen = chosen.model_copy(update={"serving": chosen.serving.model_copy(update=serving)})
    record, _ = archive.write(run, exporting.export(run, format), chosen, store, version=version)
    return Built(run, record, store)
