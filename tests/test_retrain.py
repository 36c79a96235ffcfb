"""The loop once around, and again: nothing new, refused, waiting, killed, overlapping, on a schedule.

The rollout itself is stood in for where no server is needed to show what `retrain` does; the last test has all of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import filelock
import pytest

from marwright.errors import DataError, RolledBack, ServerUnreachable, SettingsError
from marwright.packing import records
from marwright.release import journal
from marwright.runs import Run
from marwright.settings import RetrainSettings, RolloutSettings
from scripts import __main__ as marwright
from scripts import reconcile, retrain, rollout, schedule
from tests import torchserve
from tests.learning.conftest import fill, picture

ROOT = Path(__file__).parent.parent
RECIPE = """
task = "classification"
data = {{ source = "folder", path = "{data}", channels = 3, height = 8, width = 8 }}
net = {{ {net} }}
serving = {{ format = "eager" }}

[training]
epochs = {epochs}
batch_size = 8
optimiser = {{ name = "adam", lr = 0.01 }}
regularisation = {{ label_smoothing = 0.1, dropout = 0.2 }}
"""


@dataclass
class House:
    """A store, runs, recipes and a folder for new examples of a model `tiny`; `running` says whether a server is."""

    root: Path
    running: bool = True
    verdict: str = ""
    """Why the next rollout is rolled back; it is settled where this is empty."""
    innocent: bool = False
    """That is not the version's fault."""
    rollouts: list[str] = field(default_factory=list)
    resumed: Callable[[], rollout.Outcome | None] = lambda: None

    @property
    def settings(self) -> RetrainSettings:
        return RetrainSettings(
            store=self.root / "store",
            config=self.root / "config.properties",
            runs=self.root / "runs",
            recipes=self.root / "recipes",
            feedback=self.root / "feedback",
            recipe="tiny",
            new=self.root / "new",
        )

    @property
    def words(self) -> list[str]:
        """The same, as a command line."""
        at = self.settings
        places = {"store": at.store, "config": at.config, "runs": at.runs, "recipes": at.recipes, "new": at.new}
        places |= {"feedback": at.feedback}
        return [
            "retrain",
            "--recipe",
            "tiny",
            *(word for key, path in places.items() for word in (f"--{key}", str(path))),
        ]

    def recipe(self, *, epochs: int = 1, net: str = 'name = "small_cnn"') -> None:
        text = RECIPE.format(data=self.root / "own", epochs=epochs, net=net)
        (self.root / "recipes").mkdir(exist_ok=True)
        (self.root / "recipes" / "tiny.toml").write_text(text, encoding="utf-8")

    def label(self, count: int, *, first: int = 0) -> None:
        """So many new examples."""
        for i in range(first, first + count):
            folder = self.root / "new" / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(picture(5000 + i, hue=i % 2))

    def turn(self, **changes: object) -> tuple[retrain.Outcome, list[str]]:
        said: list[str] = []
        return retrain.retrained(replace(self.settings, **changes), say=said.append), said  # type: ignore[arg-type]

    def released(self) -> str:
        with journal.open(self.settings.store) as book:
            found = book.released("tiny")
        assert found is not None
        return found.version

    def run_of(self, version: str) -> Run:
        return Run(self.settings.runs / records.record(self.settings.store, "tiny", version).run)

    def versions(self) -> list[str]:
        return [each.version for each in records.records(self.settings.store, "tiny")]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None) -> House:
    made = House(tmp_path)
    torchserve.write_config(tmp_path / "config.properties", {})
    fill(tmp_path / "own", {"a": 14, "b": 14, "c": 14})
    (tmp_path / "new").mkdir()
    made.recipe()

    def rolled_out(settings: RolloutSettings) -> rollout.Outcome:
        assert (settings.model, settings.store) == ("tiny", made.settings.store)
        assert settings.version is not None
        made.rollouts.append(settings.version)
        with journal.open(settings.store) as book:
            if made.verdict:
                book.add("tiny", settings.version, "rolled back", reason=made.verdict, innocent=made.innocent)
                raise RolledBack(f"tiny {settings.version} was rolled back", reason=made.verdict)
            book.release("tiny", settings.version, proven=True, why="rollout")
        return rollout.Outcome("tiny", settings.version, "settled")

    monkeypatch.setattr(rollout, "rolled_out", rolled_out)
    monkeypatch.setattr(rollout, "resumed", lambda settings: made.resumed())
    monkeypatch.setattr(reconcile, "mended", lambda settings, model: [])
    monkeypatch.setattr(retrain, "_running", lambda settings: made.running)
    monkeypatch.setattr("marwright.learning.reporting.page", lambda *_: "<!doctype html>")
    return made


@pytest.fixture
def served(house: House) -> House:
    """1.0 is released."""
    outcome, _ = house.turn()
    assert (outcome.phase, outcome.version) == ("released", "1.0")
    return house


def test_the_first_version_of_all_is_released_and_a_second_turn_does_nothing(house: House) -> None:
    first, said = house.turn()
    assert (first.phase, first.version, house.released()) == ("released", "1.0", "1.0")
    assert "from scratch" in said
    before = sorted(path.name for path in (house.root / "runs").iterdir())
    second, said = house.turn()
    assert (second.phase, second.version) == ("nothing new", "1.0")
    assert said == ["0 new examples"]
    assert sorted(path.name for path in (house.root / "runs").iterdir()) == before
    assert (house.versions(), house.rollouts) == (["1.0"], [])


def test_new_examples_are_learned_from_the_champions_weights_and_rolled_out(served: House) -> None:
    served.label(20)
    outcome, said = served.turn()
    assert outcome == retrain.Outcome("tiny", "settled", "1.1", served.run_of("1.1").id, added=20)
    assert served.rollouts == ["1.1"]
    about, champion = served.run_of("1.1").about, served.run_of("1.0")
    assert about["start"]["run"] == champion.id
    assert about["new_examples"] == 20
    assert said[0] == "20 new examples"
    assert f"from the weights of {champion.id}" in said
    assert served.turn()[0].phase == "nothing new"
    served.label(3, first=20)
    again, _ = served.turn()
    assert (again.version, again.added) == ("1.2", 3)
    assert served.run_of("1.2").about["start"]["run"] == served.run_of("1.1").id


def test_the_default_folder_of_new_examples_may_be_missing_and_a_named_one_may_not(
    served: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(served.root)
    assert served.turn(new=None)[0].phase == "nothing new"
    served.label(2)
    (served.root / "labelled").mkdir()
    (served.root / "new").rename(served.root / "labelled" / "tiny")
    (served.root / "labelled").rename(served.root / "new")
    assert served.turn(new=None)[0].added == 2
    with pytest.raises(DataError, match="no folder or zip"):
        served.turn(new=served.root / "missing")


def test_what_was_refused_is_not_tried_again_until_there_is_more(served: House) -> None:
    served.label(10)
    served.verdict = "accuracy 0.61 is below 0.70"
    with pytest.raises(RolledBack, match=r"0\.61"):
        served.turn()
    outcome, said = served.turn()
    assert (outcome.phase, outcome.version) == ("refused before", "1.1")
    assert any(step.startswith(f"there was {outcome.run} (") for step in said), "it was not trained again"
    assert any("accuracy 0.61" in step and "marwright rollout 1.1 --model tiny" in step for step in said)
    assert (served.rollouts, served.versions(), served.released()) == (["1.1"], ["1.0", "1.1"], "1.0")
    served.verdict = ""
    served.label(5, first=10)
    outcome, _ = served.turn()
    assert (outcome.phase, outcome.version, outcome.added) == ("settled", "1.2", 15)
    assert served.run_of("1.2").about["start"]["run"] == served.run_of("1.0").id


def test_a_rollout_that_was_only_interrupted_is_tried_again(served: House) -> None:
    served.label(10)
    served.verdict, served.innocent = "watched: interrupted by Ctrl-C", True
    with pytest.raises(RolledBack):
        served.turn()
    served.verdict = ""
    assert served.turn()[0].phase == "settled"
    assert served.rollouts == ["1.1"] * 2


def test_a_version_that_somebody_went_back_from_stays_away(served: House) -> None:
    served.label(10)
    served.turn()
    with journal.open(served.settings.store) as book:
        book.release("tiny", "1.0", proven=True, why="by hand", back=True)
    outcome, said = served.turn()
    assert outcome.phase == "refused before"
    assert any("answered before, and another version was preferred" in step for step in said)
    assert served.rollouts == ["1.1"]


def test_without_a_server_the_archive_waits_for_its_rollout(served: House) -> None:
    served.running = False
    served.label(10)
    outcome, said = served.turn()
    assert (outcome.phase, outcome.version, served.released()) == ("waiting", "1.1", "1.0")
    assert any("TorchServe is not running" in step for step in said)
    assert served.turn()[0].phase == "waiting"
    served.running = True
    outcome, said = served.turn()
    assert (outcome.phase, outcome.version, served.rollouts) == ("settled", "1.1", ["1.1"])
    assert "tiny-1.1.mar was built before" in said


def test_a_folder_that_is_away_is_no_reason_to_forget(served: House) -> None:
    served.label(10)
    served.turn()
    shutil.rmtree(served.root / "new")
    (served.root / "new").mkdir()
    outcome, said = served.turn()
    assert (outcome.phase, outcome.version) == ("nothing new", "1.1")
    assert "10 that 1.1 has learned from are gone" in said


def test_without_the_champions_run_training_is_from_scratch_and_says_so(served: House) -> None:
    shutil.rmtree(served.run_of("1.0").path)
    outcome, said = served.turn()
    assert outcome.phase == "nothing new"
    assert "1.0 was made of the same examples" in said
    served.label(10)
    outcome, said = served.turn()
    assert outcome.phase == "settled"
    assert any(step.endswith("of which 1.0 was made, is gone") for step in said)
    assert "from scratch" in said
    assert served.run_of("1.1").about["start"] is None


def test_another_net_is_trained_from_scratch_and_says_so(served: House) -> None:
    served.label(10)
    served.recipe(net='name = "cifar_resnet", args = { blocks = 1, filters = 4 }')
    outcome, said = served.turn()
    assert outcome.phase == "settled"
    assert any(re.match(r"from scratch, as tiny-\w+ cannot be the start: its net is small_cnn", step) for step in said)


def test_more_of_the_recipes_own_data_is_something_new(served: House) -> None:
    fill(served.root / "own", {"c/more": 3})
    outcome, said = served.turn()
    assert outcome.phase == "settled"
    assert said[:2] == ["0 new examples", "the recipe's own data are others"]


def test_an_interrupted_rollout_is_finished_first(served: House) -> None:
    served.resumed = lambda: rollout.Outcome("tiny", "1.0", "settled")
    outcome, said = served.turn()
    assert outcome.phase == "nothing new"
    assert said[0] == "the interrupted rollout of 1.0 is settled"

    def back() -> rollout.Outcome | None:
        raise RolledBack("tiny 1.1 was rolled back", reason="slow")

    served.resumed = back
    with pytest.raises(RolledBack):
        served.turn()
    served.running = False
    assert served.turn()[0].phase == "nothing new"


def test_a_second_turn_at_a_time_says_so_and_ends_well(served: House, capsys: pytest.CaptureFixture[str]) -> None:
    served.label(10)
    with filelock.FileLock(served.settings.store / ".retrain-tiny.lock"):
        assert marwright.main(served.words) == 0
        assert "tiny: busy: another retraining of it is under way" in capsys.readouterr().out
    assert served.versions() == ["1.0"]
    assert marwright.main(served.words) == 0
    assert "tiny: settled: 10 new examples; " in capsys.readouterr().out


def test_exit_codes_and_the_line_of_a_turn_that_failed(served: House, capsys: pytest.CaptureFixture[str]) -> None:
    served.label(10)
    served.verdict = "worse by 3 points"
    assert marwright.main(served.words) == 3
    seen = capsys.readouterr()
    line = seen.out.splitlines()[-1]
    assert re.match(
        r"\d{4}-\d\d-\d\dT\S+ tiny: rolled back: 10 new examples; from the weights of tiny-\w+; trained", line
    )
    assert line.endswith("; built tiny-1.1.mar; tiny 1.1 was rolled back: worse by 3 points")
    assert "error: tiny 1.1 was rolled back" in seen.err
    assert marwright.main([*served.words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["phase"], document["version"], document["added"]) == ("refused before", "1.1", 10)


def test_what_is_wrong_with_the_folder_is_said(served: House, capsys: pytest.CaptureFixture[str]) -> None:
    (served.root / "new" / "zebra").mkdir()
    (served.root / "new" / "zebra" / "1.png").write_bytes(picture(1))
    assert marwright.main(served.words) == 1
    said = capsys.readouterr().err
    assert "classes that the model does not know: 'zebra' (1 files)" in said
    assert "known are: 'a', 'b', 'c'" in said
    shutil.rmtree(served.root / "new")
    (served.root / "new").write_bytes(b"PK\x03\x04 half a zip")
    assert marwright.main(served.words) == 1
    assert "is not a folder or a zip" in capsys.readouterr().err
    assert served.versions() == ["1.0"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("1s", 1), ("30s", 30), ("15m", 900), ("1h", 3600), ("1d", 86400), ("366d", 31622400)]
)
def test_a_period_is_a_number_and_its_unit(text: str, seconds: int) -> None:
    assert schedule.period(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "1", "h", "1 h", "1.5h", "-1h", "0s", "1w", "367d", "999999999d", "1h30m", "1H"])
def test_other_periods_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(repr(text))) as caught:
        schedule.period(text)
    assert "30s, 15m, 1h, 1d" in caught.value.hint


@pytest.mark.parametrize(
    "words", [["--turns", "3"], ["--every", "1h", "--once"], ["--every", "1h", "--turns", "0"], ["--every", "soon"]]
)
def test_options_that_contradict_each_other_are_refused(
    words: list[str], house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    assert marwright.main([*house.words, *words]) == 2
    assert "→" in capsys.readouterr().err
    assert house.versions() == []


def test_a_schedule_outlives_failing_turns(capsys: pytest.CaptureFixture[str]) -> None:
    fates: Iterator[Exception | None] = iter(
        [
            RolledBack("1.1 was rolled back", reason="worse"),
            ServerUnreachable("TorchServe is not running", hint="make serve"),
            OSError("no space left on device"),
            None,
        ]
    )
    seen = []

    def turn() -> None:
        seen.append(threading.current_thread())
        if (fate := next(fates)) is not None:
            raise fate

    assert schedule.repeat(turn, timedelta(milliseconds=20), turns=4) == 0
    assert seen == [threading.main_thread()] * 4
    told = capsys.readouterr().err
    assert all(words in told for words in ("1.1 was rolled back: worse", "TorchServe is not running", "no space left"))


def test_turns_that_fell_due_while_one_was_under_way_become_one() -> None:
    count = 0

    def turn() -> None:
        nonlocal count
        count += 1
        if count == 1:
            time.sleep(0.5)  # ten periods: uncoalesced they would all run before the schedule could end

    assert schedule.repeat(turn, timedelta(milliseconds=50), turns=3) == 0
    assert count == 3


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, 0), (signal.SIGINT, None)])
def test_sigterm_ends_a_schedule_well_and_ctrl_c_is_ctrl_c(number: signal.Signals, ends: int | None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    count = 0

    def turn() -> None:
        nonlocal count
        count += 1
        os.kill(os.getpid(), number)
        time.sleep(30)

    if ends is None:
        with pytest.raises(KeyboardInterrupt):
            schedule.repeat(turn, timedelta(hours=1))
    else:
        assert schedule.repeat(turn, timedelta(hours=1)) == ends
    assert count == 1
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------------------------ real processes


def started(house: House, *words: str) -> subprocess.Popen[str]:
    """`marwright retrain` as a process of its own, without a server."""
    return subprocess.Popen(
        [sys.executable, "-m", "scripts", *house.words, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_schedule_in_a_process_of_its_own(house: House) -> None:
    with started(house, "--every", "1s", "--turns", "3") as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    lines = [line for line in said.splitlines() if " tiny: " in line]
    assert [line.split(": ")[1] for line in lines] == ["released", "nothing new", "nothing new"]
    assert house.versions() == ["1.0"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_turn_that_is_stopped_while_it_trains_goes_on_in_the_next(served: House, number: signal.Signals) -> None:
    served.running = False
    served.label(10)
    served.recipe(epochs=200)
    with started(served, "--every", "1h") as process:
        until = time.monotonic() + 100
        while not list((served.root / "runs").glob("*/checkpoint.pt")):
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < until, "it never trained"
            time.sleep(0.02)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    wanted = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 0, signal.SIGINT: 130}
    assert process.returncode == wanted[number], said
    if number is not signal.SIGKILL:
        assert " tiny: interrupted: 10 new examples; from the weights of tiny-" in said
    (checkpoint,) = (served.root / "runs").glob("*/checkpoint.pt")
    half = Run(checkpoint.parent)
    assert not half.finished
    assert served.versions() == ["1.0"]
    outcome, _ = served.turn()
    assert (outcome.phase, outcome.version, outcome.run) == ("waiting", "1.1", half.id)
    assert half.about["resumed_after_epoch"] >= 1
    assert half.about["epochs"] == 200
