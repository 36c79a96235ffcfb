"""`marwright drift` and what `retrain` asks of it: captured requests in a real store, against a real archive."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from handlers import spool as spools
from marwright.errors import ArchiveError, DataError, SettingsError
from marwright.feedback.store import Store
from marwright.learning import data, recipe, training
from marwright.learning.corruptions import corrupt
from marwright.packing import reference
from marwright.release import journal
from marwright.release.policy import TriggerPolicy
from marwright.settings import DriftSettings
from scripts import __main__ as entry
from scripts import drift
from tests.archives import ROOT, Built
from tests.feedback.answers import labels, spooled

POLICY = TriggerPolicy(drift_window=100)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> tuple[NDArray[np.uint8], list[str]]:
    """The test part of the digits and its labels: what the version has neither learned from nor as its reference."""
    chosen = recipe.load("digits", recipes_dir=ROOT / "recipes")
    examples = data.load(chosen, cache=tmp_path_factory.mktemp("cache"), progress=False)
    inputs, targets = examples.test.take(torch.arange(len(examples.test)))
    return inputs.numpy(), [examples.classes[target] for target in targets.tolist()]


@pytest.fixture
def settings(digits: Built, tmp_path: Path) -> DriftSettings:
    """digits 1.0 is released, and nothing was asked yet."""
    shutil.copytree(digits.store, tmp_path / "store")
    with journal.open(tmp_path / "store") as book:
        book.release("digits", "1.0", proven=False, why="test")
    (tmp_path / "policy.toml").write_text("[trigger]\ndrift_window = 100\n")
    return DriftSettings(
        store=tmp_path / "store",
        config=ROOT / "config.properties",
        feedback=tmp_path / "feedback",
        policy=tmp_path / "policy.toml",
    )


@pytest.fixture
def ask(digits: Built, settings: DriftSettings) -> Callable[..., list[str]]:
    """Pictures are asked of the released version and taken in; the ids."""
    graph = training.load_graph(digits.run)

    def asked(pictures: NDArray[np.uint8], start: float) -> list[str]:
        ids = spooled(settings.spool, graph, pictures, spec=digits.run.spec, bundle=digits.record.bundle, start=start)
        with Store.open(settings.feedback) as store:
            assert store.ingest(settings.spool).requests == len(pictures)
        return ids

    return asked


def say(settings: DriftSettings, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert drift.main(replace(settings, json=True)) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_requests_like_the_reference_are_no_drift(
    settings: DriftSettings, ask: Any, unseen: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(unseen[0][:150], 1_000)
    assert drift.main(settings) == 0
    out = capsys.readouterr().out
    assert "brightness" in out
    assert "digits 1.0: no drift at a false alarm rate of 0.05 (the last 100 instances" in out
    found = say(settings, capsys)
    assert (found["version"], found["requests"], found["drifted"]) == ("1.0", 100, False)
    assert {test["name"] for test in found["tests"]} >= {"confidence", "embedding", "sharpness", "component 3"}


def test_dark_requests_are_drift_and_the_page_shows_it(
    settings: DriftSettings, ask: Any, unseen: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clean = ask(unseen[0][:60], 1_000)
    dark = ask(corrupt(unseen[0][:60], "darkness", 3), 2_000)
    with Store.open(settings.feedback) as store:
        store.add_labels(labels(clean + dark, unseen[1][:60] + ["0"] * 60))
    assert drift.main(replace(settings, html=tmp_path / "drift.html")) == 0
    out = capsys.readouterr().out
    assert "digits 1.0 has drifted: " in out
    assert "brightness" in out.split("has drifted: ")[1]
    assert "1 in a row, 2 are a reason" in out
    assert "of 120 labelled answers are right" in out
    assert str(tmp_path / "drift.html") in out
    page = (tmp_path / "drift.html").read_text()
    assert "<title>digits 1.0: drift</title>" in page
    assert page.count("data:image/svg+xml") == 4 + 3 + 1 + 3 + 1, "samples, components, MMD, time lines, answers"
    assert "http://" not in page.replace("http://www.w3.org", "")
    for words in ("Tests", "Reference and window", "The window in time", "Labelled answers", "Latest looks"):
        assert f"<h2>{words}</h2>" in page


def test_looks_count_once_for_the_same_requests_and_again_for_new_ones(
    settings: DriftSettings, ask: Any, unseen: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = corrupt(unseen[0], "darkness", 4)
    ask(dark[:100], 1_000)
    assert say(settings, capsys)["looks_in_a_row"] == 1
    ask(dark[100:149], 2_000)
    assert say(settings, capsys)["looks_in_a_row"] == 1, "less than half of the window is new"
    ask(dark[149:150], 3_000)
    assert say(settings, capsys)["looks_in_a_row"] == 2
    ask(unseen[0][:100], 4_000)
    found = say(settings, capsys)
    assert (found["drifted"], found["looks_in_a_row"]) == (False, 0)
    with Store.open(settings.feedback) as store:
        assert len(store.notes("drift", "digits", last=9)) == 3


def test_what_retrain_asks(settings: DriftSettings, ask: Any, unseen: Any, digits: Built) -> None:
    dark = corrupt(unseen[0], "darkness", 4)
    ask(dark[:100], 1_000)
    with Store.open(settings.feedback) as store:
        (look,) = drift.looked(settings, store, digits.record, POLICY)
        assert look.drifted
        assert drift.looked(settings, store, digits.record, POLICY) == [look]
    ask(dark[100:160], 2_000)
    with Store.open(settings.feedback) as store:
        newest, before = drift.looked(settings, store, digits.record, POLICY)
        assert before == look
        assert newest.until == 2_059
        other = replace(digits.record, bundle="f" * 16, version="1.1")
        shutil.copy(settings.store / digits.record.file, settings.store / "other.mar")
        assert drift.looked(settings, store, replace(other, file="other.mar"), POLICY) == []


def test_an_archive_without_a_reference_is_told_and_retrain_goes_on(
    settings: DriftSettings, ask: Any, unseen: Any, digits: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(unseen[0][:30], 1_000)
    path = settings.store / digits.record.file
    with zipfile.ZipFile(digits.path) as whole, zipfile.ZipFile(path, "w") as old:
        for name in whole.namelist():
            if name != "reference.npz":
                old.writestr(name, whole.read(name))
    assert reference.read(digits.path) is not None
    with pytest.raises(ArchiveError, match="has no reference") as told:
        drift.main(settings)
    assert "marwright archive" in told.value.hint
    with Store.open(settings.feedback) as store:
        assert drift.looked(settings, store, digits.record, POLICY) == []


def test_what_is_missing_is_said(settings: DriftSettings, ask: Any, unseen: Any, digits: Built) -> None:
    with pytest.raises(DataError, match="nothing was collected"):
        drift.main(settings)
    assert not settings.feedback.exists()
    settings.feedback.mkdir()
    with pytest.raises(DataError, match="no requests are in the store"):
        drift.main(settings)
    ask(unseen[0][:5], 1_000)
    with pytest.raises(DataError, match="no requests to 'cats'"):
        drift.main(replace(settings, model="cats"))
    writer = spools.Writer(
        settings.spool,
        "requests",
        {"v": 1, "model": "other", "version": "1.0", "bundle": "b", "spec": json.loads(digits.run.spec.to_json())},
    )
    entry_ = {"id": "x", "rows": 1, "body": None, "sha256": "", "type": "image/png", "http": True}
    row = np.full(10, 0.1, np.float32)
    writer.append(
        {"time": 1.0, "requests": [entry_], "outputs": {"probabilities": [0, 1, 10, "float32"]}}, row.tobytes()
    )
    writer.close()
    with Store.open(settings.feedback) as store:
        store.ingest(settings.spool)
    with pytest.raises(SettingsError, match="2 models are in the store: digits, other"):
        drift.main(settings)
    with pytest.raises(DataError, match="no version of other is released"):
        drift.main(replace(settings, model="other"))


def test_few_requests_are_said_to_be_few(
    settings: DriftSettings, ask: Any, unseen: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ask(unseen[0][:5], 1_000)
    words = [f"--{name}={getattr(settings, name)}" for name in ("store", "config", "feedback", "policy")]
    assert entry.main(["drift", *words, "--html", str(tmp_path / "few.html")]) == 0
    out = capsys.readouterr().out
    assert "not compared: brightness: 5 requests and 179 examples of the reference, 20 are needed" in out
    assert "digits 1.0: nothing to compare" in out
    assert "nothing to compare" in (tmp_path / "few.html").read_text()
    with Store.open(settings.feedback) as store:
        assert store.notes("drift", "digits") == []
