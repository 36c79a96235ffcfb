"""What the verbs say before they do anything, of what is on its way, and what they call: held against a real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from marwright.release import journal, loading, plan, proof, rollout, turns
from marwright.settings import ReleasesSettings
from scripts import releases, serve
from scripts import rollout as verb
from tests import rollouts
from tests.archives import Built
from tests.rollouts import Stage

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def stage(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with rollouts.stage(tmp_path_factory.mktemp("told"), digits) as made:
        yield made


def _calls(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call to the server from here on."""
    made: list[str] = []
    server = stage.home.server.__class__
    client = server.client
    monkeypatch.setattr(server, "client", lambda self, **options: client(self, told=made.append, **options))
    return made


def test_a_dry_run_of_the_version_that_answers_lists_its_proof_alone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _calls(stage, monkeypatch)
    assert verb.rolled_out(stage.settings("1.0")).was == "1.0"
    limits = verb.limits_of(stage.places, None, "digits")
    planned = plan.calls(stage.record("1.0"), "1.0", limits, None)
    assert {call for call in made if not call.startswith("GET /ping")} == {each.call for each in planned}
    assert {each.phase for each in planned} == {"begin", "proved"}
    last = plan.calls(stage.record("1.1"), "1.0", limits, None)[-1]
    assert (last.call, last.note) == ("gRPC UnregisterModel digits 1.0", plan.OTHERS)


def test_serve_loads_a_new_model_without_a_call_that_stalls_the_inference_port(
    stage: Stage, regressor: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (regressor.path, regressor.path.with_suffix(".json")):
        shutil.copy2(path, stage.store / path.name)
    made = _calls(stage, monkeypatch)
    serve._load_new_models(stage.home.server, [stage.record("1.0"), regressor.record], 60.0)
    assert [call for call in made if not call.startswith("GET ")] == [f"gRPC RegisterModel {regressor.record.file}"]
    with stage.client() as client:
        assert loading.versions(client, regressor.record.model)["1.0"].ready_workers == regressor.record.workers
        proof.prove(client, regressor.record, regressor.golden, pinned=False)


def test_releases_says_what_answers_and_how_far_a_rollout_is(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> list[str]:
        assert releases.main(ReleasesSettings(**stage.places.__dict__)) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("digits: ")]

    answers = ["digits: 1.0 should answer, released without proof (test)", "digits: 1.0 answers"]
    assert said() == answers
    limits = verb.limits_of(stage.places, None, "digits")
    with verb.rig(stage.settings(), stage.record("1.1"), limits) as made:
        state = rollout.begin(made)
        for _ in range(2):
            state = rollout.advance(state, made)
        with turns.only_one(stage.store, "digits", what="rollout of digits 1.1"):
            *lines, phase, holder = said()
            assert lines == answers
            assert phase == "digits: the rollout of 1.1 is in phase ready"
            assert holder.startswith("digits: held by rollout of digits 1.1, process ")
        *lines, phase = said()
        assert lines == answers
        assert phase == (
            "digits: the rollout of 1.1 is in phase ready; no process holds it:"
            " marwright rollout --resume --model digits"
        )
        made.client.set_default("digits", "1.1")
        assert said()[:2] == [answers[0], "digits: 1.1 answers"], "what the server says, whatever the journal thinks"
        made.book.add("digits", "1.1", "rolling back", id=state.id, reason="ready: too slow\nand more", champion="1.0")
    assert said()[2].startswith("digits: the rollout of 1.1 is on its way back: ready: too slow; no process holds it")
    stage.home.server.stop()
    assert said()[:2] == [
        answers[0],
        "digits: the server cannot be asked what answers: TorchServe is not running",
    ]
    with journal.open(stage.store) as book:
        assert rollout.unfinished(book, "digits") is not None, "looking changed nothing"
