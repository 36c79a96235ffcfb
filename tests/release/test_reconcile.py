"""`reconcile` over several models: what cannot be mended stands in nobody's way, and is tried once."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from marwright.errors import ArchiveError, MarwrightError, ServerUnreachable
from marwright.release import journal
from marwright.settings import ReconcileSettings
from scripts import reconcile
from tests import rollouts
from tests.archives import Built
from tests.rollouts import Stage

pytestmark = pytest.mark.server


def test_one_model_that_cannot_be_mended_leaves_no_other_untouched(
    digits: Built, regressor: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first model's archive is not the one that was built; a request to digits 1.0 is always on its way."""
    with rollouts.stage(
        tmp_path, digits, policy=rollouts.QUICK.replace("drain_seconds = 10", "drain_seconds = 2")
    ) as stage:
        for path in (regressor.path, regressor.path.with_suffix(".json")):
            shutil.copy2(path, stage.store / path.name)
        with (stage.store / regressor.path.name).open("ab") as damaged:
            damaged.write(b"more")
        with journal.open(stage.store) as book:
            book.release(regressor.record.model, "1.0", proven=False, why="test")
            book.release("digits", "1.1", proven=False, why="test")
        settings = ReconcileSettings(**stage.places.__dict__)
        stop = threading.Event()
        caller = threading.Thread(target=_call_pinned, args=(stage, "1.0", stop))
        caller.start()
        try:
            with pytest.raises(ArchiveError, match=regressor.record.model):
                reconcile.main(settings)
        finally:
            stop.set()
            caller.join()
        said = capsys.readouterr().out
        assert "digits 1.1 is loaded, and answers its golden examples" in said
        assert "digits 1.1 answers" in said
        assert said.count("digits 1.0 is kept: ") == 1
        assert stage.answers() == "1.1"
        assert stage.held() == ["1.0", "1.1"]
        assert [entry.version for entry in stage.entries("retiring")] == ["1.0"], "it is not tried again and again"

        (stage.store / regressor.path.with_suffix(".json").name).unlink()
        assert reconcile.main(settings) == 0
        assert capsys.readouterr().out == "digits 1.0 is retired\n", "nobody calls it any more"


def _call_pinned(stage: Stage, version: str, stop: threading.Event) -> None:
    body = next((stage.runs / stage.record("1.0").run / "golden").glob("*.png")).read_bytes()
    with stage.client() as client:
        while not stop.wait(0.05):
            client.predict("digits", body, version=version)


def test_every_trouble_is_told_once_and_what_was_done_is_said(
    digits: Built, regressor: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for built in (digits, regressor):
        shutil.copy2(built.path.with_suffix(".json"), tmp_path / built.path.with_suffix(".json").name)
    settings = ReconcileSettings(store=tmp_path, config=digits.store / "none", json=True)
    troubles: dict[str, MarwrightError] = {}

    def mended(_: ReconcileSettings, model: str):  # type: ignore[no-untyped-def]
        yield f"{model} was touched"
        raise troubles[model]

    monkeypatch.setattr(reconcile, "mended", mended)
    models = sorted([digits.record.model, regressor.record.model])
    troubles.update({model: ServerUnreachable("TorchServe is not running") for model in models})
    with pytest.raises(ServerUnreachable):
        reconcile.main(settings)
    said = capsys.readouterr()
    assert json.loads(said.out) == [f"{model} was touched" for model in models]
    assert said.err == "", "the command line tells the one that was raised"
    troubles[models[0]] = ArchiveError("the file is gone", hint="put it back")
    with pytest.raises(ServerUnreachable):
        reconcile.main(settings)
    done, told = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(done) == 2
    assert told == {"error": "ArchiveError", "message": "the file is gone", "hint": "put it back"}
