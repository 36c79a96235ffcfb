"""What is learned from and what judges: by time, once each, no source too loud, nobody judged on what it learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handlers.spec import ImageInput, Limits
from marwright.errors import DataError
from marwright.feedback import selection
from marwright.feedback.selection import Selection
from marwright.feedback.values import Labelled
from marwright.learning import data
from marwright.learning.dataset import Dataset
from marwright.release.policy import LearnPolicy
from tests.feedback.teaching import labelled
from tests.learning.conftest import fill, picture, tiny

CLASSES = ("a", "b", "c")
Answer = Callable[..., Labelled]


@pytest.fixture
def answer(tmp_path: Path) -> Answer:
    """`answer(7, "a")`: picture 7, labelled, answered in second 7."""

    def make(seed: int, label: str, *, kind: str = "PNG", **changes: object) -> Labelled:
        path = tmp_path / "bodies" / f"{seed}.{kind.lower()}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(9000 + seed, kind=kind))
        made = labelled(path, label, at=float(seed))
        return replace(made, **changes)  # type: ignore[arg-type]

    return make


def select(given: list[Labelled], *, learned: tuple[str, ...] = (), **policy: object) -> Selection:
    return selection.select(given, LearnPolicy(**policy), classes=CLASSES, learned=learned)  # type: ignore[arg-type]


def test_the_latest_are_the_judges_alone_whatever_the_order_they_come_in(answer: Answer) -> None:
    given = [answer(i, "abc"[i % 3]) for i in range(20)]
    chosen = select(given[::-1], judge_share=0.25)
    assert [one.time for one in chosen.learn] == list(range(15))
    assert [one.time for one in chosen.judge] == list(range(15, 20))
    assert chosen.fresh == (*chosen.learn, *chosen.judge)
    assert chosen.notes == ()


def test_what_the_champion_has_learned_from_is_learned_again_and_judges_never(answer: Answer) -> None:
    given = [answer(i, "a") for i in range(20)]
    learned = tuple(one.digest for one in given[10:])
    chosen = select(given, learned=learned, judge_share=0.3)
    assert [one.time for one in chosen.judge] == [7, 8, 9]
    assert len(chosen.learn) == 17
    assert [one.time for one in chosen.fresh] == list(range(10))


def test_a_picture_counts_once_and_from_its_first_request_on(answer: Answer) -> None:
    given = [answer(i, "a") for i in range(10)]
    again = replace(given[0], request="again", time=99.0, labelled_at=100.0)
    chosen = select([*given, again], judge_share=0.2)
    assert [one.time for one in chosen.judge] == [8, 9]
    assert sum(one.digest == given[0].digest for one in chosen.learn) == 1
    assert chosen.notes == ("1 labelled requests brought a picture that was there already",)


@pytest.mark.parametrize(
    ("conflict", "labels", "counts"),
    [
        ("last", "aab", "b"),
        ("first", "aab", "a"),
        ("majority", "aab", "a"),
        ("majority", "abb", "b"),
        ("majority", "ab", None),
        ("majority", "abc", None),
    ],
)
def test_requests_with_the_same_picture_vote(answer: Answer, conflict: str, labels: str, counts: str | None) -> None:
    first = answer(1, "a")
    given = [
        replace(first, request=f"r{i}", label=label, time=float(i), labelled_at=10.0 + i, source=label)
        for i, label in enumerate(labels)
    ]
    others = [answer(i, "c") for i in range(50, 60)]
    chosen = select([*given, *others], conflict=conflict)
    found = [one for one in chosen.learn if one.digest == first.digest]
    assert [(one.label, one.source, one.time) for one in found] == ([(counts, counts, 0.0)] if counts else [])
    assert f"{int(counts is None)} are left out" in chosen.notes[1]


def test_labels_at_the_same_time_that_differ_decide_nothing(answer: Answer) -> None:
    first = answer(1, "a")
    chosen = select([first, replace(first, request="r", label="b"), answer(2, "c")])
    assert {one.label for one in (*chosen.learn, *chosen.judge)} == {"c"}


def test_what_cannot_be_learned_from_is_counted(answer: Answer) -> None:
    given = [answer(i, "a") for i in range(5)]
    given += [answer(6, "zebra"), replace(answer(7, "a"), path=None, digest="")]
    chosen = select(given)
    assert len(chosen.learn) + len(chosen.judge) == 5
    assert chosen.notes == (
        "1 labelled answers have no picture to learn from: none was kept",
        "1 labels name no class of the model: 'zebra'",
    )


def test_one_client_has_no_more_than_its_share_of_a_class(answer: Answer) -> None:
    loud = [answer(i, "a", source="loud") for i in range(60)]
    others = [answer(100 + i, "a", source=f"s{i % 4}") for i in range(20)]
    calm = [answer(200 + i, "b", source=f"s{i % 2}") for i in range(10)]
    chosen = select([*loud, *others, *calm], max_source_share=0.5, judge_share=0.001)
    counts = Counter((one.label, one.source) for one in chosen.learn)
    assert counts["a", "loud"] == 20
    assert sum(count for (label, _), count in counts.items() if label == "a") == 40
    assert sum(count for (label, _), count in counts.items() if label == "b") == 10
    assert chosen.notes == (
        "40 new examples are left out, as no source may have more than 0.5 of a class's: 40 of 'a' from 'loud'",
    )


def test_a_share_holds_for_the_judge_too_and_a_source_alone_has_none(answer: Answer) -> None:
    given = [answer(i, "a", source="one") for i in range(20)]
    given += [answer(100 + i, "a", source=f"s{i % 3}") for i in range(12)]
    given += [answer(200 + i, "a", source="loud") for i in range(8)]
    chosen = select(given, max_source_share=0.4, judge_share=0.5)
    for part in (chosen.learn, chosen.judge):
        counts = Counter(one.source for one in part)
        assert all(count <= 0.4 * len(part) for count in counts.values())
    assert chosen.learn == ()
    assert len(chosen.judge) > 12


def test_a_share_leaves_alone_what_is_learned_already(answer: Answer) -> None:
    given = [answer(i, "a", source="one") for i in range(20)]
    chosen = select(given, learned=tuple(one.digest for one in given), max_source_share=0.1)
    assert len(chosen.learn) == 20


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0.05, 0.99),
)
def test_no_source_exceeds_its_share_and_no_more_than_needed_is_left_out(counts: list[int], share: float) -> None:
    limit = selection._limit(counts, share)
    kept = [min(count, limit) for count in counts]
    assert max(kept) <= share * sum(kept) + 1e-6
    if limit < max(counts):
        more = [min(count, limit + 1) for count in counts]
        assert max(more) > share * sum(more)


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc"), st.floats(0, 100)), max_size=40), st.data())
def test_nothing_is_in_both_and_the_judge_is_later(drawn: list[tuple[int, str, float]], data_: st.DataObject) -> None:
    bare = Labelled(
        "", 0, "m", "1.0", "", 0.0, "a", None, None, None, None, {}, "", Path("x.png"), "a", "s", 0.0
    )  # fmt: skip
    given = [
        replace(bare, request=f"r{i}", digest=f"{number:064x}", label=label, time=time, labelled_at=time)
        for i, (number, label, time) in enumerate(drawn)
    ]
    learned = data_.draw(st.sets(st.sampled_from([one.digest for one in given]))) if given else set()
    chosen = selection.select(given, LearnPolicy(judge_share=0.3), classes=CLASSES, learned=learned)
    learn, judge = ({one.digest for one in part} for part in (chosen.learn, chosen.judge))
    assert len(learn) == len(chosen.learn)
    assert not learn & judge
    assert not learned & judge
    new = [one.time for one in chosen.learn if one.digest not in learned]
    assert not new or not judge or max(new) <= min(one.time for one in chosen.judge)
    assert len(judge) == round(0.3 * (len(new) + len(judge)))


# ------------------------------------------------------------------------------------------------ into a data set


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return fill(tmp_path / "own", {"a": 12, "b": 12, "c": 12})


def load(own: Path, chosen: Selection, **options: object) -> Dataset:
    taught = selection.examples(chosen, tiny())
    return data.load(
        tiny(), path=own, feedback=taught, cache=own.parent / "cache", progress=False, **options  # type: ignore[arg-type]
    )  # fmt: skip


def test_what_is_learned_from_is_in_train_and_validation_and_never_in_test(own: Path, answer: Answer) -> None:
    chosen = select([answer(i, "abc"[i % 3]) for i in range(100)])
    made = load(own, chosen)
    before = data.load(tiny(), path=own, cache=own.parent / "cache", progress=False)
    assert set(made.split["new"]) == {one.digest for one in chosen.learn} == set(made.digests.values())
    assert len(made.test) == len(before.test)
    assert len(made.train) > len(before.train)
    assert len(made.validation) > len(before.validation)
    names = [name for part in made.split["parts"].values() for name in part if name.startswith("new/")]
    assert sorted(names) == sorted(f"new/feedback/{one.digest}" for one in chosen.learn)
    assert not any(one.request in name for one in chosen.learn for name in names)
    for part in (made.train, made.validation):
        for row, target in zip(part.rows.tolist(), part.targets.tolist(), strict=True):
            if row in made.digests:
                assert made.split["new"][made.digests[row]] == made.classes[target]


def test_an_example_stays_in_its_part_as_more_arrive(own: Path, answer: Answer) -> None:
    def validated(chosen: Selection) -> set[str]:
        taught = selection.examples(chosen, tiny())
        return {digest for digest, part in zip(taught.digests, taught.parts, strict=True) if part == "validation"}

    few = select([answer(i, "a") for i in range(60)])
    many = select([answer(i, "a") for i in range(120)])
    assert validated(few)
    assert validated(few) <= validated(many)


def test_a_folder_and_production_are_deduplicated_together(own: Path, answer: Answer, tmp_path: Path) -> None:
    given = [answer(i, "a") for i in range(20)]
    chosen = select(given)
    new = tmp_path / "new"
    for label, one in (("a", given[0]), ("b", given[1])):
        (new / label).mkdir(parents=True)
        assert one.path is not None
        (new / label / "x.png").write_bytes(one.path.read_bytes())
    made = load(own, chosen, new=new)
    assert given[0].digest in made.split["new"]
    assert given[1].digest not in made.split["new"]
    assert "1 new examples were there more than once" in made.notes
    assert any(note == "2 new examples have more than one label, left out: b/x.png" for note in made.notes)


def test_production_cannot_contradict_the_recipes_own_data(own: Path, answer: Answer) -> None:
    body = (own / "a" / "003.png").read_bytes()
    path = own.parent / "known.png"
    path.write_bytes(body)
    chosen = select([labelled(path, "b", at=0.0), *(answer(i, "a") for i in range(1, 9))])
    made = load(own, chosen)
    assert labelled(path, "b", at=0.0).digest not in made.split["new"]
    said = [note for note in made.notes if "contradict the recipe's data, left out" in note]
    assert said == ["1 new examples contradict the recipe's data, left out"], "and no hash, which a report would keep"


def test_other_classes_are_refused(own: Path, answer: Answer) -> None:
    chosen = selection.select([answer(1, "x")], LearnPolicy(), classes=("x", "y"))
    with pytest.raises(DataError, match="production's examples are of the classes x, y"):
        load(own, chosen)


def test_a_file_that_a_power_cut_made_short_is_left_out(own: Path, answer: Answer) -> None:
    given = [answer(i, "a") for i in range(10)]
    for one in (given[0], given[9]):  # one is learned from, one is the judge's
        assert one.path is not None
        one.path.write_bytes(one.path.read_bytes()[:0])
    chosen = select(given)
    assert given[0].digest in {one.digest for one in chosen.learn}
    assert given[9].digest in {one.digest for one in chosen.judge}
    made = load(own, chosen)
    assert given[0].digest not in made.split["new"]
    assert given[1].digest in made.split["new"]
    assert "1 new files cannot be read as pictures" in made.notes
    kept = selection.apart(chosen, tiny(), made).judge
    assert given[9].digest not in {one.digest for one in kept}
    assert kept


def test_a_file_that_goes_while_it_is_used_ends_the_turn(own: Path, answer: Answer) -> None:
    given = [answer(i, "a") for i in range(10)]
    assert given[0].path is not None
    given[0].path.unlink()
    with pytest.raises(DataError, match="went while it was used"):
        load(own, select(given))


# ------------------------------------------------------------------------------------------------ the judge's


def test_the_judge_has_no_picture_that_was_learned_from_however_it_was_written(own: Path, answer: Answer) -> None:
    given = [answer(i, "a") for i in range(16)]
    known = own.parent / "known.bmp"
    with Image.open(own / "a" / "003.png") as opened:
        opened.save(known)
    twin = own.parent / "twin.bmp"
    assert given[2].path is not None
    with Image.open(given[2].path) as opened:
        opened.save(twin)
    broken = own.parent / "broken.png"
    broken.write_bytes(b"no picture")
    late = [labelled(path, "a", at=100.0 + i) for i, path in enumerate((known, twin, broken))]
    chosen = select([*given, *late], judge_share=0.3)
    assert len(chosen.judge) == 6
    kept = selection.apart(chosen, tiny(), load(own, chosen))
    assert [one.time for one in kept.judge] == [13, 14, 15]
    assert kept.learn == chosen.learn
    assert kept.notes[-1].startswith("3 of the latest pictures do not judge")


def test_of_twins_before_the_judge_one_stays_and_of_contradicting_ones_none(own: Path, answer: Answer) -> None:
    given = [answer(i, "a") for i in range(12)]
    pairs = [answer(20, "a"), answer(20, "a", kind="BMP", time=21.0), answer(22, "a")]
    pairs.append(answer(22, "b", kind="BMP", time=23.0))
    chosen = select([*given, *pairs], judge_share=0.25)
    assert [one.time for one in chosen.judge] == [20.0, 21.0, 22.0, 23.0]
    kept = selection.apart(chosen, tiny(), load(own, chosen))
    assert [one.time for one in kept.judge] == [20.0]


def test_the_judge_sees_what_a_worker_sees(answer: Answer, tmp_path: Path) -> None:
    given = [answer(i, "abc"[i % 3]) for i in range(5)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    given.insert(2, labelled(broken, "a", at=2.5))
    inputs, labels = selection.arrays(given, ImageInput(3, 8, 8), Limits(), CLASSES)
    assert (inputs.shape, inputs.dtype, labels.tolist()) == ((5, 3, 8, 8), np.uint8, [0, 1, 2, 0, 1])
    none, empty = selection.arrays([], ImageInput(3, 8, 8), Limits(), CLASSES)
    assert (none.shape, len(empty)) == ((0, 3, 8, 8), 0)
