"""Turns of the loop with a feedback store: what is new, what was in vain, and who judges. Many turns, no server."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from marwright.errors import RolledBack
from marwright.feedback import judge
from marwright.feedback.store import Label, Picture, Store
from marwright.learning import splitting
from marwright.packing import golden
from marwright.release import journal
from scripts import retrain
from tests import test_retrain
from tests.learning.conftest import picture
from tests.test_retrain import House

house, served = test_retrain.house, test_retrain.served
POLICY = """
[trigger]
min_labels = 20
floor = 10

[judge]
min_examples = 3
"""


def turn(house: House, text: str = POLICY, **changes: object) -> tuple[retrain.Outcome, list[str]]:
    path = house.root / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return house.turn(policy=path, **changes)


def phases(house: House, count: int, text: str = POLICY) -> list[str]:
    return [turn(house, text)[0].phase for _ in range(count)]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture(9000 + number, hue=number % 2))).resize((8, 8)).save(stream, "PNG")
    return stream.getvalue()


def send(house: House, numbers: Sequence[int], *, said: float | None = None) -> None:
    """Labelled pictures; `said` is when somebody labelled them, by default now."""
    said = time.time() if said is None else said
    given = [Picture(f"{i}.png", png(i), "ab"[i % 2], "people", said + 1e-3 * place) for place, i in enumerate(numbers)]
    with Store.open(house.settings.feedback) as store:
        added = store.add_pictures("tiny", given, spec=golden.spec(house.settings.store / "tiny-1.0.mar"))
    assert added.pictures == len(numbers)


def correct(house: House, count: int) -> None:
    """So many of the oldest get another label."""
    with Store.open(house.settings.feedback) as store:
        rows = store.labelled("tiny")[:count]
        given = [Label(row.request, 0, "c", "people", time.time(), f"again-{row.request}") for row in rows]
        assert store.add_labels(given).labels == count


def refusals(house: House) -> int:
    with Store.open(house.settings.feedback) as store:
        return len(store.notes("refused", "tiny", last=1000))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for what the judge would make of nets that learned for a second: `outcome`."""
    found = SimpleNamespace(outcome="pass", asked=0)

    def runs(*_: Any) -> Any:
        found.asked += 1
        said = {"outcome": found.outcome}
        return SimpleNamespace(
            **said, reasons=("so they say",), to_dict=lambda: said, table=lambda: (("outcome",), [(found.outcome,)])
        )

    monkeypatch.setattr(judge, "runs", runs)
    return found


def test_labels_are_learned_from_once_and_those_that_judged_teach_the_next(
    served: House, judged: SimpleNamespace
) -> None:
    send(served, range(19))
    assert phases(served, 2) == ["not yet", "not yet"]
    send(served, [19])
    outcome, _ = turn(served)
    assert (outcome.phase, outcome.version, judged.asked) == ("settled", "1.1", 1)
    first = served.run_of("1.1").json("split.json", made_by="train")["new"]
    assert len(first) == 14
    assert phases(served, 3) == ["not yet"] * 3
    send(served, range(20, 34))
    assert turn(served)[0].version == "1.2"
    second = served.run_of("1.2").json("split.json", made_by="train")["new"]
    assert first.items() < second.items()
    assert len(second) == 14 + 14, "the six that judged 1.1 are among them"


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_what_was_in_vain_is_tried_again_with_as_many_new_labels(
    served: House, judged: SimpleNamespace, outcome: str
) -> None:
    judged.outcome = outcome
    send(served, range(20))
    if outcome == "fail":
        with pytest.raises(RolledBack):
            turn(served)
    else:
        assert turn(served)[0].phase == "no better"
    assert phases(served, 3) == ["not yet"] * 3
    send(served, range(20, 39))
    assert phases(served, 2) == ["not yet"] * 2
    send(served, [39])
    judged.outcome = "pass"
    assert turn(served)[0].phase == "settled"
    assert judged.asked == 2


def test_labels_that_come_late_count_whenever_they_were_said(served: House, judged: SimpleNamespace) -> None:
    judged.outcome = "inconclusive"
    send(served, range(20))
    assert turn(served)[0].phase == "no better"
    send(served, range(20, 40), said=time.time() - 7 * 86_400)
    judged.outcome = "pass"
    assert turn(served)[0].phase == "settled"


def test_a_corrected_label_is_a_label_and_not_a_folder(served: House, judged: SimpleNamespace) -> None:
    send(served, range(20))
    assert turn(served)[0].version == "1.1"
    correct(served, 3)
    outcome, said = turn(served)
    assert outcome.phase == "not yet"
    assert "9 new labelled examples of 20" in said, "the three, and the six that judged"
    assert not any("folder" in step for step in said)
    send(served, range(20, 31))
    assert turn(served)[0].version == "1.2"
    assert list(served.run_of("1.2").json("split.json", made_by="train")["new"].values()).count("c") == 3


def test_a_folder_that_was_in_vain_is_no_reason_for_every_turn_that_has_a_label(
    served: House, judged: SimpleNamespace
) -> None:
    judged.outcome = "inconclusive"
    send(served, range(12))
    served.label(10)
    assert turn(served)[0].phase == "no better"
    for number in range(12, 16):
        send(served, [number])
        assert turn(served)[0].phase == "not yet"
    served.label(1, first=10)
    assert turn(served)[0].phase == "no better"
    assert judged.asked == 2


def test_a_folder_is_learned_from_though_too_few_labels_could_judge(served: House, judged: SimpleNamespace) -> None:
    judged.outcome = "inconclusive"
    send(served, range(4))
    served.label(10)
    outcome, said = turn(served)
    assert (outcome.phase, judged.asked) == ("settled", 0)
    assert "only 1 labelled answers could judge: the rollout's gate judges alone" in said


def test_nothing_is_trained_that_nobody_could_judge(served: House, judged: SimpleNamespace) -> None:
    send(served, range(20))
    before = sorted(path.name for path in served.settings.runs.iterdir())
    outcome, said = turn(served, POLICY.replace("min_examples = 3", "min_examples = 7"))
    assert outcome.phase == "not yet"
    assert "6 of the latest labelled answers would judge, and 7 are needed" in said
    assert judged.asked == 0
    left = {path.name for path in served.settings.runs.iterdir()} - set(before)
    assert not any(name.startswith("tiny-") for name in left)


def test_the_labels_of_a_version_that_somebody_went_back_from_are_no_reason_for_another(
    served: House, judged: SimpleNamespace
) -> None:
    send(served, range(20))
    assert turn(served)[0].version == "1.1"
    with journal.open(served.settings.store) as book:
        book.release("tiny", "1.0", proven=True, why="by hand", back=True)
    time.sleep(0.01)
    assert turn(served)[0].phase == "not yet"
    send(served, range(20, 39), said=time.time() + 2)
    assert turn(served)[0].phase == "not yet"
    send(served, [39], said=time.time() + 2)
    assert turn(served)[0].version == "1.2"
    assert served.released() == "1.2"


def test_new_examples_that_only_validate_are_learned_from_by_another_method(served: House) -> None:
    folder = served.root / "new" / "a"
    folder.mkdir(parents=True)
    bodies = (png(number) for number in range(0, 1000, 2))
    share = {"validation_share": 0.1, "test_share": 0.2}
    chosen = next(
        body
        for body in bodies
        if splitting.by_content(hashlib.sha256(body).hexdigest(), seed=0, **share) == "validation"
    )
    (folder / "one.png").write_bytes(chosen)
    outcome, said = turn(served, method="replay")
    assert outcome.phase == "settled"
    assert "by warm, not replay: nothing of what is new is in the training part" in said


def test_what_the_gate_refused_is_noted_also_where_the_turn_was_killed_before(
    served: House, judged: SimpleNamespace
) -> None:
    send(served, range(20))
    served.verdict = "worse"
    with pytest.raises(RolledBack):
        turn(served)
    assert refusals(served) == 1
    with Store.open(served.settings.feedback) as store, store.database.writing() as connection:
        connection.exec_driver_sql("delete from notes where kind = 'refused'")
    assert phases(served, 3) == ["refused before", "not yet", "not yet"]
    assert refusals(served) == 1
