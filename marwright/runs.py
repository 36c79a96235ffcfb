"""A run folder: what training and exporting left behind, beside the settings that made it.

    runs/digits-3f2a9c0d41b7/
        run.json          id, recipe name, digests, seed, versions, commit, threads, started, seconds
        recipe.json       the recipe with every default filled in
        checkpoint.pt     last whole epoch: net, optimiser, schedule, best so far (for --resume); gone when finished
        weights.pt        state_dict of the ServingGraph, best epoch; loads with weights_only=True
        spec.json         ModelSpec, not yet exported
        examples.npz      inputs (raw, as the artifact takes them) and labels of the test part, up to 10 000 and 64 MiB
        reference.npz     embedding, confidence and input statistics of up to 1000 validation examples; of the latest
                          requests where production has taught the run (reference.json says so)
        golden/           golden.json and one raw request body for each golden example
        split.json        which example is in which part, the seed, which were newly labelled
        curves.json       a row for each epoch
        evaluation.json   metrics, confusion matrix, scores for each class
        report.html
        export/onnx/      artifact, spec.json of the artifact, export.json (parity)

A run is named by the digest of its recipe, its data, the code that reads both, the weights it starts from and the
method, so the same question is never trained twice. It is finished when `evaluation.json` is there: that file is
written last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.spec import ModelSpec
from marwright.errors import RunError


@dataclass(frozen=True)
class Run:
    """One folder under `runs/`. Properties read its files; a `RunError` names the one that is missing."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return (self.path / "evaluation.json").is_file()

    @property
    def weights(self) -> Path:
        return self.file("weights.pt", made_by="train")

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_json(self.file("spec.json", made_by="train").read_text(encoding="utf-8"))

    @property
    def about(self) -> dict[str, Any]:
        """`run.json`."""
        return self.json("run.json", made_by="train")

    @property
    def recipe(self) -> dict[str, Any]:
        """`recipe.json`: the resolved recipe."""
        return self.json("recipe.json", made_by="train")

    @property
    def evaluation(self) -> dict[str, Any]:
        return self.json("evaluation.json", made_by="train")

    def export(self, format: str) -> Path:
        """Folder of one exported artifact; there or not."""
        return self.path / "export" / format

    def json(self, name: str, *, made_by: str) -> dict[str, Any]:
        path = self.file(name, made_by=made_by)
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}", hint="delete the run's folder and train again") from None
        return document

    def file(self, name: str, *, made_by: str) -> Path:
        path = self.path / name
        if not path.exists():
            raise RunError(
                f"run {self.id} has no {name}",
                hint=f"it is made by `marwright {made_by} --recipe {self.path.name.rsplit('-', 1)[0]}`",
            )
        return path


def open_run(path: Path) -> Run:
    """The run in that folder; `RunError` if there is none or it was not finished."""
    run = Run(path)
    if not path.is_dir():
        raise RunError(f"no run at {path}", hint="`marwright train --recipe NAME` makes one")
    if not run.finished:
        raise RunError(f"run {run.id} is not finished", hint="`marwright train --recipe NAME --resume` finishes it")
    return run
