"""Train a recipe into a run folder. A run that is there already is not trained again."""

from __future__ import annotations

import json

from marwright.learning import data, recipe, training
from marwright.learning.recipe import Recipe
from marwright.runs import Run
from marwright.settings import RecipeChoice, TrainSettings

SETTINGS = TrainSettings


def main(settings: TrainSettings) -> int:
    _, run = trained(settings, resume=settings.resume)
    metrics = dict(run.spec.metrics)
    if settings.json:
        print(json.dumps({"run": run.id, "path": str(run.path), "metrics": metrics}))
    else:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{run.path}: {scores}\nreport: {run.path / 'report.html'}")
    return 0


def trained(settings: RecipeChoice, *, resume: bool = True) -> tuple[Recipe, Run]:
    """The recipe with its options, and its finished run: the one that is there, or a new one."""
    chosen = recipe.load(settings.recipe, recipes_dir=settings.recipes, overrides=settings.overrides())
    examples = data.load(chosen, path=settings.data, cache=settings.runs / "cache", progress=not settings.json)
    return chosen, training.train(chosen, examples, settings.runs, resume=resume, progress=not settings.json)
