"""Turn a run into an artifact, and compare it with the eager net on real examples."""

from __future__ import annotations

import json

from marwright import runs
from marwright.errors import SettingsError
from marwright.learning.recipe import Recipe
from marwright.packing import exporting
from marwright.packing.exporting import Artifact
from marwright.runs import Run
from marwright.settings import ExportSettings
from scripts import train

SETTINGS = ExportSettings


def main(settings: ExportSettings) -> int:
    _, run, artifact = exported(settings)
    parity = artifact.parity
    if settings.json:
        print(json.dumps({"run": run.id, "path": str(artifact.path), "format": artifact.spec.format}))
    else:
        print(
            f"{artifact.path}: max |Δ| to the eager net {parity.difference:.1e} over {parity.examples} examples"
            f" (allowed {parity.allowed:.0e})"
        )
    return 0


def exported(settings: ExportSettings) -> tuple[Recipe, Run, Artifact]:
    """The recipe, its run and the artifact in the wanted format; trains where there is no run yet."""
    if settings.run is not None:
        if settings.data is not None or settings.overrides().keys() - {"format"}:
            raise SettingsError(
                f"{settings.run} is trained already: --data, --epochs, --seed, --batch-size, --lr change nothing",
                hint="leave them out, or leave --run out",
            )
        run = runs.open_run(settings.run)
        chosen = Recipe.from_dict(run.recipe, origin=f"run {run.id}")
    else:
        chosen, run = train.trained(settings)
    return chosen, run, exporting.export(run, settings.format or chosen.serving.format)
