"""Train a recipe into a run folder. A run that is there already is not trained again.

With `--nproc` or `--torchrun`, in several processes (see `together`); started by torchrun itself, as one of them.
"""

from __future__ import annotations

import json
import signal
import sys
from types import FrameType

from marwright.learning import data, distributed, recipe, training
from marwright.learning.recipe import Recipe
from marwright.runs import Run
from marwright.settings import RecipeChoice, TrainSettings
from scripts import together

SETTINGS = TrainSettings


def main(settings: TrainSettings) -> int:
    if together.wanted(settings):
        recipe.load(settings.recipe, recipes_dir=settings.recipes, overrides=settings.overrides())
        return together.launch(settings)
    # What is refused is written down before the others find this process gone.
    with distributed.joined() as team, together.told_to_the_parent():
        if team.size > 1:
            signal.signal(signal.SIGTERM, _ended)
        _, run = trained(settings, resume=distributed.restarted() or settings.resume)
        if team.leader:
            tell(run, as_json=settings.json)
    return 0


def tell(run: Run, *, as_json: bool) -> None:
    metrics = dict(run.spec.metrics)
    if as_json:
        print(json.dumps({"run": run.id, "path": str(run.path), "metrics": metrics}))
    else:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{run.path}: {scores}\nreport: {run.path / 'report.html'}")


def trained(settings: RecipeChoice, *, resume: bool = True) -> tuple[Recipe, Run]:
    """The recipe with its options, and its finished run: the one that is there, or a new one."""
    chosen = recipe.load(settings.recipe, recipes_dir=settings.recipes, overrides=settings.overrides())
    team, cache = distributed.team(), settings.runs / "cache"
    shown = team.leader and not settings.json
    examples = team.first(lambda: data.load(chosen, path=settings.data, cache=cache, progress=shown))
    return chosen, training.train(chosen, examples, settings.runs, resume=resume, progress=shown)


def _ended(number: int, frame: FrameType | None) -> None:
    """torchrun stops a process by SIGTERM: what is half-written goes first."""
    sys.exit(128 + number)
