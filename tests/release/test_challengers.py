"""Challengers that are broken in the ways that matter, each stopped by the phase that should; and better ones, let in.

Limits are the ones that a user has who writes no policy, and for digits the project's own; only waiting is shorter. All
the while somebody asks the default URL: whatever a challenger does, its callers notice nothing.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import threading
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from PIL import Image

from marwright.errors import MarwrightError, RolledBack
from marwright.learning import data, recipe, training
from marwright.packing import golden, records
from marwright.release import journal, loading, processes, proof, rollout
from marwright.release.gate import Verdict
from marwright.settings import RolloutSettings
from scripts import rollback as rollback_verb
from scripts import rollout as verb
from tests import archives, broken, rollouts, torchserve
from tests.archives import ROOT, Built
from tests.rollouts import Stage

pytestmark = pytest.mark.server

Limits = Mapping[str, Mapping[str, float]]

QUICK: Limits = {
    "watch": {"seconds": 1.0, "every": 0.2, "max_latency_ratio": 50.0, "max_p99_ratio": 1000.0},
    "settle": {"idle_seconds": 0.3, "drain_seconds": 5.0, "warm_seconds": 600.0},
    "server": {"call_seconds": 10.0},
}
"""Shorter waiting. After the switch a busy machine may be slow: that is tried where nothing else runs."""

FEW = {"requests": 20}
"""To shadow, where another phase is to stop it."""

NO_SHADOW_LIMITS = {"min_agreement": 0.0, "max_latency_ratio": 1000.0}


@dataclass(frozen=True)
class Case:
    """What is wrong with it, which phase should stop it, and what that should say."""

    name: str
    phase: str
    says: str
    bug: str = ""
    limits: Limits = field(default_factory=dict)
    shuffled: bool = False
    """Its labels are."""
    holdout: bool = False
    """The examples come from elsewhere, not from its own run."""


CASES = (
    Case(
        "loads nowhere",
        "verified",
        r"does not load in a clean process.*the tokenizer is not in the archive",
        bug=broken.LOADS_NOWHERE,
    ),
    Case(
        "answers garbage",
        "verified",
        r"answers its golden examples wrongly.* should be \d",
        bug=broken.ANSWERS_GARBAGE.format(after=0),
    ),
    Case(
        "does not load in the server",
        "ready",
        r"a worker of digits 2\.\d+ cannot start.*ValueError: buffers were laid out for batches of 1",
        bug=broken.LOADS_IN_NO_SERVER,
    ),
    Case(
        "loads slowly",
        "ready",
        r"digits 2\.\d+ has 0 of 1 workers ready after 4 s",
        bug=broken.LOADS_SLOWLY,
        limits={"ready": {"seconds": 4.0}},
    ),
    Case(
        "leaks memory",
        "shadowed",
        r"its worker grew by \d{3} MB more than that of 1\.\d over 100 requests, limit 50 MB",
        bug=broken.LEAKS,
    ),
    Case(
        "crashes on the 100th request",
        "shadowed",
        r"1 of its workers died and were restarted, limit 0",
        bug=broken.CRASHES,
    ),
    Case(
        "hangs",
        "shadowed",
        r"errors: 1 of \d+ requests that 1\.\d answered, limit 0; the first: .*no answer within 5 s",
        bug=broken.HANGS,
    ),
    Case(
        "fails for one request in twenty under the gate",
        "gated",
        r"the gate says no: answers that are not finite numbers: 0 → 1 of \d\d, and 0 are allowed",
        bug=broken.FAILS_SOMETIMES,
        limits={"shadow": FEW},
    ),
    Case(
        "fails for one request in twenty",
        "shadowed",
        r"errors: 1 of \d+ requests that 1\.\d answered, limit 0; the first: .*500",
        bug=broken.FAILS_SOMETIMES,
    ),
    Case(
        "answers garbage after a while",
        "shadowed",
        r"agreement with 1\.\d is \d+\.\d%, limit 50\.0%",
        bug=broken.ANSWERS_GARBAGE.format(after=50),
    ),
    Case(
        "answers garbage after a while, and nobody asks for agreement",
        "gated",
        r"the gate says no: accuracy 0\.\d+ → 0\.\d+ on 359 examples: worse by at least 0\.\d+ at 95 % confidence,"
        r" and 0\.02 may be lost",
        bug=broken.ANSWERS_GARBAGE.format(after=50),
        limits={"shadow": FEW | NO_SHADOW_LIMITS},
    ),
    Case(
        "much slower",
        "shadowed",
        r"median latency \d+\.\d ms, 1\.\d has \d+\.\d ms: \d+\.\d\d times, limit 3",
        bug=broken.IS_SLOWER.format(seconds=0.1),
        limits={"shadow": FEW},
    ),
    Case(
        "three times slower",
        "gated",
        r"the gate says no: median latency [\d.]+ ms → [\d.]+ ms: [\d.]+ times .* and 1\.5 is allowed",
        bug=broken.IS_SLOWER.format(seconds="2 * {seconds}"),
        limits={"shadow": FEW | NO_SHADOW_LIMITS},
    ),
    Case(
        "labels are shuffled",
        "shadowed",
        r"agreement with 1\.\d is \d+\.\d%, limit 50\.0%",
        limits={"shadow": FEW},
        shuffled=True,
    ),
    Case(
        "labels are shuffled, and nobody asks for agreement",
        "gated",
        r"the gate says no: accuracy 0\.\d+ → 0\.\d+ on 359 examples: worse by at least 0\.\d+",
        limits={"shadow": FEW | NO_SHADOW_LIMITS},
        shuffled=True,
    ),
    Case(
        "labels are shuffled, and the holdout is another",
        "gated",
        r"the gate says no: accuracy 0\.\d+ → 0\.\d+ on 359 examples: worse by at least 0\.\d+",
        limits={"shadow": FEW | NO_SHADOW_LIMITS},
        shuffled=True,
        holdout=True,
    ),
)


class Caller:
    """Somebody who asks the default URL again and again, each time for another golden example, or as told."""

    def __init__(
        self, stage: Stage, *, every: float = 0.1, model: str = "digits", bodies: Sequence[bytes] = ()
    ) -> None:
        self.versions: Counter[str] = Counter()
        self.failed: list[str] = []
        self._every = every
        self._model = model
        self._bodies = bodies or examples_of(stage)
        self._stop = threading.Event()
        self._stage = stage
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        turn = 0
        with self._stage.client() as client:
            while not self._stop.wait(self._every):
                try:
                    answer = client.predict(self._model, self._bodies[turn % len(self._bodies)], timeout=5.0)
                    self.versions[answer.version] += 1
                except MarwrightError as error:
                    self.failed.append(str(error))
                turn += 1


def examples_of(stage: Stage) -> list[bytes]:
    return [example.body for example in golden.read(stage.store / stage.record("1.0").file)]


def pictures(stage: Stage) -> list[bytes]:
    """The golden examples' pictures in other bytes: what no part of a rollout asks for."""
    found = []
    for body in examples_of(stage):
        stream = io.BytesIO()
        Image.open(io.BytesIO(body)).save(stream, "PNG", compress_level=0)
        found.append(stream.getvalue())
    assert not set(found) & set(examples_of(stage))
    return found


@pytest.fixture(scope="module")
def stage(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    own = (ROOT / "policies" / "digits.toml").read_text(encoding="utf-8")
    with rollouts.stage(tmp_path_factory.mktemp("challengers"), digits, policy=own) as made:
        yield made


@pytest.fixture(autouse=True)
def caller(stage: Stage) -> Iterator[Caller]:
    """Asks all through a test; not one request may fail."""
    with Caller(stage) as made:
        yield made
    assert not made.failed
    assert made.versions.total() > 0


def policy(stage: Stage, limits: Limits) -> Path:
    """The stage's own policy, with other limits put over it, as a file."""
    document: dict[str, dict[str, float]] = tomllib.loads(stage.policy.read_text(encoding="utf-8"))
    for tables in (QUICK, limits):
        for name, table in tables.items():
            document[name] = {**document.get(name, {}), **table}
    lines = (f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in table.items()) for name, table in document.items())
    path = stage.policy.with_name("of-this-test.toml")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def goes_on(stage: Stage, champion: str, model: str = "digits") -> None:
    """That version answers as it should, alone: server, journal and processes know of no other."""
    record = records.record(stage.store, model, champion)
    with stage.client() as client, journal.open(stage.store) as book:
        proof.prove(client, record, golden.read(stage.store / record.file), pinned=False)
        held = loading.versions(client, model)
        assert list(held) == [champion]
        released = book.released(model)
        assert released is not None
        assert released.version == champion
        assert rollout.unfinished(book, model) is None
        pids = {pid for name in client.models() for pid in loading.ready_pids(client.describe(name)[0])}
    found = stage.home.server.find()
    assert found is not None
    until = time.monotonic() + 30.0  # how long TorchServe takes to end a worker is its own affair
    while {each.pid for each in processes.children(found.process)} != pids and time.monotonic() < until:
        time.sleep(0.1)
    assert {each.pid for each in processes.children(found.process)} == pids


def usual_seconds(stage: Stage) -> float:
    """What one request to the champion takes now, alone and unhurried."""
    with stage.client() as client:
        return proof.prove(client, stage.record("1.0"), golden.read(stage.store / stage.record("1.0").file)).seconds


def verdict(stage: Stage, model: str, version: str) -> Verdict:
    with journal.open(stage.store) as book:
        found = rollout.last_verdict(book, model, version)
    assert found is not None
    return found


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[case.name for case in CASES])
def test_a_broken_challenger_is_stopped_by_the_phase_that_should_and_the_champion_goes_on(
    stage: Stage, caller: Caller, number: int, case: Case
) -> None:
    champion, version = stage.released().version, f"2.{number}"
    bug = case.bug
    if "{seconds}" in bug:
        bug = bug.format(seconds=usual_seconds(stage))
    change = broken.shuffle_labels if case.shuffled else lambda _: None
    broken.build(stage.store, stage.record("1.0"), version, bug=bug, change=change)

    holdout = stage.home.folder / "examples.npz" if case.holdout else None
    if holdout is not None:
        shutil.copy2(stage.runs / stage.record("1.0").run / "examples.npz", holdout)

    with pytest.raises(RolledBack) as caught:
        verb.rolled_out(stage.settings(version, policy=policy(stage, case.limits), holdout=holdout))

    assert re.match(f"{case.phase}: .*{case.says}", caught.value.reason, re.DOTALL)
    assert f"{champion} answers" in caught.value.message
    last = stage.entries()[-1]
    assert (last.event, last.version) == ("rolled back", version)
    assert caught.value.reason.startswith(last.detail["reason"])
    assert not [entry for entry in stage.entries("switching") if entry.version == version]
    goes_on(stage, champion)
    assert caller.versions.keys() == {champion}


def test_what_goes_wrong_only_after_the_switch_is_taken_back(stage: Stage, caller: Caller) -> None:
    champion = stage.released().version
    good = stage.record("1.0")
    examples = len(golden.read(stage.store / good.file))
    before = 3 * examples + FEW["requests"] + 359  # asked by ready, over both ways, and promoted; shadowed; gated
    broken.build(stage.store, good, "3.0", bug=broken.ANSWERS_GARBAGE.format(after=before + 50))
    limits = {"shadow": FEW, "watch": {"seconds": 60.0, "every": 0.02}}

    with pytest.raises(RolledBack, match=r"watched: a golden example is answered wrongly: .* should be \d") as caught:
        verb.rolled_out(stage.settings("3.0", policy=policy(stage, limits)))

    assert f"{champion} answers" in caught.value.message
    switches = [(entry.event, entry.version) for entry in stage.entries() if entry.event in ("switching", "released")]
    assert switches[-4:] == [
        ("switching", "3.0"),
        ("released", "3.0"),
        ("switching", champion),
        ("released", champion),
    ]
    goes_on(stage, champion)
    assert caller.versions.keys() == {champion, "3.0"}


@pytest.mark.parametrize(
    ("version", "bug", "says"),
    [
        (
            "3.1",
            broken.FAILS_FOR_CALLERS,
            r"watched: error rate: 3\.1 answered \d+ of \d+ requests with 5xx, [\d.]+%, limit 0\.00%",
        ),
        (
            "3.2",
            broken.IS_UNSURE_FOR_CALLERS,
            r"watched: mean confidence is 0\.\d+, 1\.0 had 0\.\d+: 0\.\d+ lower, limit 0\.2",
        ),
    ],
    ids=["fails", "is unsure"],
)
def test_what_only_callers_see_is_taken_back(stage: Stage, caller: Caller, version: str, bug: str, says: str) -> None:
    """Golden examples and the holdout are answered rightly all the time: only its own counts tell on it."""
    champion = stage.released().version
    broken.build(stage.store, stage.record("1.0"), version, bug=bug)
    limits = {"shadow": FEW, "watch": {"seconds": 90.0, "every": 0.2}}
    with Caller(stage, every=0.01, bodies=pictures(stage)) as strange, pytest.raises(RolledBack, match=says):
        verb.rolled_out(stage.settings(version, policy=policy(stage, limits)))
    assert strange.versions[champion] > 0
    assert bool(strange.failed) == (bug == broken.FAILS_FOR_CALLERS)
    assert stage.entries("rolled back")[-1].detail["innocent"] is False
    goes_on(stage, champion)
    assert caller.versions.keys() == {champion, version}


def test_a_version_that_counts_nothing_is_watched_by_golden_examples_alone(
    stage: Stage, caller: Caller, capsys: pytest.CaptureFixture[str]
) -> None:
    champion = stage.released().version
    broken.build(stage.store, stage.record("1.0"), "3.3", change=broken.count_nothing)
    assert verb.rolled_out(stage.settings("3.3", policy=policy(stage, {"shadow": FEW}))).phase == "settled"
    assert "digits 3.3 counts nothing: watched by golden examples and restarts alone" in capsys.readouterr().err
    watched = [entry for entry in stage.entries("rollout") if entry.detail["phase"] == "watched"]
    assert watched[-1].detail["watched_requests"] is None
    rollback_verb.main(stage.rollback())
    goes_on(stage, champion)


@pytest.fixture
def failing(stage: Stage) -> Iterator[Caller]:
    """Another model of the same server, and somebody who gets nothing but 5xx from it."""
    fails = "def handle(data, context):\n    if data:  # none while it is loaded\n        raise ValueError\n"
    name = torchserve.write_archive(stage.store, "neighbour", "1.0", handler=fails)
    with stage.client() as client:
        client.register(name, initial_workers=1, synchronous=True, timeout=60)
        with Caller(stage, model="neighbour") as made:
            yield made
        client.unregister("neighbour")
    (stage.store / name).unlink()


def test_a_good_version_passes_the_same_limits_whatever_its_neighbour_does(
    stage: Stage, caller: Caller, failing: Caller
) -> None:
    champion = stage.released().version
    before = len(failing.failed)
    outcome = verb.rolled_out(stage.settings("1.1", policy=policy(stage, {})))
    assert len(failing.failed) > before
    assert not failing.versions
    watched = [entry for entry in stage.entries("rollout") if entry.detail["phase"] == "watched"]
    assert watched[-1].detail["watched_requests"] >= 3 * len(examples_of(stage)), "to the last one of its own"
    assert watched[-1].detail["watched_errors"] == 0
    assert (outcome.phase, outcome.was) == ("settled", champion)
    assert (stage.released().version, stage.released().proven) == ("1.1", True)
    assert verdict(stage, "digits", "1.1").outcome == "pass"
    rollback_verb.main(stage.rollback())
    goes_on(stage, champion)
    assert caller.versions.keys() == {champion, "1.1"}


@pytest.fixture(scope="module")
def mnist(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> RolloutSettings:
    """Three versions of mnist in the stage's store, and 3000 labelled examples: 1.0 has lost 3 points of accuracy, 1.1
    another 3, and 1.2 has lost none. 1.0 answers.
    """
    where = Path(os.environ.get("MARWRIGHT_TEST_DATA") or ROOT.parent / "shared" / "data") / "mnist.zip"
    if not where.is_file():
        pytest.skip("NOT TESTED on real data: no mnist.zip; set MARWRIGHT_TEST_DATA to the folder that has it")
    folder = tmp_path_factory.mktemp("mnist")
    taken: Counter[str] = Counter()
    with zipfile.ZipFile(where) as whole, zipfile.ZipFile(folder / "mnist.zip", "w") as some:
        for name in sorted(whole.namelist()):
            of = name.rpartition("/")[0]
            if name.endswith(".png") and taken[of] < 300:  # of each class, to learn from and to judge by
                taken[of] += 1
                some.writestr(name, whole.read(name))
    chosen = recipe.load("mnist", recipes_dir=ROOT / "recipes")
    examples = data.load(chosen, path=folder / "mnist.zip", cache=folder / "cache", progress=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("marwright.learning.reporting.page", lambda *_: "<!doctype html>")  # nobody looks at the plots
        good = training.train(chosen, examples, folder / "runs", progress=False)
    for run in (broken.worse(good, 0.03), broken.worse(good, 0.06), good):
        archives.build(run, stage.store)
    settings = replace(
        stage.settings("1.0"),
        model="mnist",
        runs=folder / "runs",
        policy=policy(stage, {"gate": {"margin": 0.005, "looks": 3}, "shadow": FEW}),
        holdout=good.path / "examples.npz",
    )
    assert verb.rolled_out(settings).was is None
    return settings


def test_three_points_worse_is_refused(stage: Stage, mnist: RolloutSettings, caller: Caller) -> None:
    with pytest.raises(RolledBack, match=r"gated: the gate says no: accuracy .* and 0\.005 may be lost"):
        verb.rolled_out(replace(mnist, version="1.1"))
    accuracy = verdict(stage, "mnist", "1.1").check("accuracy")
    assert accuracy.outcome == "fail"
    assert accuracy.estimate is not None
    assert math.isclose(accuracy.estimate, -0.03, abs_tol=0.015)  # of the examples of that look
    goes_on(stage, "1.0", "mnist")


def test_three_points_better_passes(stage: Stage, mnist: RolloutSettings, caller: Caller) -> None:
    outcome = verb.rolled_out(replace(mnist, version="1.2"))
    assert (outcome.phase, outcome.was) == ("settled", "1.0")
    said = verdict(stage, "mnist", "1.2")
    accuracy = said.check("accuracy")
    assert (said.outcome, accuracy.outcome) == ("pass", "pass")
    assert accuracy.estimate is not None
    assert math.isclose(accuracy.estimate, 0.03, abs_tol=0.015)
    rollback_verb.main(replace(stage.rollback(), model="mnist"))
    goes_on(stage, "1.0", "mnist")
