"""The judge: nothing forgotten, better at what is new, labels that can be believed; and flipped labels are stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from handlers.nets import ServingGraph
from marwright.errors import RunError
from marwright.feedback import judge, selection
from marwright.feedback.judge import Judgement
from marwright.learning import graphs, noise
from marwright.learning.noise import ClassNoise, Noise
from marwright.release.policy import Policy
from tests.feedback import teaching
from tests.feedback.teaching import CLASSES, World

POLICY = Policy()


class Table(ServingGraph):
    """Answers each picture (uint8 N×1×1×1, its value the number of a row) with that row's class, quite surely."""

    def __init__(self, answers: np.ndarray[Any, Any], classes: int = 4) -> None:
        nn.Module.__init__(self)
        self.answers = torch.from_numpy(answers.astype(np.int64))
        self.classes = classes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten().long()
        sure = torch.full((len(rows), self.classes), 0.02)
        sure[torch.arange(len(rows)), self.answers[rows]] = 1 - 0.02 * (self.classes - 1)
        return sure, sure


def judged(
    *, lost: int = 0, won: int = 0, old_lost: int = 0, count: int = 200, labels: Noise | None = None, **limits: Any
) -> Judgement:
    """200 old examples that both have right but `old_lost`; `count` new ones, a third of which both have wrong."""
    truth = np.arange(256) % 4
    wrong = (truth + 1) % 4
    rows = np.arange(256)
    third = count // 3
    champion_new = np.where(rows < third + won, wrong, truth)
    challenger_new = np.where((rows < third) | ((rows >= count - lost) & (rows < count)), wrong, truth)
    champion_old, challenger_old = truth, np.where(rows % 50 < old_lost / 4, wrong, truth)
    pictures = rows.astype(np.uint8).reshape(-1, 1, 1, 1)

    def both(new: Any, old: Any) -> ServingGraph:
        """Rows below 256 are the new examples; the old ones have 4 classes more of width, told by their shape."""

        class Both(Table):
            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                return Table(old if x.shape[-1] == 2 else new)(x[..., :1])

        return Both(new)

    old = np.repeat(pictures[:200], 2, axis=3), truth[:200]
    return judge.judge(
        both(champion_new, champion_old),
        both(challenger_new, challenger_old),
        old=old,
        new=(pictures[:count], truth[:count]),
        noise=labels,
        policy=Policy.from_dict({"judge": limits}) if limits else POLICY,
        classes=("a", "b", "c", "d"),
    )


def noisy(wrong: float, at_least: float, *, missed: float = 0.0) -> Noise:
    rows = [ClassNoise("a", 50, 0.0, 0.0, 0.0, 0.0), ClassNoise("b", 50, wrong, at_least, missed, 0.0)]
    return Noise(100, wrong / 2, {row.label: row for row in rows}, ())


def test_better_at_what_is_new_and_as_good_as_before_passes() -> None:
    found = judged(won=20)
    assert (found.outcome, found.old.outcome) == ("pass", "pass")
    assert found.new is not None
    assert found.new.check("accuracy").limit == 0.0
    assert found.reasons[1].startswith("new holdout: accuracy 0.5700 → 0.6700 on 200 examples: better by at least 0.07")
    assert found.reasons[0].endswith("0.02 may be lost")
    assert [check.name for check in found.new.checks if check.name == "latency"] == []


def test_as_good_as_before_is_not_better() -> None:
    found = judged()
    assert found.outcome == "inconclusive"
    assert found.reasons[0].startswith("new holdout: accuracy 0.6700 → 0.6700 on 200 examples: anything from 0.01")
    assert found.reasons[0].endswith("and it has to be better")
    assert judged(won=1).outcome == "inconclusive"


def test_worse_at_what_is_new_fails() -> None:
    found = judged(lost=20)
    assert found.outcome == "fail"
    assert "worse by at least" in found.reasons[0]


def test_forgetting_fails_however_much_better_it_is_at_what_is_new() -> None:
    found = judged(won=40, old_lost=40)
    assert (found.outcome, found.old.outcome) == ("fail", "fail")
    assert found.reasons[0].startswith("old holdout: accuracy 1.0000 → 0.8000")
    assert judged(won=40, old_lost=40, max_forgetting=0.5).old.check("accuracy").outcome == "pass"


def test_a_class_that_loses_fails_where_the_whole_is_better() -> None:
    """Three classes win, one loses more than it may."""
    truth = np.arange(240) % 4
    wrong = (truth + 1) % 4
    champion = np.where((truth != 3) & (np.arange(240) < 120), wrong, truth)
    challenger = np.where((truth == 3) & (np.arange(240) < 80), wrong, truth)
    pictures = np.arange(240, dtype=np.uint8).reshape(-1, 1, 1, 1)
    same = (pictures[200:], truth[200:])
    found = judge.judge(
        Table(champion),
        Table(challenger),
        old=same,
        new=(pictures, truth),
        noise=None,
        policy=Policy.from_dict({"judge": {"max_forgetting": 0.2}}),
        classes=("a", "b", "c", "d"),
    )
    assert found.new is not None
    assert (found.new.check("accuracy").outcome, found.new.check("classes").outcome) == ("pass", "fail")
    assert found.outcome == "fail"
    assert "recall of 'd'" in found.reasons[0]


@pytest.mark.parametrize("count", [0, 1, 29])
def test_too_few_new_examples_prove_nothing(count: int) -> None:
    found = judged(count=count)
    assert (found.outcome, found.new) == ("inconclusive", None)
    assert found.reasons[0] == f"new holdout: {count} examples, and 30 are needed to judge"


@pytest.mark.parametrize(
    ("labels", "outcome"),
    [
        (None, "pass"),
        (noisy(0.05, 0.01), "pass"),
        (noisy(0.14, 0.1), "pass"),
        (noisy(0.18, 0.03), "pass"),
        (noisy(0.18, 0.1), "inconclusive"),
        (noisy(0.3, 0.2), "fail"),
        (noisy(0.3, 0.2, missed=0.4), "fail"),
        (Noise(30, 0.0, {"a": ClassNoise("a", 30, None, None, None, None)}, ()), "pass"),
    ],
)
def test_labels_that_are_surely_wrong_fail_and_doubtful_ones_are_undecided(labels: Noise | None, outcome: str) -> None:
    found = judged(won=20, labels=labels)
    assert found.outcome == outcome
    if outcome != "pass":
        assert found.reasons[0].startswith("labels: ")
        assert "of class 'b'" in found.reasons[0]
        assert found.reasons[0].endswith("and 15% is allowed")


def test_a_judgement_is_the_same_through_json_and_has_a_row_for_each_check() -> None:
    for found in (judged(won=20, labels=noisy(0.3, 0.2)), judged(count=3)):
        assert Judgement.from_dict(json.loads(json.dumps(found.to_dict()))) == found
        titles, rows = found.table()
        assert all(len(row) == len(titles) for row in rows)
        assert {row[0] for row in rows} == ({"old", "new"} if found.new else {"old"})


# ------------------------------------------------------------------------------------------------ on real digits


@pytest.fixture(scope="module", params=[1, 3], ids=["seed 1", "seed 3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marwright.learning.reporting.page", lambda *_: "<!doctype html>")
        yield World(tmp_path_factory.mktemp("world"), request.param)
    torch.set_num_threads(threads)


def test_what_was_learned_from_clean_labels_of_a_drift_passes(world: World) -> None:
    found = world.judged(world.stream(world.truth, "darkness", 4))
    assert found.outcome == "pass", found.reasons
    assert found.new is not None
    accuracy = found.new.check("accuracy")
    assert (accuracy.low or 0.0) > 0.1
    assert found.noise is not None
    assert found.noise.rate < 0.05


@pytest.mark.parametrize(("of", "to", "method"), [(3, 8, "warm"), (1, 7, "warm"), (3, 8, "replay")])
def test_a_batch_with_30_percent_of_one_class_flipped_is_stopped(world: World, of: int, to: int, method: str) -> None:
    labels = teaching.flipped(world.truth, of, to, 0.3, seed=world.seed)
    found = world.judged(world.stream(labels, "darkness", 4), method=method)
    assert found.outcome != "pass"
    assert found.noise is not None
    doubtful = judge.believed(found.noise, POLICY.judge.max_label_noise)
    assert doubtful.outcome != "pass"
    assert f"of class '{of}'" in doubtful.sentence or f"of class '{to}'" in doubtful.sentence


def test_where_nothing_drifts_nothing_is_proved_better_and_nothing_worse_goes_on(world: World) -> None:
    found = world.judged(world.stream(world.truth))
    assert found.new is not None
    accuracy = found.new.check("accuracy")
    assert found.outcome == "inconclusive" or (found.outcome == "pass" and (accuracy.low or 0.0) > 0)
    assert found.noise is not None
    assert found.noise.rate < 0.05


def test_the_files_that_travel_hold_nothing_of_production(world: World) -> None:
    chosen = selection.select(world.stream(world.truth, "darkness", 4), POLICY.learn, classes=CLASSES)
    dataset = world.load(chosen)
    from marwright.learning import golden

    golden.write(dataset, world.root / "golden-of-both")
    golden.write(world.load(), world.root / "golden-of-own")
    for path in (world.root / "golden-of-own").rglob("*"):
        if path.is_file():
            assert (world.root / "golden-of-both" / path.relative_to(world.root / "golden-of-own")).read_bytes() == (
                path.read_bytes()
            )
    assert len(dataset.train) > 1000


def test_runs_that_do_not_take_the_same_cannot_be_compared(world: World) -> None:
    spec = world.champion.spec.to_json().replace('"width": 16', '"width": 8', 1)
    other = world.root / "runs" / "other"
    other.mkdir(exist_ok=True)
    for path in world.champion.path.iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    (other / "spec.json").write_text(spec, encoding="utf-8")
    chosen = selection.select([], POLICY.learn, classes=CLASSES)
    with pytest.raises(RunError, match="cannot be compared"):
        judge.runs(world.champion, type(world.champion)(other), chosen, POLICY)


def test_doubt_is_that_of_the_champions_embedding(world: World) -> None:
    with np.load(world.champion.path / "examples.npz") as saved:
        old = saved["inputs"], saved["labels"]
    graph = graphs.load(world.champion)
    swapped = (old[1] + 1) % 10
    found = judge.doubt(graph, (old[0], swapped), old, CLASSES)
    assert found is not None
    assert judge.believed(found, POLICY.judge.max_label_noise).outcome == "fail"
    assert judge.doubt(graph, (old[0][:5], old[1][:5]), old, CLASSES) is None
    assert isinstance(found, noise.Noise)


def test_the_world_is_as_it_says(world: World, tmp_path: Path) -> None:
    assert len(world.truth) == 797
    labels = teaching.flipped(world.truth, 3, 8, 0.3, seed=1)
    changed = labels != world.truth
    assert set(world.truth[changed]) == {3}
    assert set(labels[changed]) == {8}
    assert changed.sum() == round(0.3 * (world.truth == 3).sum())
