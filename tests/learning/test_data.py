"""Splits are disjoint and seeded; streaming is memory; training data is what a worker decodes."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from handlers import images
from handlers.spec import ImageInput, Limits
from marwright.errors import DataError
from marwright.learning import bundled, data, dataset, recipe
from marwright.learning.dataset import Dataset, order
from tests.learning.conftest import RECIPES, fill, picture, tiny


def rows(made: Dataset) -> list[set[int]]:
    return [set(part.rows.tolist()) for part in made.parts]


def contents(made: Dataset) -> list[set[bytes]]:
    return [{made.raw(row).data for row in part} for part in rows(made)]


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_parts_are_disjoint_and_whole(name: str, request: pytest.FixtureRequest) -> None:
    made: Dataset = request.getfixturevalue(name)
    train, validation, test = rows(made)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert train | validation | test == set(range(len(made.names)))
    assert not contents(made)[0] & contents(made)[2]


def test_shares_are_kept_in_every_class(digits: Dataset) -> None:
    whole = torch.cat([part.targets for part in digits.parts]).bincount()
    assert torch.allclose(digits.test.targets.bincount() / whole, torch.tensor(0.2), atol=0.005)
    assert torch.allclose(digits.validation.targets.bincount() / whole, torch.tensor(0.1), atol=0.005)


def test_the_split_follows_its_seed_and_not_the_order_of_files(folder: Path, cache: Path) -> None:
    one, two, other = (
        data.load(tiny(data__split_seed=seed), path=folder, cache=cache, progress=False) for seed in (1, 1, 2)
    )
    assert one.split == two.split
    assert one.split["seed"] == 1
    assert one.split["parts"]["validation"] != other.split["parts"]["validation"]
    assert one.split["parts"]["test"] == other.split["parts"]["test"]
    assert one.split["given"] == ["test", "train"]


def test_a_folder_without_parts_is_split(tmp_path: Path, cache: Path) -> None:
    made = data.load(tiny(), path=fill(tmp_path / "x", {"a": 20, "b": 10}), cache=cache, progress=False)
    assert [len(part) for part in made.parts] == [21, 3, 6]
    assert made.test.targets.bincount().tolist() == [4, 2]


def test_copies_of_a_picture_stay_in_one_part(tmp_path: Path, cache: Path) -> None:
    root = fill(tmp_path / "x", {"a": 10, "b": 10})
    for i in range(10):
        (root / "a" / f"copy {i}.png").write_bytes((root / "a" / f"{i:03d}.png").read_bytes())
    made = data.load(tiny(), path=root, cache=cache, progress=False)
    train, validation, test = contents(made)
    assert not train & test
    assert not train & validation
    assert made.notes == ()


def test_twins_across_parts_that_the_user_made_are_noted(folder: Path, cache: Path) -> None:
    (folder / "test" / "a" / "twin.png").write_bytes((folder / "train" / "b" / "000.png").read_bytes())
    made = data.load(tiny(), path=folder, cache=cache, progress=False)
    assert any("byte for byte" in note for note in made.notes) or "train/b/000.png" not in made.split["parts"]["train"]


def test_a_class_too_small_for_each_part_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"'b' \(2\)") as caught:
        data.load(tiny(), path=fill(tmp_path / "x", {"a": 9, "b": 2}), cache=cache, progress=False)
    assert "at least 3" in caught.value.hint


def test_training_pictures_are_what_a_worker_decodes(folder: Path, digits: Dataset, cache: Path) -> None:
    made = data.load(tiny(data__resize="crop"), path=folder, cache=cache, progress=False)
    for each, image in ((made, ImageInput(3, 8, 8, "crop")), (digits, ImageInput(1, 16, 16))):
        inputs, _ = each.test.take(torch.arange(5))
        for i, row in enumerate(each.test.rows[:5].tolist()):
            wanted = images.decode(each.raw(row).data, image, Limits())
            assert np.array_equal(inputs[i].numpy(), wanted)
            assert inputs.dtype == torch.uint8


def test_bundled_digits_are_scikit_learns(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    raw = digits.raw(7)
    assert raw.suffix == ".png"
    decoded = images.decode(raw.data, ImageInput(1, 8, 8), Limits())
    assert np.array_equal(np.round(decoded[0] / 255 * 16), found.images[7])
    assert digits.classes == tuple("0123456789")


def test_a_row_as_json_is_the_row_that_was_learned(diabetes: Dataset) -> None:
    inputs, _ = diabetes.test.take(torch.arange(10))
    for i, row in enumerate(diabetes.test.rows[:10].tolist()):
        assert np.array_equal(np.array(json.loads(diabetes.raw(row).data), dtype=np.float32), inputs[i].numpy())


def test_streaming_is_memory(folder: Path, cache: Path) -> None:
    held = data.load(tiny(), path=folder, cache=cache, progress=False)
    streamed = data.load(tiny(data__memory_limit=100), path=folder, cache=cache, progress=False)
    assert (held.streamed, streamed.streamed) == (False, True)
    positions = torch.tensor([2, 0, 1, 1])
    for one, two in zip(held.parts, streamed.parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.take(positions), two.take(positions), strict=True))


def test_pictures_are_decoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.load(tiny(), path=folder, cache=tmp_path, progress=False)

    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("marwright.learning.decoded.pixels", fail)
    data.load(tiny(training__epochs=9), path=folder, cache=tmp_path, progress=False)
    with pytest.raises(AssertionError, match="decoded again"):
        data.load(tiny(data__height=9), path=folder, cache=tmp_path, progress=False)
    names = sorted(path.suffix for path in (tmp_path / "decoded").iterdir())
    assert names == [".json", ".npy"]


def test_ctrl_c_while_decoding_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("marwright.learning.decoded.pixels", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load(tiny(), path=folder, cache=tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_order_holds_each_position_once_and_follows_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.zeros(1000, 3, dtype=torch.uint8)

    def made(seed: int) -> list[int]:
        return order(1000, inputs, generator=torch.Generator().manual_seed(seed)).tolist()

    assert sorted(made(0)) == list(range(1000))
    assert made(0) == made(0) != made(1)
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 30)
    monkeypatch.setattr(dataset, "WINDOW_BYTES", 300)
    blocked = made(0)
    assert sorted(blocked) == list(range(1000))
    assert blocked == made(0) != made(1)
    assert len({position // 10 for position in blocked[:100]}) == 10  # a window reads ten blocks, not a hundred


def test_an_unreachable_download_names_the_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    before, started = socket.getdefaulttimeout(), time.monotonic()
    for name in ("mnist", "cifar10"):
        with pytest.raises(DataError, match="could not be downloaded") as caught:
            data.load(recipe.load(name, recipes_dir=RECIPES), cache=tmp_path, progress=False)
        assert "digits, diabetes-mlp and diabetes-linear need no download" in caught.value.hint
        assert f"--recipe {name} --data PATH" in caught.value.hint
    assert time.monotonic() - started < 30
    assert socket.getdefaulttimeout() == before


def test_a_downloaded_set_is_given_its_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision import datasets

    class Fake:
        classes = tuple("ab")

        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            count = 6 if train else 4
            self.data = np.random.default_rng(train).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            self.targets = [i % 2 for i in range(count)]

        def __len__(self) -> int:
            return len(self.targets)

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    found = bundled.downloaded("cifar10", tmp_path)
    assert found.parts == ["train"] * 6 + ["test"] * 4
    assert found.classes == ("a", "b")


def test_a_mnist_recipe_takes_a_folder_instead_of_the_download(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "mine"
    for label in "01":
        (root / label).mkdir(parents=True)
        for i in range(6):
            (root / label / f"{i}.png").write_bytes(picture(i + 10 * int(label), size=(28, 28)))
    made = data.load(recipe.load("mnist", recipes_dir=RECIPES), path=root, cache=cache, progress=False)
    assert made.train.inputs.shape[1:] == (1, 16, 16)


def test_the_classes_are_known_without_decoding(folder: Path, tmp_path: Path) -> None:
    assert data.classes(tiny(), folder) == ("a", "b", "c")
    assert data.classes(recipe.load("digits", recipes_dir=RECIPES)) == tuple("0123456789")
    assert data.classes(recipe.load("diabetes-linear", recipes_dir=RECIPES)) == ()
