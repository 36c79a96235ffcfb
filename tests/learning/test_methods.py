"""Going on from a run: what each method looks at, what it leaves alone, and what it costs."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handlers import nets
from marwright.errors import RunError, SettingsError
from marwright.learning import data, evaluation, methods, provenance, recipe, training
from marwright.learning.dataset import Dataset, Part
from marwright.learning.methods import METHODS, Method
from marwright.learning.recipe import Recipe
from marwright.runs import Run
from tests.learning.conftest import RECIPES, fill, tiny

pytestmark = pytest.mark.usefixtures("plain_reports")

FOLLOWING = [name for name, method in METHODS.items() if not method.everything]
NORMED = {"name": "cifar_resnet", "args": {"blocks": 1, "filters": 4}}
BUSY: dict[str, Any] = {
    "training__epochs": 4,
    "training__regularisation": {"dropout": 0.3, "label_smoothing": 0.1, "flip": True, "crop": 1},
}


def added(dataset: Dataset, rows: list[int], label: Callable[[int], str] | None = None) -> Dataset:
    """`dataset` as if those rows of its training part had been labelled later than all others."""
    digests = {row: f"{row:064x}" for row in rows}
    truth = dict(zip(dataset.train.rows.tolist(), dataset.train.targets.tolist(), strict=True))
    says = label or (lambda row: dataset.classes[truth[row]])
    return replace(
        dataset,
        split={**dataset.split, "new": {digests[row]: says(row) for row in rows}},
        digests=digests,
        digest=f"{dataset.digest}, {sorted(rows)}",
    )


def without(dataset: Dataset, rows: list[int]) -> Dataset:
    """`dataset` before those rows of its training part came."""
    part = dataset.train
    kept = torch.tensor([row not in rows for row in part.rows.tolist()])
    return replace(dataset, train=Part(part.name, part.inputs, part.rows[kept], part.targets[kept]), digest="before")


def state(run: Run) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run.weights, weights_only=True)
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Dataset:
    """Three classes."""
    layout = {f"{part}/{label}": count for part, count in (("train", 10), ("test", 4)) for label in ("a", "b", "c")}
    folder = fill(tmp_path_factory.mktemp("pictures"), layout)
    return data.load(tiny(), path=folder, cache=cache, progress=False)


@pytest.fixture(scope="module")
def later(pictures: Dataset) -> list[int]:
    """Rows of the training part that come later: of every class some."""
    return pictures.train.rows.tolist()[::4]


@pytest.fixture(scope="module")
def start(pictures: Dataset, later: list[int], tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marwright.learning.reporting.page", lambda *_: "<!doctype html>")
        root = tmp_path_factory.mktemp("start")
        return training.train(tiny(**BUSY), without(pictures, later), root, progress=False)


def test_fresh_is_what_the_run_has_not_learned_from(
    pictures: Dataset, start: Run, later: list[int], tmp_path: Path
) -> None:
    grown = added(pictures, later)
    fresh = methods.fresh(grown, start)
    assert grown.train.rows[fresh].tolist() == later
    assert not len(methods.fresh(without(pictures, later), start))
    start = Run(shutil.copytree(start.path, tmp_path / start.id))
    split = {**start.json("split.json", made_by="train"), "new": {f"{row:064x}": "a" for row in later}}
    (start.path / "split.json").write_text(json.dumps(split), "utf-8")
    assert not len(methods.fresh(added(pictures, later, lambda row: "a"), start))
    changed = methods.fresh(added(pictures, later, lambda row: "b" if row == later[0] else "a"), start)
    assert grown.train.rows[changed].tolist() == later[:1], "another label is something new"
    other = replace(grown, split={**grown.split, "own": "other"})
    assert len(methods.fresh(other, start)) == len(grown.train), "other own data are new, all of them"


def test_a_reservoir_is_balanced_seeded_and_does_not_depend_on_the_order(digits: Dataset) -> None:
    few = torch.cat([(digits.train.targets == 3).nonzero()[:7, 0], (digits.train.targets != 3).nonzero()[:, 0]])
    kept = methods.reservoir(digits, few.sort().values, size=100, seed=1)
    counts = Counter(digits.train.targets[kept].tolist())
    assert counts.pop(3) == 7, "a class that has fewer gives all"
    assert sum(counts.values()) == 93
    assert set(counts.values()) <= {10, 11}, "and the others share what is left"
    assert kept.tolist() == sorted(set(kept.tolist()))
    shuffled = few[torch.randperm(len(few), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(methods.reservoir(digits, shuffled, size=100, seed=1), kept)
    assert not torch.equal(methods.reservoir(digits, few, size=100, seed=2), kept)
    assert len(methods.reservoir(digits, few, size=10**6, seed=1)) == len(few)


def test_an_example_that_goes_takes_no_more_than_two_others_along(digits: Dataset) -> None:
    every = torch.arange(len(digits.train))
    kept = set(methods.reservoir(digits, every, size=105, seed=0).tolist())
    for gone in [*sorted(kept)[:20], *range(5)]:
        now = set(methods.reservoir(digits, every[every != gone], size=105, seed=0).tolist())
        assert gone not in now
        assert len(kept - now - {gone}) <= 2


def test_each_example_is_equally_likely_to_be_in_the_reservoir(digits: Dataset) -> None:
    of_class = (digits.train.targets == 0).nonzero()[:40, 0]
    counts = Counter(
        position for seed in range(400) for position in methods.reservoir(digits, of_class, size=10, seed=seed).tolist()
    )
    assert len(counts) == 40
    expected, spread = 100.0, (400 * 0.25 * 0.75) ** 0.5
    assert all(abs(count - expected) < 4.5 * spread for count in counts.values())


@pytest.mark.parametrize("name", ["replay", "derpp"])
def test_every_batch_is_half_new_half_of_the_buffer(name: str, pictures: Dataset, start: Run, later: list[int]) -> None:
    grown = added(pictures, later)
    plan = methods.plan(METHODS[name], tiny(**BUSY).training, grown, start)
    assert not set(plan.new.tolist()) & set(plan.buffer.tolist())
    seen: Counter[int] = Counter()
    for epoch in range(plan.training.epochs):
        for batch in plan.batches(grown.train.inputs, generator=torch.Generator().manual_seed(epoch)):
            (again,) = batch.again
            half = len(batch) - len(again)
            assert half == len(again) <= plan.training.batch_size // 2
            assert set(batch.positions[:half].tolist()) <= set(plan.new.tolist())
            assert torch.equal(batch.positions[half:], plan.buffer[again])
            seen.update(batch.positions[:half].tolist())
    assert set(seen) == set(plan.new.tolist())
    assert max(seen.values()) - min(seen.values()) <= plan.training.epochs


def test_finetuning_sees_nothing_old(pictures: Dataset, start: Run, later: list[int]) -> None:
    grown = added(pictures, later)
    plan = methods.plan(METHODS["finetune"], tiny().training, grown, start)
    batches = plan.batches(grown.train.inputs, generator=torch.Generator().manual_seed(0))
    assert {int(i) for batch in batches for i in batch.positions} == set(plan.new.tolist())
    assert not len(plan.buffer)
    assert all(not batch.again for batch in batches)


@pytest.mark.parametrize("name", ["finetune", "replay", "derpp"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_a_method_looks_at_no_more_than_its_budget(name: str, share: float, digits: Dataset, tmp_path: Path) -> None:
    method = METHODS[name]
    rows = digits.train.rows.tolist()
    later = rows[: int(share * len(rows))]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"data_digest": ""}', "utf-8")
    (tmp_path / "run" / "split.json").write_text(json.dumps({"own": digits.split["own"], "new": {}}), "utf-8")
    chosen = recipe.load("digits", recipes_dir=RECIPES).training
    plan = methods.plan(method, chosen, added(digits, later), Run(tmp_path / "run"))
    looked_at = plan.training.epochs * sum(map(len, plan.batches(digits.train.inputs, generator=torch.Generator())))
    assert 0 < looked_at <= method.budget * chosen.epochs * len(rows)
    assert looked_at <= 2 * chosen.epochs * len(later), "no example is seen more often than from scratch"
    assert plan.training.optimiser.lr == method.lr * chosen.optimiser.lr


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_resumed_run_of_each_method_is_one_that_never_stopped(
    name: str, pictures: Dataset, start: Run, later: list[int], tmp_path: Path
) -> None:
    method = replace(METHODS[name], budget=1.0)
    chosen, grown = tiny(**BUSY, net=NORMED if name == "head" else {"name": "small_cnn"}), added(pictures, later)
    if name == "head":
        start = training.train(chosen, without(pictures, later), tmp_path, progress=False)
    whole = training.train(chosen, grown, tmp_path / "whole", start=start, method=method, progress=False)
    assert whole.about["epochs"] >= 3

    def stop(row: training.Row) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(chosen, grown, tmp_path / "cut", start=start, method=method, progress=False, watch=stop)
    cut = training.train(chosen, grown, tmp_path / "cut", start=start, method=method, resume=True, progress=False)
    assert cut.about["resumed_after_epoch"] == 2
    assert cut.id == whole.id
    assert cut.weights.read_bytes() == whole.weights.read_bytes()
    assert whole.about["method"] == name
    assert whole.about["learned_from"]["new"] == len(later)


def test_a_run_has_its_name_from_the_method_unless_that_learns_from_everything(
    pictures: Dataset, start: Run, later: list[int], tmp_path: Path
) -> None:
    grown = added(pictures, later)
    names = {name: provenance.run_id(tiny(), grown, start, method) for name, method in METHODS.items()}
    assert len(set(names.values())) == len(METHODS)
    assert names["warm"] == provenance.run_id(tiny(), grown, start)
    assert names["scratch"] == provenance.run_id(tiny(), grown)
    run = training.train(tiny(), grown, tmp_path, start=start, method=METHODS["scratch"], progress=False)
    assert (run.about["start"], run.about["method"], run.id) == (None, "scratch", names["scratch"])
    other = replace(METHODS["replay"], budget=0.5)
    assert provenance.run_id(tiny(), grown, start, other) != names["replay"]


def test_a_frozen_backbone_stays_as_it_was_and_its_norms_too(
    pictures: Dataset, later: list[int], tmp_path: Path
) -> None:
    chosen = tiny(**BUSY, net=NORMED)
    start = training.train(chosen, without(pictures, later), tmp_path, progress=False)
    run = training.train(chosen, added(pictures, later), tmp_path, start=start, method=METHODS["head"], progress=False)
    before, after = state(start), state(run)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"net.fc.weight", "net.fc.bias"}
    graph = training.load_graph(run)
    scores = evaluation.evaluate(graph, pictures.validation, classes=pictures.classes)
    curves: Any = run.json("curves.json", made_by="train")
    best = curves[run.about["best_epoch"] - 1]
    assert scores.loss == pytest.approx(best["validation_loss"], rel=1e-4), "embeddings say what the whole net says"


@pytest.mark.parametrize(
    ("name", "args", "head"),
    [
        ("small_cnn", {"channels": 1, "height": 8, "width": 8, "classes": 3}, {"fc2.weight", "fc2.bias"}),
        ("lenet", {"channels": 1, "height": 16, "width": 16, "classes": 3}, {"fc3.weight", "fc3.bias"}),
        ("mlp", {"features": 4}, {"fc2.weight", "fc2.bias"}),
        ("linear", {"features": 4}, {"fc.weight", "fc.bias"}),
    ],
)
def test_only_what_the_head_uses_is_left_to_be_trained(name: str, args: dict[str, Any], head: set[str]) -> None:
    net = nets.build(name, **args)
    shape = (1, args["channels"], args["height"], args["width"]) if "height" in args else (1, args["features"])
    methods.freeze(net.eval(), net.embed(torch.rand(shape)).detach())
    assert {name for name, parameter in net.named_parameters() if parameter.requires_grad} == head


def test_derpp_adds_the_distance_to_the_starts_logits(pictures: Dataset, start: Run, later: list[int]) -> None:
    chosen, grown = tiny(), added(pictures, later)
    trainer = training.Trainer(chosen, grown, start, METHODS["derpp"])
    assert trainer.plan is not None
    (batch, *_) = trainer.plan.batches(grown.train.inputs, generator=torch.Generator().manual_seed(0))
    inputs, targets = grown.train.take(batch.positions)
    trainer.graph.eval()
    half = len(batch) // 2
    method = METHODS["derpp"]

    def parts() -> tuple[float, Tensor, Tensor]:
        with torch.no_grad():
            out = trainer.graph.net(trainer.graph.normalise(inputs))
            entropy = nn.functional.cross_entropy
            loss = float(trainer._loss(inputs, targets, *batch.again))
        return loss, entropy(out[:half], targets[:half]) + entropy(out[half:], targets[half:]), out[half:]

    at_start, plain, answered = parts()
    assert at_start == pytest.approx(float(plain) / 2, rel=1e-4), (
        "it answers as the start does, so there is no distance"
    )
    with torch.no_grad():
        next(iter(trainer.graph.net.parameters())).add_(0.3)
    moved, plain, out = parts()
    distance = float(((out - answered) ** 2).mean())
    assert distance > 1e-3
    assert moved == pytest.approx((float(plain) + method.alpha * distance) / 2, rel=1e-4)


def test_making_a_plan_does_not_change_torchs_own_seed(pictures: Dataset, start: Run, later: list[int]) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    for name in FOLLOWING:
        training.Trainer(tiny(**BUSY), added(pictures, later), start, METHODS[name])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_regressor_can_go_on_by_every_method(diabetes: Dataset, tmp_path: Path) -> None:
    chosen = recipe.load("diabetes-mlp", recipes_dir=RECIPES, overrides={"epochs": 5})
    later = diabetes.train.rows.tolist()[::5]
    start = training.train(chosen, without(diabetes, later), tmp_path, progress=False)
    grown = added(diabetes, later, lambda row: "a value")
    for name in FOLLOWING:
        run = training.train(chosen, grown, tmp_path, start=start, method=METHODS[name], progress=False)
        assert run.spec.metrics["rmse"] < 100
        assert not torch.equal(state(run)["net.fc2.weight"], state(start)["net.fc2.weight"])


def test_a_method_without_a_start_or_without_anything_new_says_so(
    pictures: Dataset, start: Run, later: list[int], tmp_path: Path
) -> None:
    for name in FOLLOWING:
        with pytest.raises(RunError, match=f"method {name} goes on from a run, and there is none") as caught:
            training.train(tiny(), pictures, tmp_path, method=METHODS[name], progress=False)
        assert "scratch" in caught.value.hint
        with pytest.raises(RunError, match=f"nothing that run {start.id} has not learned from") as caught:
            training.train(
                tiny(), without(pictures, later), tmp_path, start=start, method=METHODS[name], progress=False
            )
        assert "warm or scratch" in caught.value.hint
    assert not list(tmp_path.glob("tiny-*"))
    with pytest.raises(RunError, match="cannot start from run"):
        training.train(
            tiny(net=NORMED), added(pictures, later), tmp_path, start=start, method=METHODS["replay"], progress=False
        )


def test_a_name_that_is_no_method_is_told_which_there_are() -> None:
    assert methods.named("derpp") is METHODS["derpp"]
    with pytest.raises(SettingsError, match="no method 'ewc'") as caught:
        methods.named("ewc")
    assert "scratch, warm, finetune, replay, derpp, head" in caught.value.hint


@pytest.fixture(scope="module")
def two_halves(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Dataset, Run]:
    """Digits 0 to 4, learned; and 5 to 9, which come later. At their own 8×8, which is quick."""
    smaller = {"data.height": 8, "data.width": 8, "epochs": 10, "batch_size": 32, "lr": 0.002}
    chosen = recipe.load("digits", recipes_dir=RECIPES, overrides=smaller)
    digits = data.load(chosen, cache=cache, progress=False)
    part = digits.train
    later = part.rows[part.targets >= 5].tolist()
    known = digits.validation.targets < 5
    before = replace(
        without(digits, later),
        validation=Part("validation", part.inputs, digits.validation.rows[known], digits.validation.targets[known]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marwright.learning.reporting.page", lambda *_: "<!doctype html>")
        root = tmp_path_factory.mktemp("halves")
        return chosen, added(digits, later), training.train(chosen, before, root, progress=False)


def accuracy(run: Run, dataset: Dataset, *, first: bool) -> float:
    part = dataset.test
    chosen = part.targets < 5 if first else part.targets >= 5
    asked = Part("test", part.inputs, part.rows[chosen], part.targets[chosen])
    return evaluation.evaluate(training.load_graph(run), asked, classes=dataset.classes).metrics["accuracy"]


@pytest.mark.parametrize("name", ["replay", "derpp"])
def test_replay_learns_new_classes_and_keeps_the_old_ones_where_naive_finetuning_forgets_them(
    name: str, two_halves: tuple[Recipe, Dataset, Run], tmp_path: Path
) -> None:
    chosen, grown, start = two_halves
    longer = {one: replace(METHODS[one], budget=budget) for one, budget in ((name, 0.5), ("finetune", 0.25))}
    kept, lost = (
        training.train(chosen, grown, tmp_path, start=start, method=method, progress=False)
        for method in longer.values()
    )
    assert accuracy(start, grown, first=True) > 0.95
    assert accuracy(start, grown, first=False) == 0.0
    assert accuracy(kept, grown, first=True) > 0.9
    assert accuracy(kept, grown, first=False) > 0.85
    assert accuracy(lost, grown, first=True) < 0.5


def test_the_methods_are_those_of_the_policy() -> None:
    from marwright.release.policy import LearnPolicy

    assert LearnPolicy.model_fields["method"].annotation.__args__ == tuple(METHODS)  # type: ignore[union-attr]
    assert all(name == method.name for name, method in METHODS.items())
    assert isinstance(METHODS["replay"], Method)
