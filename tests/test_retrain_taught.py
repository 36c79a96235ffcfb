"""Turns of the loop that production has taught: labels come, the judge says yes or no, and what was refused waits.

The rollout itself is stood in for, as in test_retrain; tests/test_demo.py has it on a live server.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from handlers import spool
from marwright.errors import DataError, RolledBack
from marwright.feedback.store import Store
from marwright.learning import corruptions, graphs
from marwright.packing import records, reference
from marwright.release import journal
from marwright.runs import Run
from marwright.settings import RetrainSettings, RolloutSettings
from scripts import __main__ as marwright
from scripts import reconcile, retrain, rollout
from tests import torchserve

OWN = 1000
RECIPE = """
task = "classification"
data = {{ source = "folder", path = {path}, channels = 1, height = 16, width = 16, test_share = 0.3 }}
net = {{ name = "small_cnn" }}
serving = {{ format = "eager" }}

[training]
epochs = 6
batch_size = 64
optimiser = {{ name = "adam", lr = 0.001 }}
regularisation = {{ dropout = 0.25, crop = 1 }}
"""
POLICY = """
[trigger]
min_labels = 200
floor = 50
drift_window = 100

[judge]
max_forgetting = 0.03
"""


@dataclass
class House:
    """A model `tiny` whose requests are dark digits. `rollouts` has what the stand-in was asked for."""

    root: Path
    running: bool = True
    verdict: str = ""
    rollouts: list[str] = field(default_factory=list)
    holdouts: list[int] = field(default_factory=list)
    """Examples of the holdout that each was given."""
    asked: int = 0

    @property
    def settings(self) -> RetrainSettings:
        return RetrainSettings(
            store=self.root / "store",
            config=self.root / "config.properties",
            runs=self.root / "runs",
            recipes=self.root / "recipes",
            feedback=self.root / "feedback",
            policy=self.root / "policy.toml",
            recipe="tiny",
        )

    def turn(self, **changes: object) -> tuple[retrain.Outcome, list[str]]:
        said: list[str] = []
        return retrain.retrained(replace(self.settings, **changes), say=said.append), said  # type: ignore[arg-type]

    def versions(self) -> list[str]:
        return [each.version for each in records.records(self.settings.store, "tiny")]

    def run_of(self, version: str) -> Run:
        return Run(self.settings.runs / records.record(self.settings.store, "tiny", version).run)

    def ask(self, count: int, label: Callable[[int, str], str] = lambda number, truth: truth) -> None:
        """So many requests that a worker answered and captured, and their labels as the collector kept them."""
        found = load_digits()
        order = np.random.default_rng(0).permutation(len(found.target))[OWN + self.asked : OWN + self.asked + count]
        assert len(order) == count
        grey = np.rint(found.images[order] * 255 / 16).astype(np.uint8)[:, np.newaxis]
        dark = corruptions.corrupt(grey, "darkness", 4)
        with journal.open(self.settings.store) as book:
            released = book.released("tiny")
        assert released is not None
        record = records.record(self.settings.store, "tiny", released.version)
        run = self.run_of(record.version)
        spec, graph = run.spec, graphs.load(run)
        head = {"v": 1, "model": "tiny", "version": record.version, "bundle": record.bundle}
        requests = spool.Writer(self.settings.spool, "requests", {**head, "spec": json.loads(spec.to_json())})
        labels = spool.Writer(self.settings.spool, "labels", {"v": 1, "collector": "1.0"})
        for number, (picture, target) in enumerate(zip(dark, found.target[order], strict=True), self.asked):
            stream = io.BytesIO()
            Image.fromarray(picture[0]).save(stream, "PNG")
            body = stream.getvalue()
            sized = np.asarray(Image.fromarray(picture[0]).resize((16, 16), Image.Resampling.BILINEAR))
            with torch.inference_mode():
                probabilities, embedding = graph(torch.from_numpy(sized.copy())[None, None])
            first, second = probabilities.numpy().astype("<f4"), embedding.numpy().astype("<f2")
            said = {
                "id": f"r{number}", "rows": 1, "body": [0, len(body)], "sha256": hashlib.sha256(body).hexdigest(),
                "type": "image/png", "http": True,
            }  # fmt: skip
            outputs = {
                "probabilities": [len(body), *first.shape, "float32"],
                "embedding": [len(body) + first.nbytes, *second.shape, "float16"],
            }
            at = time.time() - 5000 + number
            requests.append(
                {"time": at, "requests": [said], "outputs": outputs}, body + first.tobytes() + second.tobytes()
            )
            given = {"uid": f"u{number}", "request": f"r{number}", "instance": 0, "source": "people", "time": None}
            labels.append({"received": time.time(), "labels": [{**given, "label": label(number, str(target))}]})
        requests.close()
        labels.close()
        self.asked += count


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.0 of it is released."""
    root = tmp_path_factory.mktemp("taught")
    found = load_digits()
    for i in np.random.default_rng(0).permutation(len(found.target))[:OWN]:
        path = root / "own" / str(found.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(found.images[i] * 255 / 16).astype(np.uint8)).save(path)
    torchserve.write_config(root / "config.properties", {})
    (root / "recipes").mkdir()
    (root / "recipes" / "tiny.toml").write_text(RECIPE.format(path=json.dumps(str(root / "own"))), encoding="utf-8")
    (root / "policy.toml").write_text(POLICY, encoding="utf-8")
    outcome, _ = House(root).turn()
    assert (outcome.phase, outcome.version) == ("released", "1.0")
    return root


@pytest.fixture
def house(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    shutil.copytree(built, tmp_path / "house")
    made = House(tmp_path / "house")

    def rolled_out(settings: RolloutSettings) -> rollout.Outcome:
        assert settings.version is not None
        made.rollouts.append(settings.version)
        if settings.holdout is not None:
            with np.load(settings.holdout) as given:
                made.holdouts.append(len(given["labels"]))
        with journal.open(settings.store) as book:
            if made.verdict:
                book.add("tiny", settings.version, "rolled back", reason=made.verdict, innocent=False)
                raise RolledBack(f"tiny {settings.version} was rolled back", reason=made.verdict)
            book.release("tiny", settings.version, proven=True, why="rollout")
        return rollout.Outcome("tiny", settings.version, "settled")

    monkeypatch.setattr(rollout, "rolled_out", rolled_out)
    monkeypatch.setattr(rollout, "resumed", lambda settings: None)
    monkeypatch.setattr(reconcile, "mended", lambda settings, model: [])
    monkeypatch.setattr(retrain, "_running", lambda settings: made.running)
    monkeypatch.setattr("marwright.learning.reporting.page", lambda *_: "<!doctype html>")
    return made


def test_labels_come_together_are_learned_from_judged_and_released(house: House) -> None:
    with pytest.raises(DataError, match="there is nothing to decide by: no feedback store"):
        retrain.considered(house.settings)
    house.ask(60)
    outcome, said = house.turn()
    assert outcome.phase == "not yet"
    assert "60 requests and 60 labels taken in" in said
    assert "60 new labelled examples of 200" in said
    assert not retrain.considered(house.settings).retrain

    house.ask(340)
    outcome, said = house.turn()
    assert (outcome.phase, outcome.version) == ("settled", "1.1"), said
    assert house.rollouts == ["1.1"]
    assert any(line.startswith("400 new examples with a label from production") for line in said)
    assert any(line.startswith("new holdout: accuracy") and "better by at least" in line for line in said)
    assert any(line.startswith("old holdout: accuracy") for line in said)
    run = house.run_of("1.1")
    learned = set(run.json("split.json", made_by="train")["new"])
    assert len(learned) == 280, "seven tenths of 400: the latest are the judge's"
    with Store.open(house.settings.feedback) as store:
        latest = {each.digest for each in store.labelled("tiny")[-120:]}
        turns = store.notes("turn", "tiny", last=9)
    assert not learned & latest
    assert turns == [], "a turn notes itself when it is one of the command's"
    with np.load(run.path / "examples.npz") as old:
        assert house.holdouts == [len(old["labels"]) + 120], "the gate is given both holdouts"
    assert not (house.settings.runs / "feedback" / "tiny.npz").exists()
    known = reference.read(house.settings.store / "tiny-1.1.mar")
    assert known is not None
    assert len(known) == 120, "its requests are compared with the latest of production from now on"
    dark, ordinary = known.values["brightness"].mean(), reference.read(house.settings.store / "tiny-1.0.mar")
    assert ordinary is not None
    assert dark < 0.7 * ordinary.values["brightness"].mean()

    outcome, said = house.turn()
    assert (outcome.phase, outcome.version) == ("not yet", "1.1")
    assert "120 new labelled examples of 200" in said, "what judged is new to the version that it judged"


def test_the_command_says_whether_a_turn_would_learn_and_notes_its_turns(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    house.ask(60)
    at = house.settings
    words = ["retrain", "--recipe", "tiny", "--policy", str(at.policy)]
    for name in ("store", "config", "runs", "recipes", "feedback"):
        words += [f"--{name}", str(getattr(at, name))]
    assert marwright.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("a turn would not learn\n")
    assert marwright.main([*words, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["retrain"], document["signals"]["labels"]) == (False, 60)
    assert marwright.main(words) == 0
    assert " tiny: not yet: " in capsys.readouterr().out
    with Store.open(at.feedback) as store:
        (note,) = store.notes("turn", "tiny", last=9)
    assert note["phase"] == "not yet"
    assert house.versions() == ["1.0"]


def test_a_batch_with_flipped_labels_is_stopped_and_not_tried_again(house: House) -> None:
    random = np.random.default_rng(1)
    house.ask(700, label=lambda number, truth: "8" if truth == "3" and random.random() < 0.5 else truth)
    with pytest.raises(RolledBack, match="is not released"):
        house.turn()
    assert house.versions() == ["1.0"], "nothing was archived"
    assert house.rollouts == []
    outcome, said = house.turn()
    assert outcome.phase == "not yet", said
    assert "0 new labelled examples of 200" in said


def test_what_the_gate_refused_waits_for_new_labels(house: House) -> None:
    house.ask(400)
    house.verdict = "worse by 3 points"
    with pytest.raises(RolledBack, match="worse by 3 points"):
        house.turn()
    assert house.turn()[0].phase == "not yet"
    assert house.rollouts == ["1.1"]
    house.verdict = ""
    house.ask(250)
    outcome, said = house.turn()
    assert (outcome.phase, outcome.version) == ("settled", "1.2"), said


def test_without_a_server_what_was_learned_waits(house: House) -> None:
    house.ask(400)
    house.running = False
    outcome, _ = house.turn()
    assert (outcome.phase, outcome.version) == ("waiting", "1.1")
    assert house.turn()[0].phase == "waiting"
    house.running = True
    outcome, said = house.turn()
    assert (outcome.phase, outcome.version) == ("settled", "1.1"), said
    assert any(line.startswith("there was") for line in said), "nothing is trained twice"


def test_a_method_learns_from_what_is_new_and_a_buffer(house: House) -> None:
    house.ask(400)
    said: list[str] = []
    with contextlib.suppress(RolledBack):  # six epochs' worth at a fifth of the cost may be too few for the judge
        retrain.retrained(replace(house.settings, method="replay"), say=said.append)
    assert any(line.startswith("from the weights of tiny-") and line.endswith(" by replay") for line in said)
    (run,) = (one for one in map(Run, house.settings.runs.glob("tiny-*")) if one.about["method"] == "replay")
    assert run.finished


def test_labels_are_not_lost_with_the_run_of_the_champion(house: House) -> None:
    house.ask(400)
    shutil.rmtree(house.run_of("1.0").path)
    outcome, said = house.turn()
    assert (outcome.phase, outcome.version) == ("settled", "1.1"), said
    assert any(line.startswith("nobody judges before the rollout: the run of 1.0 is gone") for line in said)
