"""Folders and zips of pictures: what can be learned from is found, what cannot is said."""

from __future__ import annotations

import unicodedata
import zipfile
from pathlib import Path

import pytest
import torch

from marwright.errors import DataError
from marwright.learning import data, folders
from tests.learning.conftest import fill, members, picture, tiny, zipped


def refused(where: Path) -> str:
    with pytest.raises(DataError) as caught:
        folders.find(where)
    assert caught.value.hint
    return caught.value.message


def test_a_folder_with_parts_is_kept_as_it_is(folder: Path) -> None:
    found = folders.find(folder)
    assert found.classes == ("a", "b", "c")
    assert sorted(set(found.parts)) == ["test", "train"]
    assert (found.parts.count("train"), found.parts.count("test")) == (30, 12)


def test_a_folder_and_its_zip_are_the_same_data(folder: Path, tmp_path: Path) -> None:
    one, two = folders.find(folder), folders.find(zipped(folder, tmp_path / "pictures.zip"))
    assert one.digest == two.digest
    assert list(one.names) == list(two.names)
    assert one.raw(5).data == two.raw(5).data


def test_folders_around_it_all_change_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    folder.rename(tmp_path / "outer" / "inner" / "set")
    (tmp_path / "outer" / "README").write_text("hello", encoding="utf-8")
    found = folders.find(tmp_path / "outer")
    assert found.classes == ("a", "b", "c")
    assert found.digest == folders.find(tmp_path / "outer" / "inner" / "set").digest


def test_one_other_byte_is_other_data(folder: Path) -> None:
    before = folders.find(folder).digest
    (folder / "train" / "a" / "000.png").write_bytes(picture(999))
    assert folders.find(folder).digest != before


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
def test_a_validation_folder_is_used(name: str, tmp_path: Path) -> None:
    layout = {f"{part}/{label}": 3 for part in ("train", name, "test") for label in "ab"}
    found = folders.find(fill(tmp_path / "x", layout))
    assert found.parts.count("validation") == 6


def test_subfolders_belong_to_their_class(tmp_path: Path) -> None:
    found = folders.find(fill(tmp_path / "x", {"a/old": 2, "a/new": 2, "b": 2}))
    assert found.classes == ("a", "b")
    assert len(found) == 6


def test_what_systems_leave_behind_is_ignored(folder: Path, tmp_path: Path) -> None:
    before = folders.find(folder).digest
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000.png"):
        (folder / "train" / "a" / name).write_bytes(b"noise")
    assert folders.find(folder).digest == before
    archive = zipped(folder, tmp_path / "x.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("__MACOSX/train/a/._000.png", b"noise")
    assert folders.find(archive).digest == before


def test_names_with_spaces_and_any_script_are_names(tmp_path: Path) -> None:
    labels = ("grüne Äpfel", "猫", "red car")
    root = fill(tmp_path / "my pictures", dict.fromkeys(labels, 5))
    found = folders.find(root)
    assert set(found.classes) == set(labels)
    decomposed = members(
        tmp_path / "mac made.zip",
        [unicodedata.normalize("NFD", f"{label}/{i}.png") for label in labels for i in (1, 2)],
    )
    assert set(folders.find(decomposed).classes) == set(labels)


def test_files_in_no_class_are_noted(folder: Path) -> None:
    (folder / "README.md").write_text("hello", encoding="utf-8")
    assert folders.find(folder).notes == ("1 files that are in no class folder were ignored",)


def test_an_empty_class_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "d").mkdir()
    assert "the folder train/d is empty" in refused(folder)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", picture(1))
        archive.writestr("b/1.png", picture(2))
        archive.writestr("c/", b"")
    assert "the folder c is empty" in refused(tmp_path / "x.zip")


def test_a_class_missing_from_a_part_is_refused_and_all_are_named(tmp_path: Path) -> None:
    layout = {"train/a": 3, "train/b": 3, "train/c": 3, "test/a": 3, "test/d": 3}
    said = refused(fill(tmp_path / "x", layout))
    assert "test has no examples of: 'b', 'c'" in said
    assert "train has no examples of: 'd'" in said


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    assert "one class only: 'cats'" in refused(fill(tmp_path / "x", {"cats": 5}))
    assert "one class only: 'cats'" in refused(fill(tmp_path / "y", {"train/cats": 5, "test/cats": 2}))


def test_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    assert "no folder or zip at" in refused(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds no files" in refused(tmp_path / "empty")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(picture(1))
    assert "no class folders" in refused(tmp_path / "flat")
    (tmp_path / "not.zip").write_bytes(b"hello")
    assert "is not a folder or a zip" in refused(tmp_path / "not.zip")
    assert "no train folder" in refused(fill(tmp_path / "x", {"test/a": 1, "test/b": 1, "other/a": 1}))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/1.png", "an absolute path"),
        ("C:/a/1.png", "an absolute path"),
        ("../a/1.png", "leads outside"),
        ("a/../../1.png", "leads outside"),
        ("a\\1.png", "backslashes"),
        ("a//1.png", "an empty step"),
        ("a/./1.png", "an empty step"),
    ],
)
def test_a_zip_with_odd_paths_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    said = refused(members(tmp_path / "x.zip", ["a/0.png", "b/0.png", name]))
    assert reason in said
    assert "1 members" in said


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning:zipfile")
def test_a_zip_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    names = ["a/0.png", "b/0.png", "a/0.png", unicodedata.normalize("NFD", "b/é.png"), "b/é.png"]
    said = refused(members(tmp_path / "x.zip", names))
    assert said.count("is there twice") == 2


def test_an_encrypted_or_damaged_zip_is_refused(tmp_path: Path) -> None:
    path = members(tmp_path / "x.zip", ["a/0.png", "b/0.png"])
    whole = path.read_bytes()
    locked = bytearray(whole)
    locked[6] |= 1
    locked[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(locked)
    assert "encrypted" in refused(path)
    damaged = bytearray(whole)
    damaged[60:70] = b"x" * 10
    path.write_bytes(damaged)
    assert "cannot be read" in refused(path)


def test_a_zip_is_never_extracted(folder: Path, tmp_path: Path) -> None:
    archive = zipped(folder, tmp_path / "x.zip")
    data.load(tiny(), path=archive, cache=tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").rglob("*.png"))


def test_unreadable_files_are_all_listed_or_skipped_by_choice(folder: Path, tmp_path: Path) -> None:
    bad = {
        "train/a/notes.txt": b"not a picture",
        "train/b/cut.png": picture(1)[:200],
        "test/c/empty.jpg": b"",
    }
    for name, body in bad.items():
        (folder / name).write_bytes(body)
    with pytest.raises(DataError) as caught:
        data.load(tiny(), path=folder, cache=tmp_path / "cache", progress=False)
    assert "3 of 45 files" in caught.value.message
    assert all(name in caught.value.message for name in bad)
    assert 'on_unreadable = "skip"' in caught.value.hint
    skipped = data.load(tiny(data__on_unreadable="skip"), path=folder, cache=tmp_path / "cache", progress=False)
    assert sum(map(len, skipped.parts)) == 42
    assert sorted(skipped.split["skipped"]) == sorted(bad)
    assert "3 unreadable files were skipped" in skipped.notes


def test_a_class_of_unreadable_files_only_is_missing_when_they_are_skipped(tmp_path: Path) -> None:
    root = fill(tmp_path / "x", {"train/a": 5, "train/b": 5, "test/a": 3})
    (root / "test" / "b").mkdir()
    (root / "test" / "b" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="'b' has none in test"):
        data.load(tiny(data__on_unreadable="skip"), path=root, cache=tmp_path / "cache", progress=False)


def test_pictures_over_the_limits_are_unreadable(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "a" / "big.png").write_bytes(picture(3, size=(40, 40)))
    with pytest.raises(DataError, match=r"big\.png: the image has 40×40 pixels"):
        data.load(tiny(serving__limits__max_pixels=1000), path=folder, cache=tmp_path / "cache", progress=False)


def test_a_real_zip_is_read(real: object, tmp_path: Path) -> None:
    """Forty of each class of CIFAR-10, out of the real zip, in its own layout."""
    assert callable(real)
    small = tmp_path / "cifar10.zip"
    with zipfile.ZipFile(real("cifar10.zip")) as whole, zipfile.ZipFile(small, "w") as archive:
        for name in whole.namelist():
            if name.endswith(("00.jpg", "01.jpg")) and int(name[-8:-4]) < 1000:
                archive.writestr(name, whole.read(name))
    dataset = data.load(tiny(data__height=32, data__width=32), path=small, cache=tmp_path / "cache", progress=False)
    assert len(dataset.classes) == 10
    assert [len(part) for part in dataset.parts] == [180, 20, 200]
    assert not set(dataset.train.rows.tolist()) & set(dataset.test.rows.tolist())
    assert torch.equal(dataset.train.targets.bincount(), torch.full((10,), 18))
