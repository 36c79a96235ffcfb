"""Newly labelled examples: nobody changes its part, nothing is learned twice, and nothing odd stops the others."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers import images
from handlers.spec import ImageInput, Limits
from marwright.errors import DataError
from marwright.learning import additions, data, decoded, golden, recipe, splitting, training
from marwright.learning.dataset import Chain, Dataset
from marwright.learning.recipe import Recipe
from marwright.runs import Run
from tests.learning.conftest import RECIPES, fill, members, picture, tiny, zipped

Load = Callable[..., Dataset]
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


def places(made: Dataset) -> dict[bytes, str]:
    """Body → the part that it is in."""
    return {made.raw(row).data: part.name for part in made.parts for row in part.rows.tolist()}


def label(made: Dataset, body: bytes) -> str:
    for part in made.parts:
        for row, target in zip(part.rows.tolist(), part.targets.tolist(), strict=True):
            if made.raw(row).data == body:
                return made.classes[target]
    raise AssertionError("not in the data set")


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Three classes, to be split."""
    return fill(tmp_path / "own", {"a": 12, "b": 12, "c": 12})


def forty(root: Path) -> Path:
    """Forty new pictures of a and b."""
    for name, hue in (("a", 0), ("b", 1)):
        (root / name).mkdir(parents=True)
        for i in range(20):
            (root / name / f"{i}.png").write_bytes(picture(1000 + 100 * hue + i, hue=hue))
    return root


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return forty(tmp_path / "new")


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Own examples, new ones, a cache."""
    root = tmp_path_factory.mktemp("sets")
    return fill(root / "own", {"a": 12, "b": 12, "c": 12}), forty(root / "new"), root / "cache"


@pytest.fixture
def load(own_folder: Path, tmp_path: Path) -> Load:
    def load(new: Path | None = None, chosen: Recipe | None = None) -> Dataset:
        return data.load(chosen or tiny(), path=own_folder, new=new, cache=tmp_path / "cache", progress=False)

    return load


def test_own_examples_stay_in_their_part_and_new_ones_join(load: Load, new: Path) -> None:
    before, after = load(), load(new)
    was, now = places(before), places(after)
    assert len(now) == len(was) + 40
    assert {body: now[body] for body in was} == was
    assert after.digest != before.digest
    assert after.split["own"] == before.digest
    assert sorted(after.split["new"].values()) == ["a"] * 20 + ["b"] * 20
    assert {part for body, part in now.items() if body not in was} == {"train", "validation", "test"}
    assert sum(name.startswith("new/a/") for part in after.split["parts"].values() for name in part) == 20
    assert (before.split["new"], before.notes, after.notes) == ({}, (), ())


def test_an_example_stays_where_it_was_as_more_arrive(load: Load, new: Path) -> None:
    early = places(load(new))
    for i in range(100):
        (new / "b" / f"later {i}.png").write_bytes(picture(3000 + i, hue=1))
    late = places(load(new))
    assert len(late) == len(early) + 100
    assert {body: late[body] for body in early} == early


@given(digest=DIGESTS, seed=st.integers(0, 2**63 - 1), shares=st.tuples(st.floats(0.01, 0.45), st.floats(0.01, 0.45)))
def test_a_larger_test_share_takes_nobody_out_of_test(digest: str, seed: int, shares: tuple[float, float]) -> None:
    small, large = sorted(shares)
    one, two = (
        splitting.by_content(digest, seed=seed, validation_share=0.1, test_share=share) for share in (small, large)
    )
    assert two == "test" or one != "test"


@settings(max_examples=20, deadline=None)
@given(chosen=st.sets(st.integers(0, 39)))
def test_a_part_does_not_depend_on_the_company(chosen: set[int], two_sets: tuple[Path, Path, Path]) -> None:
    """Whichever new ones are there: each is in the part that it has among all, and the own ones are where they were."""
    own, new, cache = two_sets
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder) / "some"
        for i, path in enumerate(sorted(new.rglob("*.png"))):
            if i in chosen:
                (some / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, some / path.parent.name / path.name)
        some.mkdir(exist_ok=True)
        made, whole = (data.load(tiny(), path=own, new=each, cache=cache, progress=False) for each in (some, new))
        few, all_of_them = places(made), places(whole)
    assert len(few) == len(all_of_them) - 40 + len(chosen)
    assert few == {body: all_of_them[body] for body in few}


def test_shares_of_new_examples_are_the_recipes() -> None:
    parts = [splitting.by_content(f"{i:064x}", seed=0, validation_share=0.1, test_share=0.2) for i in range(20_000)]
    assert parts.count("test") / 20_000 == pytest.approx(0.2, abs=0.01)
    assert parts.count("validation") / 20_000 == pytest.approx(0.1, abs=0.01)


def test_given_parts_stay_and_new_examples_are_split_all_the_same(folder: Path, new: Path, tmp_path: Path) -> None:
    before, after = (
        data.load(tiny(), path=folder, new=each, cache=tmp_path / "cache", progress=False) for each in (None, new)
    )
    was, now = places(before), places(after)
    assert {body: now[body] for body in was} == was
    assert len(after.test) > len(before.test)


def test_one_new_example_of_one_class_is_enough(load: Load, tmp_path: Path) -> None:
    where = tmp_path / "one"
    (where / "c" / "2026" / "may").mkdir(parents=True)
    (where / "a").mkdir()
    body = picture(77, hue=2)
    (where / "c" / "2026" / "may" / "x.png").write_bytes(body)
    made = load(where)
    assert label(made, body) == "c"
    assert sum(map(len, made.parts)) == 37


def test_a_zip_is_its_folder_and_a_folder_around_it_changes_nothing(load: Load, new: Path, tmp_path: Path) -> None:
    one, two = load(new), load(zipped(new, tmp_path / "x.zip"))
    outer = tmp_path / "outer" / "labelled"
    shutil.copytree(new, outer)
    assert one.digest == two.digest == load(outer.parent).digest
    assert one.split == two.split
    assert places(one) == places(two)


def test_names_and_order_are_not_content(load: Load, new: Path) -> None:
    before = load(new).digest
    for path in sorted((new / "a").iterdir()):
        path.rename(path.with_name(f"z{hash(path.name) % 100_000}-{path.name}"))
    assert load(new).digest == before
    (new / "a" / "another.png").write_bytes(picture(5000))
    assert load(new).digest != before


def test_what_is_there_already_is_dropped_with_a_note(load: Load, own_folder: Path, new: Path) -> None:
    clean = load(new)
    for i, path in enumerate(sorted((own_folder / "a").iterdir())[:5]):
        shutil.copy(path, new / "a" / f"known {i}.png")
    shutil.copy(new / "b" / "0.png", new / "b" / "again.png")
    made = load(new)
    assert made.digest == clean.digest
    assert set(made.notes) == {
        "5 new examples were in the recipe's data already",
        "1 new examples were there more than once",
    }
    train, test = (
        {picture.numpy().tobytes() for picture in part.take(torch.arange(len(part)))[0]}
        for part in (made.train, made.test)
    )
    assert not train & test


def test_a_picture_that_was_only_written_otherwise_is_the_same(load: Load, own_folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "again"
    (where / "a").mkdir(parents=True)
    (where / "a" / "x.bmp").write_bytes(picture(1, kind="BMP"))
    assert (own_folder / "a" / "000.png").read_bytes() == picture(1)
    made = load(where)
    assert made.digest == load().digest
    assert made.notes == ("1 new examples were in the recipe's data already",)


def test_a_bundled_example_that_comes_back_as_a_request_is_known(digits: Dataset, cache: Path, tmp_path: Path) -> None:
    for part in digits.parts:
        for position in (0, 5):
            row, target = int(part.rows[position]), int(part.targets[position])
            (tmp_path / str(target)).mkdir(exist_ok=True)
            (tmp_path / str(target) / f"{row}.png").write_bytes(digits.raw(row).data)
    made = data.load(recipe.load("digits", recipes_dir=RECIPES), new=tmp_path, cache=cache, progress=False)
    assert made.digest == digits.digest
    assert made.notes == ("6 new examples were in the recipe's data already",)


def test_a_label_against_the_own_data_is_left_out(load: Load, own_folder: Path, new: Path) -> None:
    clean = load(new)
    body = (own_folder / "a" / "003.png").read_bytes()
    (new / "b" / "wrong.png").write_bytes(body)
    made = load(new)
    assert made.digest == clean.digest
    assert label(made, body) == "a"
    assert made.notes == ("1 new examples contradict the recipe's data, left out: b/wrong.png",)


def test_of_new_examples_that_contradict_each_other_none_is_used(load: Load, new: Path) -> None:
    body = (new / "a" / "4.png").read_bytes()
    (new / "b" / "wrong.png").write_bytes(body)
    made = load(new)
    assert body not in places(made)
    assert len(made.split["new"]) == 39
    assert made.notes == ("2 new examples have more than one label, left out: a/4.png, b/wrong.png",)


def test_twins_in_two_parts_are_left_to_training(load: Load, tmp_path: Path) -> None:
    """The same picture as PNG and as BMP: two contents, two parts."""
    where = tmp_path / "twins"
    (where / "a").mkdir(parents=True)
    for seed in range(2000, 2030):
        for kind in ("PNG", "BMP"):
            (where / "a" / f"{seed}.{kind.lower()}").write_bytes(picture(seed, kind=kind))
    made = load(where)
    assert "30 new examples were there more than once" in made.notes
    for seed in range(2000, 2030):
        bodies = [picture(seed, kind=kind) for kind in ("PNG", "BMP")]
        kept = [body for body in bodies if body in places(made)]
        assert len(kept) == 1
        apart = {
            splitting.by_content(hashlib.sha256(body).hexdigest(), seed=0, validation_share=0.1, test_share=0.2)
            for body in bodies
        }
        assert places(made)[kept[0]] == min(apart, key=("train", "validation", "test").index)


def test_unknown_classes_are_all_named(load: Load, new: Path) -> None:
    for name in ("zebra", "A"):
        (new / name).mkdir()
        (new / name / "1.png").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"'A' \(1 files\), 'zebra' \(1 files\)") as caught:
        load(new)
    assert "known are: 'a', 'b', 'c'" in caught.value.hint


def test_unfinished_copies_and_what_cannot_be_read_stop_nobody(load: Load, new: Path) -> None:
    clean = load(new).digest
    half = picture(1)[:100]
    for name in (".hidden.png", "x.png.part", "y.tmp", "z.png.crdownload", ".x.png.Ab12Cd"):
        (new / "a" / name).write_bytes(half)
    (new / "b" / "cut.png").write_bytes(half)
    (new / "notes.txt").write_text("hello", encoding="utf-8")
    made = load(new)
    assert made.digest == clean
    assert set(made.notes) == {
        "3 unfinished copies were left for later",
        "1 new files that are in no class folder were ignored",
        "1 new files cannot be read as pictures: b/cut.png",
    }
    (new / "b" / "cut.png").write_bytes(picture(6000, hue=1))
    assert len(load(new).split["new"]) == 41


def test_nothing_new_is_the_recipes_own_data(load: Load, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    (empty / "a").mkdir(parents=True)
    assert load(empty).digest == load().digest
    assert load(members(tmp_path / "empty.zip", [])).split == load().split
    with pytest.raises(DataError, match="no folder or zip"):
        load(tmp_path / "missing")
    (tmp_path / "broken.zip").write_bytes(b"PK half a zip")
    with pytest.raises(DataError, match="is not a folder or a zip"):
        load(tmp_path / "broken.zip")


def test_a_file_that_changes_under_way_is_said_and_not_learned(
    load: Load, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = decoded.store

    def changes(*args: object, cache: Path, **options: object) -> object:
        if cache.parent.name == "new":
            (new / "a" / "3.png").write_bytes(picture(9999))
            (new / "b" / "3.png").unlink()
        return store(*args, cache=cache, **options)

    monkeypatch.setattr(decoded, "store", changes)
    with pytest.raises(DataError, match=r"3\.png changed or went while it was used"):
        load(new)
    monkeypatch.undo()
    assert len(load(new).split["new"]) == 39


def test_new_pictures_are_what_a_worker_decodes_streamed_or_held(load: Load, new: Path) -> None:
    held, streamed = load(new), load(new, tiny(data__memory_limit=1))
    assert (held.streamed, streamed.streamed) == (False, True)
    for one, two in zip(held.parts, streamed.parts, strict=True):
        inputs, targets = one.take(torch.arange(len(one)))
        assert all(torch.equal(a, b) for a, b in zip((inputs, targets), two.take(torch.arange(len(two))), strict=True))
        for row, seen in zip(one.rows.tolist(), inputs, strict=True):
            assert np.array_equal(seen.numpy(), images.decode(held.raw(row).data, ImageInput(3, 8, 8), Limits()))


def test_only_the_last_turns_pictures_are_kept_on_disk(load: Load, new: Path, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "new" / "tiny" / "decoded"
    load(new)
    first = {path.name for path in kept.iterdir()}
    (kept / ".x.npy.abc.part").write_bytes(b"of a killed turn")
    (new / "a" / "one more.png").write_bytes(picture(7000))
    load(new)
    assert len(first) == len(list(kept.iterdir())) == 2
    assert first.isdisjoint(path.name for path in kept.iterdir())


def test_rows_of_numbers_take_no_pictures(new: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="rows of numbers") as caught:
        data.load(recipe.load("diabetes-linear", recipes_dir=RECIPES), new=new, cache=cache, progress=False)
    assert "--new" in caught.value.hint


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), data_=st.data())
def test_a_chain_is_the_tensor_of_its_stores(sizes: list[int], data_: st.DataObject) -> None:
    whole = torch.arange(sum(sizes) * 6, dtype=torch.uint8).reshape(-1, 2, 3)
    chain = Chain(tuple(whole.split(sizes)))
    rows = torch.tensor(data_.draw(st.lists(st.integers(0, len(whole) - 1), max_size=12)), dtype=torch.int64)
    assert torch.equal(chain.index_select(0, rows), whole.index_select(0, rows))
    assert torch.equal(chain[len(whole) - 1], whole[-1])
    assert (len(chain), chain.element_size()) == (len(whole), 1)


@pytest.mark.usefixtures("plain_reports")
def test_a_run_knows_what_it_has_learned_from(load: Load, new: Path, own_folder: Path, tmp_path: Path) -> None:
    quick = tiny(training__epochs=1)

    def trained(made: Dataset) -> Run:
        return training.train(quick, made, tmp_path / "runs", progress=False)

    old, both = trained(load()), trained(load(new))
    assert additions.since(load(), old).nothing
    assert additions.since(load(new), both).nothing
    assert additions.since(load(new), old) == additions.Difference(own=False, added=40, gone=0)
    gone = additions.since(load(), both)
    assert gone == additions.Difference(own=False, added=0, gone=40)
    assert gone.nothing, "a folder that is away for a while is no reason to forget"
    (new / "a" / "5.png").rename(new / "b" / "5 of a.png")
    assert additions.since(load(new), both) == additions.Difference(own=False, added=1, gone=1)
    (own_folder / "c" / "more.png").write_bytes(picture(8000, hue=2))
    assert additions.since(load(), old).own
    assert (both.about["new_examples"], old.about["new_examples"]) == (40, 0)


def test_what_travels_with_a_model_is_the_recipes_own(load: Load, new: Path, tmp_path: Path) -> None:
    """Both are the same files, whatever else was learned from: golden examples, and those that a gate judges by."""
    own, both = load(), load(new)
    assert len(both.test) > len(own.test)
    assert set(both.digests.values()) == set(both.split["new"])
    for made, where in ((own, "golden-own"), (both, "golden-both")):
        golden.write(made, tmp_path / where)
    written = {
        where: {path.relative_to(tmp_path / where): path.read_bytes() for path in (tmp_path / where).rglob("*.*")}
        for where in ("golden-own", "golden-both")
    }
    assert len(written["golden-own"]) == 18
    assert written["golden-own"] == written["golden-both"]


def test_own_rows_have_no_digest_and_new_ones_that_of_their_body(load: Load, new: Path) -> None:
    assert load().digests == {}
    made = load(new)
    for part in made.parts:
        for row in part.rows.tolist():
            digest = hashlib.sha256(made.raw(row).data).hexdigest()
            assert made.digests.get(row) == (digest if digest in made.split["new"] else None)
