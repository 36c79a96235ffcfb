"""What the recipes reach: trains each with three seeds and keeps the raw results; the tables are another command.

    python benchmarks/training.py run digits diabetes-mlp diabetes-linear
    python benchmarks/training.py run cifar10 --data cifar10.zip
    python benchmarks/training.py run cifar10-resnet --data cifar10.zip --seeds 0 --epochs 3
    python benchmarks/training.py show

Each recipe's results are in benchmarks/results/training-<recipe>.json; a new run of the same recipe replaces them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from marwright import files
from marwright.learning import data, recipe, training
from marwright.learning.dataset import Dataset

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parent.parent / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="train, and keep the results")
    run.add_argument("recipes", nargs="+")
    run.add_argument("--data", type=Path, help="folder or zip, for recipes that need one")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--epochs", type=int, help="instead of the recipe's: the result says so")
    run.add_argument("--threads", type=int, default=os.cpu_count())
    run.add_argument("--cache", type=Path, default=data.CACHE)
    verbs.add_parser("show", help="print the tables")
    options = parser.parse_args()
    if options.verb == "run":
        torch.set_num_threads(options.threads)
        for name in options.recipes:
            measure(name, options)
    show()


def measure(name: str, options: argparse.Namespace) -> None:
    """Train `name` once for each seed, in a folder that goes afterwards, and write what came of it."""
    rows = []
    for seed in options.seeds:
        chosen = recipe.load(name, recipes_dir=RECIPES, overrides={"seed": seed, "epochs": options.epochs})
        dataset = data.load(chosen, path=options.data, cache=options.cache)
        with tempfile.TemporaryDirectory() as folder:
            run = training.train(chosen, dataset, Path(folder))
            about, scores, curves = run.about, run.evaluation, run.json("curves.json", made_by="train")
        row = {
            "seed": seed,
            "metrics": scores["metrics"],
            "calibration_error": scores.get("calibration", {}).get("error"),
            "training_seconds": about["seconds"]["training"],
            "total_seconds": about["seconds"]["total"],
            "epochs": about["epochs"],
            "best_epoch": about["best_epoch"],
            "load_at_end": os.getloadavg()[0],
            "curves": curves,
        }
        if chosen.task == "regression":
            row["linear_regression"] = least_squares(dataset)
        rows.append(row)
        about.pop("seed")
        files.write_json(
            RESULTS / f"training-{name}.json",
            {
                "recipe": name,
                "shortened": options.epochs is not None,
                "date": datetime.now(UTC).date().isoformat(),
                "processor": processor(),
                "cores": os.cpu_count(),
                "threads": options.threads,
                "examples": about["examples"],
                "versions": about["versions"],
                "settings": chosen.to_dict() | {"data": chosen.to_dict()["data"] | {"path": None}},
                "seeds": rows,
            },
        )


def least_squares(dataset: Dataset) -> dict[str, float]:
    """Test error of scikit-learn's LinearRegression on the same split: fitted to train, and to train + validation."""
    from sklearn.linear_model import LinearRegression

    def part(*names: str) -> tuple[Any, Any]:
        taken = [one.take(torch.arange(len(one))) for one in dataset.parts if one.name in names]
        return torch.cat([rows for rows, _ in taken]).numpy(), torch.cat([values for _, values in taken]).numpy()

    rows, values = part("test")
    found = {}
    for key, names in (("rmse", ("train",)), ("rmse_with_validation", ("train", "validation"))):
        answers = LinearRegression().fit(*part(*names)).predict(rows)
        found[key] = float(((answers - values) ** 2).mean() ** 0.5)
    return found


def processor() -> str:
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def show() -> None:
    console = Console(width=140)
    table = Table(
        "recipe", "seeds", "epochs", "test score: mean (each)", "LinearRegression", "training s (each)", "load"
    )
    for path in sorted(RESULTS.glob("training-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = document["seeds"]
        metric = next(name for name in ("accuracy", "rmse") if name in rows[0]["metrics"])
        values = [row["metrics"][metric] for row in rows]
        percent = metric == "accuracy"
        shown = [f"{100 * value:.2f}" if percent else f"{value:.2f}" for value in (statistics.mean(values), *values)]
        linear = rows[0].get("linear_regression")
        table.add_row(
            document["recipe"] + (" (shortened)" if document["shortened"] else ""),
            str(len(rows)),
            ", ".join(str(row["epochs"]) for row in rows),
            f"{metric} {shown[0]}{' %' if percent else ''} ({', '.join(shown[1:])})",
            f"{linear['rmse']:.2f}" if linear else "",
            ", ".join(f"{row['training_seconds']:.1f}" for row in rows),
            ", ".join(f"{row['load_at_end']:.1f}" for row in rows),
        )
    console.print(table)


if __name__ == "__main__":
    main()
