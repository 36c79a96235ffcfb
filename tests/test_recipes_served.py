"""Every kind of recipe becomes an archive that a clean process answers with: folders, transfer, vectors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from marwright.errors import ExportError
from marwright.learning import data, recipe, training
from marwright.packing import container, exporting
from marwright.runs import Run
from tests import archives

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of stripes, thirty of each, 40×36, in a folder whose names have spaces and umlauts."""
    folder = tmp_path_factory.mktemp("pictures") / "für mich"
    noise = np.random.default_rng(7)
    rows, columns = np.mgrid[0:40, 0:36]
    for name, stripes in {"quer gestreift": rows, "längs": columns}.items():
        (folder / name).mkdir(parents=True)
        for number in range(30):
            values = (stripes + number) // 6 % 2 * 180 + noise.integers(0, 60, (40, 36))
            Image.fromarray(values.astype(np.uint8)).convert("RGB").save(folder / name / f"{number:02}.png")
    return folder


def run(name: str, pictures: Path, folder: Path, **overrides: object) -> Run:
    chosen = recipe.load(name, recipes_dir=ROOT / "recipes", overrides={"epochs": 2, **overrides})
    examples = data.load(chosen, path=pictures, cache=folder / "cache", progress=False)
    return training.train(chosen, examples, folder / "runs", progress=False)


def test_images_of_a_folder_become_an_archive(pictures: Path, tmp_path: Path) -> None:
    built = archives.build(run("images", pictures, tmp_path), tmp_path / "store")
    assert built.record.model == "images"
    assert {label for example in built.golden for label in example.answer} == {"quer gestreift", "längs"}


def test_a_torchvision_backbone_is_served_as_onnx_without_torchvision(pictures: Path, tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    weights = tmp_path / "resnet18.pth"
    torch.save(models.resnet18().state_dict(), weights)
    trained = run("transfer", pictures, tmp_path, **{"net.weights": str(weights), "data.height": 32, "data.width": 32})
    built = archives.build(trained, tmp_path / "store")
    unpacked = tmp_path / "unpacked"
    container.unpack(built.path, unpacked)
    script = (
        "import sys; from pathlib import Path\n"
        "from marwright.packing import clean_worker\n"
        "folder = Path(sys.argv[1])\n"
        "handler = clean_worker.load(folder, clean_worker.Context(folder))\n"
        "assert 'torchvision' not in sys.modules, 'the worker imported torchvision'\n"
        "print(handler.describe()['format'])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(unpacked)],
        env={"PYTHONPATH": str(unpacked), "PATH": "/usr/bin:/bin"},
        cwd=unpacked,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "onnx"), done.stderr
    with pytest.raises(ExportError, match="training time only"):
        exporting.export(trained, "eager")


def test_both_regressors_become_archives_in_both_formats(tmp_path: Path) -> None:
    for name in ("diabetes-mlp", "diabetes-linear"):
        trained = archives.train(name, tmp_path)
        for format in ("onnx", "eager"):
            built = archives.build(trained, tmp_path / "store", format)
            assert built.record.format == format
            assert all(example.answer.keys() == {"progression"} for example in built.golden)
