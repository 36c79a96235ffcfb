"""A run is reproducible, resumable, whole, and finished exactly once."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

from handlers import images
from handlers.spec import ImageInput, Limits
from marwright import runs
from marwright.errors import RunError
from marwright.learning import data, evaluation, golden, provenance, recipe, training
from marwright.learning.dataset import Dataset
from marwright.learning.recipe import Recipe
from marwright.runs import Run
from tests.learning.conftest import RECIPES, picture, tiny, zipped

pytestmark = pytest.mark.usefixtures("plain_reports")

BUSY: dict[str, Any] = {
    "training__epochs": 4,
    "training__optimiser": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True},
    "training__schedule": {"name": "plateau", "patience": 0, "factor": 0.5},
    "training__regularisation": {
        "l1": 1e-5, "l2": 1e-3, "dropout": 0.3, "label_smoothing": 0.1, "flip": True, "crop": 1
    },
}  # fmt: skip
"""Everything that has a state or is random, at once."""


def weights(run: Run) -> str:
    return hashlib.sha256(run.weights.read_bytes()).hexdigest()


def stop_after(epochs: int) -> Callable[[training.Row], None]:
    def watch(row: training.Row) -> None:
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    return watch


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".part")]


@pytest.fixture(scope="module")
def digits_run(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    chosen = recipe.load("digits", recipes_dir=RECIPES, overrides={"epochs": 3})
    return training.train(chosen, digits, tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture(scope="module")
def linear_run(diabetes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    chosen = recipe.load("diabetes-linear", recipes_dir=RECIPES, overrides={"epochs": 100})
    return training.train(chosen, diabetes, tmp_path_factory.mktemp("runs"), progress=False)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny_set: Dataset, tmp_path: Path) -> None:
    one, two = (training.train(tiny(**BUSY), tiny_set, tmp_path / where, progress=False) for where in "ab")
    assert one.weights.read_bytes() == two.weights.read_bytes()
    assert one.id == two.id
    other = training.train(tiny(**BUSY, training__seed=1), tiny_set, tmp_path, progress=False)
    assert weights(other) != weights(one)
    assert other.id != one.id


def test_training_does_not_depend_on_torchs_own_seed_nor_change_it(tiny_set: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = training.train(tiny(**BUSY), tiny_set, tmp_path / "a", progress=False)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two = training.train(tiny(**BUSY), tiny_set, tmp_path / "b", progress=False)
    assert weights(one) == weights(two)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "optimiser",
    [
        BUSY["training__optimiser"],
        {"name": "adam", "lr": 0.01},
        {"name": "adamw", "lr": 0.01},
        {"name": "rmsprop", "lr": 0.001, "momentum": 0.5},
        {"name": "adagrad", "lr": 0.01, "lr_decay": 0.1},
    ],
    ids=lambda choice: choice["name"],
)
def test_a_resumed_run_is_one_that_never_stopped(optimiser: dict[str, Any], tiny_set: Dataset, tmp_path: Path) -> None:
    chosen = tiny(**(BUSY | {"training__optimiser": optimiser}))
    whole = training.train(chosen, tiny_set, tmp_path / "whole", progress=False)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            training.train(chosen, tiny_set, tmp_path / "cut", resume=True, progress=False, watch=stop_after(stop))
    cut = training.train(chosen, tiny_set, tmp_path / "cut", resume=True, progress=False)
    assert cut.about["resumed_after_epoch"] == 3
    assert cut.weights.read_bytes() == whole.weights.read_bytes()
    for name in ("curves.json",):
        one, two = (run.json(name, made_by="train") for run in (whole, cut))
        assert [{**row, "seconds": 0} for row in one] == [{**row, "seconds": 0} for row in two]  # type: ignore[dict-item]


def test_a_warm_start_begins_as_the_run_it_starts_from(
    folder: Path, tiny_set: Dataset, cache: Path, tmp_path: Path
) -> None:
    start = training.train(tiny(), tiny_set, tmp_path, progress=False)
    for i in range(30):  # darker ones: another mean, another deviation
        dark = np.full((12, 12, 3), i, dtype=np.uint8)
        Image.fromarray(dark).save(folder / "train" / "a" / f"dark {i}.png")
    more = data.load(tiny(), path=folder, cache=cache, progress=False)
    fresh, warm = training.Trainer(tiny(), more), training.Trainer(tiny(), more, start)
    was = torch.load(start.weights, weights_only=True)
    state = warm.graph.state_dict()
    assert {name for name, value in was.items() if not torch.equal(value, state[name])} == set()
    assert not torch.equal(fresh.graph.mean, warm.graph.mean), "the mean that the weights were learned with is kept"
    inputs, _ = more.test.take(torch.arange(5))
    with torch.inference_mode():
        assert torch.allclose(warm.graph.eval()(inputs)[0], training.load_graph(start)(inputs)[0], atol=1e-6)
    run = training.train(tiny(), more, tmp_path, start=start, progress=False)
    assert torch.equal(training.load_graph(run).mean, was["mean"])


def test_a_run_says_what_it_started_from_and_has_its_name_from_that(tiny_set: Dataset, tmp_path: Path) -> None:
    chosen = tiny(**BUSY)
    start = training.train(chosen, tiny_set, tmp_path / "a", progress=False)
    other = training.train(tiny(**BUSY, training__seed=1), tiny_set, tmp_path / "a", progress=False)
    runs_of = [training.train(chosen, tiny_set, tmp_path / "b", start=each, progress=False) for each in (start, other)]
    assert len({start.id, *(run.id for run in runs_of)}) == 3
    assert len({weights(start), *map(weights, runs_of)}) == 3
    assert start.about["start"] is None
    assert runs_of[0].about["start"] == {"run": start.id, "weights": weights(start)}
    moved = Run(start.path.rename(start.path.with_name("elsewhere")))
    assert provenance.run_id(chosen, tiny_set, moved) == runs_of[0].id, "its weights count, not where they lie"


def test_a_resumed_warm_start_is_one_that_never_stopped(tiny_set: Dataset, tmp_path: Path) -> None:
    start, chosen = training.train(tiny(), tiny_set, tmp_path, progress=False), tiny(**BUSY)
    whole = training.train(chosen, tiny_set, tmp_path / "whole", start=start, progress=False)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            training.train(
                chosen, tiny_set, tmp_path / "cut", start=start, resume=True, progress=False, watch=stop_after(stop)
            )
    cut = training.train(chosen, tiny_set, tmp_path / "cut", start=start, resume=True, progress=False)
    assert cut.about["resumed_after_epoch"] == 3
    assert cut.weights.read_bytes() == whole.weights.read_bytes()


def test_a_start_must_have_the_same_net_and_classes(
    folder: Path, tiny_set: Dataset, cache: Path, tmp_path: Path
) -> None:
    start = training.train(tiny(), tiny_set, tmp_path, progress=False)
    other = shutil.copytree(folder, tmp_path / "other")
    for part in ("train", "test"):
        (other / part / "a").rename(other / part / "z")
    renamed = data.load(tiny(), path=other, cache=cache, progress=False)
    refused = [
        (tiny(), renamed, "other classes"),
        (tiny(net={"name": "cifar_resnet", "args": {"blocks": 1}}), tiny_set, "its net is small_cnn"),
        (tiny(data__height=16, data__width=16), tiny_set, "its net is small_cnn .*'height': 8"),
    ]
    for chosen, dataset, why in refused:
        with pytest.raises(RunError, match=f"cannot start from run {start.id}: .*{why}") as caught:
            training.train(chosen, dataset, tmp_path / "b", start=start, progress=False)
        assert "from scratch" in caught.value.hint
    assert not list((tmp_path / "b").glob("tiny-*"))
    dropped = tiny(training__regularisation={"dropout": 0.5})
    assert training.train(dropped, tiny_set, tmp_path / "b", start=start, progress=False).finished
    with pytest.raises(RunError, match=r"has no weights\.pt"):
        training.train(tiny(), tiny_set, tmp_path / "b", start=Run(tmp_path / "tiny-000000000000"), progress=False)


def test_a_run_killed_within_an_epoch_resumes_alike(
    tiny_set: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.train(tiny(**BUSY), tiny_set, tmp_path / "whole", progress=False)
    steps = iter(range(100))
    step = training.Trainer._loss

    def interrupted(self: training.Trainer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(steps) == 9:  # four steps an epoch: in the middle of the third
            raise KeyboardInterrupt
        return step(self, inputs, targets)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train(tiny(**BUSY), tiny_set, tmp_path / "cut", progress=False)
    killed = tmp_path / "cut" / whole.id / ".checkpoint.pt.x.part"
    killed.write_bytes(b"half")
    cut = training.train(tiny(**BUSY), tiny_set, tmp_path / "cut", resume=True, progress=False)
    assert cut.about["resumed_after_epoch"] == 2
    assert not left_over(cut.path)
    assert cut.weights.read_bytes() == whole.weights.read_bytes()


def test_ctrl_c_leaves_the_last_whole_checkpoint_and_no_part_files(
    tiny_set: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = iter(range(100))
    save = torch.save

    def interrupted(state: Any, stream: Any) -> None:
        if next(saves) == 2:
            stream.write(b"half")
            raise KeyboardInterrupt
        save(state, stream)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny(**BUSY), tiny_set, tmp_path, progress=False)
    run = Run(tmp_path / provenance.run_id(tiny(**BUSY), tiny_set))
    state = torch.load(run.path / "checkpoint.pt", weights_only=True)
    assert len(state["curves"]) == 2
    assert not run.finished
    assert not left_over(tmp_path)
    with pytest.raises(RunError, match="not finished"):
        runs.open_run(run.path)


def test_without_resume_an_unfinished_run_starts_afresh(tiny_set: Dataset, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny(**BUSY), tiny_set, tmp_path, progress=False, watch=stop_after(1))
    seen: list[float] = []
    training.train(tiny(**BUSY), tiny_set, tmp_path, progress=False, watch=lambda row: seen.append(row["epoch"]))
    assert seen == [1, 2, 3, 4]


def test_a_finished_run_is_returned_at_once(tiny_set: Dataset, tmp_path: Path) -> None:
    one = training.train(tiny(), tiny_set, tmp_path, progress=False)

    def fail(row: training.Row) -> None:
        raise AssertionError("trained again")

    assert training.train(tiny(), tiny_set, tmp_path, progress=False, watch=fail) == one


def test_a_run_is_named_by_recipe_data_and_code(
    folder: Path, tiny_set: Dataset, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = provenance.run_id(tiny(), tiny_set)
    assert re.fullmatch(r"tiny-[0-9a-f]{12}", name)
    archive = zipped(folder, tmp_path / "x.zip")
    from_zip = data.load(tiny(), path=archive, cache=cache, progress=False)
    assert provenance.run_id(tiny(data__path=str(archive), data__memory_limit=1), from_zip) == name
    assert provenance.run_id(tiny(training__epochs=3), tiny_set) != name
    (folder / "train" / "a" / "000.png").unlink()
    assert provenance.run_id(tiny(), data.load(tiny(), path=folder, cache=cache, progress=False)) != name
    monkeypatch.setattr(provenance, "code_digest", lambda: "other")
    assert provenance.run_id(tiny(), tiny_set) != name


def test_other_skipped_files_make_another_run(folder: Path, cache: Path) -> None:
    (folder / "train" / "a" / "big.png").write_bytes(picture(3, size=(40, 40)))
    names = []
    for pixels in (1000, 10_000):
        chosen = tiny(data__on_unreadable="skip", serving__limits__max_pixels=pixels)
        names.append(provenance.run_id(chosen, data.load(chosen, path=folder, cache=cache, progress=False)))
    assert names[0] != names[1]


def test_streaming_from_disk_trains_the_same_weights(folder: Path, tmp_path: Path, cache: Path) -> None:
    made = []
    for limit in (2**30, 1):
        chosen = tiny(**BUSY, data__memory_limit=limit)
        loaded = data.load(chosen, path=folder, cache=cache, progress=False)
        made.append(training.train(chosen, loaded, tmp_path / str(limit), progress=False))
    assert [run.about["streamed"] for run in made] == [False, True]
    assert weights(made[0]) == weights(made[1])


def test_a_run_folder_holds_what_it_promises(digits_run: Run, digits: Dataset) -> None:
    names = {path.name for path in digits_run.path.iterdir()}
    assert names == {
        "run.json", "recipe.json", "weights.pt", "spec.json", "examples.npz", "golden", "split.json", "curves.json",
        "evaluation.json", "report.html", "reference.npz",
    }  # fmt: skip
    assert not left_over(digits_run.path)
    about = digits_run.about
    assert about["id"] == digits_run.id
    assert about["data_digest"] == digits.digest
    assert {"torch", "numpy", "pillow", "python"} <= set(about["versions"])
    assert about["threads"] == torch.get_num_threads()
    assert about["examples"] == {"train": 1259, "validation": 179, "test": 359}
    assert about["seconds"]["training"] > 0
    assert Recipe.from_dict(digits_run.recipe).training.epochs == 3
    assert len(digits_run.json("curves.json", made_by="train")) == 3
    scores = digits_run.evaluation
    assert np.asarray(scores["confusion"]).sum() == scores["examples"] == 359
    assert {"label", "precision", "recall", "f1", "support"} == set(scores["classes"][0])
    spec = digits_run.spec
    assert spec.run == digits_run.id
    assert spec.metrics == scores["metrics"]
    assert spec.input == ImageInput(1, 16, 16)
    assert spec.outputs == ("probabilities", "embedding")


def test_three_epochs_of_digits_learn_and_the_loaded_graph_agrees(digits_run: Run, digits: Dataset) -> None:
    graph = training.load_graph(digits_run)
    scores = evaluation.evaluate(graph, digits.test, classes=digits.classes)
    assert scores.metrics == digits_run.evaluation["metrics"]
    assert scores.metrics["accuracy"] > 0.9
    with np.load(digits_run.path / "examples.npz") as saved:
        inputs, labels = saved["inputs"], saved["labels"]
    assert (inputs.shape, inputs.dtype) == ((359, 1, 16, 16), np.uint8)
    with torch.inference_mode():
        probabilities, embedding = graph(torch.from_numpy(inputs))
    assert float((probabilities.argmax(1).numpy() == labels).mean()) == pytest.approx(scores.metrics["accuracy"])
    assert embedding.shape == (359, 128)


def test_weights_are_plain_tensors_and_hold_the_normalisation(digits_run: Run) -> None:
    state = torch.load(digits_run.weights, weights_only=True)
    assert {"mean", "std", "net.conv1.weight"} <= set(state)
    assert all(value.is_contiguous() for value in state.values())


def test_golden_examples_are_real_bodies_of_every_class(digits_run: Run, digits: Dataset) -> None:
    folder = digits_run.path / "golden"
    listed = json.loads((folder / "golden.json").read_text("utf-8"))
    assert len(listed) == 16
    assert {one["label"] for one in listed} == set(digits.classes)
    assert {path.name for path in folder.iterdir()} == {"golden.json", *(one["file"] for one in listed)}
    graph = training.load_graph(digits_run)
    right = 0
    for one in listed:
        assert one["kind"] == "image"
        picture = images.decode((folder / one["file"]).read_bytes(), ImageInput(1, 16, 16), Limits())
        with torch.inference_mode():
            right += digits.classes[int(graph(torch.from_numpy(picture)[None])[0].argmax())] == one["label"]
    assert right >= 12


def test_golden_examples_of_files_are_the_files(folder: Path, tiny_set: Dataset, tmp_path: Path) -> None:
    run = training.train(tiny(training__epochs=1), tiny_set, tmp_path, progress=False)
    listed = json.loads((run.path / "golden" / "golden.json").read_text("utf-8"))
    bodies = [(run.path / "golden" / one["file"]).read_bytes() for one in listed]
    assert len(set(bodies)) == len(bodies) == 16
    of_test = {path.read_bytes() for path in (folder / "test").rglob("*.png")}
    assert set(bodies[:12]) == of_test, "the test part goes first, all twelve of it"
    assert set(bodies[12:]) <= {path.read_bytes() for path in (folder / "train").rglob("*.png")}


def test_examples_come_from_all_over_the_test_part(tmp_path: Path, tiny_set: Dataset, monkeypatch: Any) -> None:
    monkeypatch.setattr("marwright.learning.golden.EXAMPLES", 6)
    run = training.train(tiny(training__epochs=1), tiny_set, tmp_path, progress=False)
    labels = np.load(run.path / "examples.npz")["labels"]
    assert len(labels) == 6
    assert set(labels.tolist()) == {0, 1, 2}, "files are sorted by class; the first six are of one"


def test_a_large_test_part_is_held_out_up_to_a_size(
    tmp_path: Path, tiny_set: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        len(np.load(training.train(tiny(), tiny_set, tmp_path, progress=False).path / "examples.npz")["labels"]) == 12
    )
    row = 3 * 8 * 8
    for size, count in ((7 * row, 7), (7 * row - 1, 6), (1, 2)):
        monkeypatch.setattr(golden, "BYTES", size)
        golden.write(tiny_set, tmp_path / str(size))
        with np.load(tmp_path / str(size) / "examples.npz") as saved:
            assert (len(saved["inputs"]), len(saved["labels"])) == (count, count)


def test_a_linear_regressor_finds_least_squares(linear_run: Run, diabetes: Dataset) -> None:
    from sklearn.linear_model import LinearRegression

    (rows, values), (test_rows, test_values) = (
        (rows.numpy(), values.numpy())
        for rows, values in (part.take(torch.arange(len(part))) for part in (diabetes.train, diabetes.test))
    )
    answers = LinearRegression().fit(rows, values).predict(test_rows)
    wanted = float(((answers - test_values) ** 2).mean() ** 0.5)
    assert linear_run.spec.metrics["rmse"] <= 1.02 * wanted


def test_a_regressor_takes_raw_rows_and_answers_in_the_targets_unit(linear_run: Run, diabetes: Dataset) -> None:
    graph = training.load_graph(linear_run)
    assert linear_run.spec.target == "progression"
    assert linear_run.spec.outputs == ("value",)
    assert float(graph.target_mean) == pytest.approx(float(diabetes.train.targets.mean()), rel=1e-5)
    with torch.inference_mode():
        (value,) = graph(diabetes.test.take(torch.arange(20))[0])
    assert value.shape == (20, 1)
    assert 50 < float(value.mean()) < 300
    listed = json.loads((linear_run.path / "golden" / "golden.json").read_text("utf-8"))
    assert len(listed) == 16
    assert set(listed[0]) == {"file", "kind", "value"}
    assert len(json.loads((linear_run.path / "golden" / "00.json").read_text("utf-8"))) == 10


def test_the_best_epoch_is_kept_and_patience_ends_training(tiny_set: Dataset, tmp_path: Path) -> None:
    chosen = tiny(training__epochs=40, training__regularisation={"patience": 3})
    run = training.train(chosen, tiny_set, tmp_path, progress=False)
    curves: Any = run.json("curves.json", made_by="train")
    best = training.best_epoch(curves)
    assert run.about["best_epoch"] == best
    assert run.about["stopped_early"]
    assert len(curves) == best + 3
    graph = training.load_graph(run)
    kept = evaluation.evaluate(graph, tiny_set.validation, classes=tiny_set.classes)
    assert kept.loss == pytest.approx(curves[best - 1]["validation_loss"], rel=1e-4)


def test_the_best_epoch_has_the_highest_accuracy_then_the_lowest_loss() -> None:
    rows = [
        {"epoch": i + 1, "validation_accuracy": accuracy, "validation_loss": loss}
        for i, (accuracy, loss) in enumerate([(0.5, 0.1), (0.9, 0.3), (0.9, 0.2), (0.9, 0.2)])
    ]
    assert training.best_epoch(rows) == 3
    assert training.best_epoch([{"epoch": i + 1, "validation_loss": loss} for i, loss in enumerate([3, 1, 2])]) == 2


def test_a_net_that_comes_apart_says_so(tiny_set: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="came apart") as caught:
        training.train(tiny(training__optimiser={"name": "sgd", "lr": 1e30}), tiny_set, tmp_path, progress=False)
    assert "lower learning rate" in caught.value.hint


def test_a_last_batch_of_one_does_not_stop_a_net_with_norms(tiny_set: Dataset, tmp_path: Path) -> None:
    size = len(tiny_set.train) - 1
    chosen = tiny(net={"name": "cifar_resnet", "args": {"blocks": 1, "filters": 4}}, training__batch_size=size)
    assert training.train(chosen, tiny_set, tmp_path, progress=False).finished


def test_progress_is_a_bar_on_a_terminal_and_a_line_an_epoch_in_a_log(
    tiny_set: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training.train(tiny(), tiny_set, tmp_path / "a", progress=False)
    assert capsys.readouterr().out == ""
    training.train(tiny(), tiny_set, tmp_path / "b", progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take its output for a terminal
    training.train(tiny(), tiny_set, tmp_path / "c", progress=True)
    shown = capsys.readouterr().out
    assert "training tiny" in shown
    assert "epoch 1 of 2" not in shown


def test_a_second_training_of_the_same_waits_for_the_first(tiny_set: Dataset, tmp_path: Path) -> None:
    chosen = tiny(training__epochs=1)
    name = provenance.run_id(chosen, tiny_set)
    found: list[Run] = []
    second = threading.Thread(
        target=lambda: found.append(training.train(chosen, tiny_set, tmp_path, progress=False)), daemon=True
    )
    with filelock.FileLock(tmp_path / f".{name}.lock"):
        second.start()
        second.join(timeout=1.0)
        assert second.is_alive(), "it did not wait"
        assert not (tmp_path / name).exists()
    second.join(timeout=60)
    assert found[0].finished
