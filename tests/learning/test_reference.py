"""The reference of a run: the validation part as its own graph sees it; the same bytes again, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from marwright.errors import ArchiveError
from marwright.learning import data, recipe, reference, training
from marwright.learning.dataset import Dataset
from marwright.learning.reference import Reference
from marwright.learning.statistics import statistics
from marwright.packing import container
from marwright.packing import reference as packed
from marwright.runs import Run
from tests.learning.conftest import RECIPES, fill
from tests.learning.test_training import tiny


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("pictures")
    fill(root, {f"{part}/{name}": 8 for part in ("train", "val", "test") for name in ("cats", "dogs", "emus")})
    return data.load(tiny(), path=root, cache=root / "cache", progress=False)


@pytest.fixture(scope="module")
def run(pictures: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return training.train(tiny(), pictures, tmp_path_factory.mktemp("runs"), progress=False)


def test_it_is_the_validation_part_as_the_graph_sees_it(run: Run, pictures: Dataset) -> None:
    found = Reference.from_bytes((run.path / reference.FILE).read_bytes())
    graph, part = training.load_graph(run), pictures.validation
    inputs, _ = part.take(torch.arange(len(part)))
    with torch.inference_mode():
        probabilities, embedding = graph.eval()(inputs)
    assert len(found) == len(part) == 24
    np.testing.assert_allclose(found.values["confidence"], probabilities.amax(dim=1), atol=1e-6)
    assert found.embedding is not None
    assert found.embedding.dtype == np.float16
    np.testing.assert_allclose(found.embedding, embedding, rtol=2e-3, atol=1e-4)
    for name, values in statistics(inputs.numpy()).items():
        np.testing.assert_array_equal(found.values[name], values)


def test_the_same_graph_and_data_give_the_same_bytes(run: Run, pictures: Dataset, tmp_path: Path) -> None:
    reference.write(training.load_graph(run), pictures.validation, tmp_path)
    assert (tmp_path / reference.FILE).read_bytes() == (run.path / reference.FILE).read_bytes()


def test_a_large_part_is_taken_from_all_over(run: Run, pictures: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reference.of(training.load_graph(run), pictures.validation)
    monkeypatch.setattr(reference, "ROWS", 5)
    few = reference.of(training.load_graph(run), pictures.validation)
    places = np.rint(np.linspace(0, len(whole) - 1, 5)).astype(int)
    np.testing.assert_array_equal(few.values["brightness"], whole.values["brightness"][places])


def test_a_regressor_without_an_embedding_has_its_values_and_its_features(tmp_path: Path) -> None:
    chosen = recipe.load("diabetes-linear", recipes_dir=RECIPES, overrides={"epochs": 1})
    examples = data.load(chosen, cache=tmp_path / "cache", progress=False)
    made = reference.of(
        training.load_graph(training.train(chosen, examples, tmp_path, progress=False)), examples.validation
    )
    assert made.embedding is None
    assert {"value", "mean", "spread", "feature_0", "feature_9"} <= made.values.keys()
    back = Reference.from_bytes(made.to_bytes())
    assert back.embedding is None
    assert back.values.keys() == made.values.keys()
    for name, values in back.values.items():
        np.testing.assert_array_equal(values, made.values[name])


def test_an_archive_gives_it_back_or_has_none(run: Run, tmp_path: Path) -> None:
    container.write(tmp_path / "new.mar", {**packed.members(run), "spec.json": b"{}"})
    container.write(tmp_path / "old.mar", {"spec.json": b"{}"})
    found = packed.read(tmp_path / "new.mar")
    assert found is not None
    assert len(found) == 24
    assert packed.read(run.path) is not None
    assert packed.read(tmp_path / "old.mar") is None
    assert packed.read(tmp_path) is None
    assert packed.members(Run(tmp_path)) == {}


def test_one_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    container.write(tmp_path / "bad.mar", {reference.FILE: b"no zip"})
    uneven = Reference(np.zeros((2, 3), np.float16), {"confidence": np.zeros(3)})
    container.write(tmp_path / "uneven.mar", {reference.FILE: uneven.to_bytes()})
    (tmp_path / "no.mar").write_bytes(b"no zip either")
    for name in ("bad.mar", "uneven.mar", "no.mar", "gone.mar"):
        with pytest.raises(ArchiveError, match=name):
            packed.read(tmp_path / name)
