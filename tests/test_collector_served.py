"""Labels on the real TorchServe: every way in, no label lost or kept twice, workers killed, an upgrade amid traffic.

One server for most of it: digits 1.0, and the model `feedback` as `marwright feedback collector` loads it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from handlers import inbox, spool
from marwright.errors import ServerRefused, SettingsError
from marwright.packing import collector as packing
from marwright.packing.records import COLLECTOR
from marwright.release import journal, loading, serving
from marwright.release.client import Client
from marwright.release.server import Expected, Server
from marwright.settings import (
    ActivateSettings,
    FeedbackCollectorSettings,
    Places,
    ReconcileSettings,
    ReleasesSettings,
    RollbackSettings,
    RolloutSettings,
    StatusSettings,
    WatchSettings,
)
from scripts import activate, collector, live, reconcile, releases, rollback, rollout, status, watch
from tests import archives, checkout, torchserve
from tests.archives import Built

pytestmark = pytest.mark.server

GOOD = {"request": "4f0c", "label": "cat"}
DIED = {(500, "Worker died."), (503, "Worker died."), (507, "Worker died."), (413, "Worker died.")}
"""What a client may meet while a worker dies, over REST and (413) over gRPC: send it again."""


@pytest.fixture(scope="module")
def home(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torchserve.Home]:
    """A server with digits alone, until the first test of the collector."""
    folder = tmp_path_factory.mktemp("collected")
    store = folder / "store"
    record = archives.build(digits.run, store).record
    with journal.open(store) as book:
        book.release("digits", record.version, proven=False, why="test")
    with (
        pytest.MonkeyPatch.context() as patch,
        torchserve.home(folder, {"digits": Expected("1.0")}, archives=[record.file], store=store) as home,
    ):
        patch.delenv("MARWRIGHT_SPOOL", raising=False)
        patch.setenv("MARWRIGHT_SPOOL_MB", "16")
        home.bring_up()
        yield home


@pytest.fixture(scope="module")
def loaded(home: torchserve.Home) -> torchserve.Home:
    """The same server, with the collector in it."""
    assert collector.main(of(home, FeedbackCollectorSettings)) == 0
    return home


@pytest.fixture
def client(loaded: torchserve.Home) -> Iterator[Client]:
    with loaded.client() as client:
        yield client


def of(home: torchserve.Home, kind: Callable[..., Any], **options: Any) -> Any:
    return kind(store=home.store, config=home.config_path, feedback=home.folder / "feedback", **options)


def folder(home: torchserve.Home) -> Path:
    return home.folder / "feedback" / "spool"


def kept(home: torchserve.Home) -> list[dict[str, Any]]:
    """Every label in the spool, growing segments of living workers left out."""
    found: list[dict[str, Any]] = []
    for path in spool.finished(folder(home), inbox.KIND):
        for frame in list(spool.frames(path))[1:]:
            found += frame.header["labels"]
    return found


def settled(home: torchserve.Home, uids: set[str]) -> list[dict[str, Any]]:
    """Every label in the spool, once those are there: a segment gets its name within seconds."""
    until = time.monotonic() + 30
    found = kept(home)
    while not uids <= {label["uid"] for label in found}:
        assert time.monotonic() < until, f"{len(uids)} labels are not all in the spool"
        time.sleep(0.1)
        found = kept(home)
    return found


class Sender:
    """Plain HTTP with the right token, as curl would send it."""

    def __init__(self, client: Client) -> None:
        self.url = f"{client.config.inference_url}/predictions/{COLLECTOR}"
        self.session = requests.Session()
        assert client._tokens is not None
        self.session.headers["Authorization"] = f"Bearer {client._tokens.key('inference')}"

    def send(self, **how: Any) -> requests.Response:
        return self.session.post(self.url, timeout=60, **how)


@pytest.fixture
def sender(client: Client) -> Iterator[Sender]:
    made = Sender(client)
    with made.session:
        yield made


def test_a_running_server_gets_the_collector_and_is_what_the_journal_says(
    home: torchserve.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = of(home, FeedbackCollectorSettings)
    assert collector.main(settings) == 0
    said = capsys.readouterr().out
    assert "built feedback-1.0.mar" in said
    assert "1.0 answers" in said
    assert f"/predictions/{COLLECTOR}" in said
    assert "attention" not in said
    assert collector.main(settings) == 0
    assert "unchanged: feedback-1.0.mar" in capsys.readouterr().out
    with journal.open(home.store) as book:
        assert [entry.event for entry in book.entries(COLLECTOR)] == ["archived", "released"]
    assert not folder(home).exists(), "nothing was kept of what was only looked at"


def test_other_commands_do_not_stumble_over_it(
    loaded: torchserve.Home, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert live.only_model(client) == "digits"
    assert rollout.chosen(of(loaded, RolloutSettings)).model == "digits"
    for model, version in ((COLLECTOR, None), (None, "feedback-1.0.mar")):
        with pytest.raises(SettingsError) as caught:
            rollout.chosen(of(loaded, RolloutSettings, model=model, version=version))
        assert "marwright feedback collector" in caught.value.hint
    capsys.readouterr()
    assert status.main(of(loaded, StatusSettings, json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["attention"] == []
    assert {row["model"]: row["serving"] for row in said["versions"]}[COLLECTOR] == "answers, 1 ready"
    assert releases.main(of(loaded, ReleasesSettings, all=True)) == 0
    assert "feedback: 1.0 answers" in capsys.readouterr().out
    assert reconcile.main(of(loaded, ReconcileSettings)) == 0
    assert capsys.readouterr().out == "the server is what the journal says\n"
    [look] = watch.looks(of(loaded, WatchSettings, looks=1))
    assert look.attention == ()
    assert [(row.model, row.default) for row in look.versions] == [("digits", True), (COLLECTOR, True)]


def test_every_way_in_keeps_the_same_label(loaded: torchserve.Home, client: Client, sender: Sender) -> None:
    def label(uid: str) -> dict[str, str]:
        return {**GOOD, "uid": uid}

    ways: dict[str, requests.Response] = {
        "json": sender.send(json=label("json")),
        "text": sender.send(data=json.dumps(label("text")), headers={"Content-Type": "text/plain"}),
        "bytes": sender.send(data=json.dumps(label("bytes")), headers={"Content-Type": "application/octet-stream"}),
        "form": sender.send(data=label("form")),
        "multipart": sender.send(files={key: (None, value) for key, value in label("multipart").items()}),
        "file": sender.send(files={"data": ("label.json", json.dumps(label("file")))}),
    }
    for name, answer in ways.items():
        assert answer.status_code == 200, (name, answer.text)
        assert answer.json() == {"accepted": 1, "uids": [name]}
        assert answer.headers["X-Model-Name"] == COLLECTOR
        assert answer.headers["X-Model-Version"]
    put = sender.session.put(sender.url, data=json.dumps(label("put")), timeout=60)
    assert put.json() == {"accepted": 1, "uids": ["put"]}
    answer = client.predict_grpc(COLLECTOR, {"data": json.dumps(label("grpc"))})
    assert (answer.json(), answer.model) == ({"accepted": 1, "uids": ["grpc"]}, COLLECTOR)
    assert client.predict_grpc(COLLECTOR, label("grpc-fields")).json()["uids"] == ["grpc-fields"]
    bare = client.predict_grpc(COLLECTOR, label("grpc-bare"), meta=False)
    assert bare.json()["uids"] == ["grpc-bare"]
    several = [label("list-1"), {**label("list-2"), "label": 17.25, "time": "2024-02-29T12:00:00Z"}]
    assert client.predict(COLLECTOR, {"labels": several}).json()["accepted"] == 2
    uids = {*ways, "put", "grpc", "grpc-fields", "grpc-bare", "list-1", "list-2"}
    found = [one for one in settled(loaded, uids) if one["uid"] in uids]
    assert len(found) == len(uids)
    for one in found:
        rest = {"request": "4f0c", "instance": 0, "source": "api"}
        expected = {"label": 17.25, "time": 1709208000.0} if one["uid"] == "list-2" else {"label": "cat", "time": None}
        assert one == {"uid": one["uid"], **rest, **expected}


def test_ten_thousand_labels_at_once_are_kept_and_one_more_is_too_many(loaded: torchserve.Home, client: Client) -> None:
    many = [{"request": f"r-{number}", "label": "7", "uid": f"many-{number}"} for number in range(10_000)]
    assert client.predict(COLLECTOR, {"labels": many}).json()["accepted"] == 10_000
    assert {label["request"] for label in settled(loaded, {"many-9999"})} >= {one["request"] for one in many}
    with pytest.raises(ServerRefused) as caught:
        client.predict(COLLECTOR, {"labels": [*many, GOOD]})
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"request": "a"}, 400, "label must be said"),
        ({**GOOD, "lable": 1}, 400, "unknown: 'lable'"),
        ({"labels": [GOOD, {"request": "a", "label": ""}]}, 400, "1 of 2 labels are bad, none is kept: label 1: label"),
        (b"{", 400, "the body is not JSON"),
        (b"", 400, "the body is not JSON"),
    ],
)
def test_what_is_no_label_is_refused_in_words_over_rest_and_grpc(
    body: Any, status: int, reason: str, loaded: torchserve.Home, client: Client
) -> None:
    before = len(kept(loaded))
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    for ask in (
        lambda: client.predict(COLLECTOR, text, content_type="application/json"),
        lambda: client.predict_grpc(COLLECTOR, {"data": text}),
    ):
        with pytest.raises(ServerRefused) as caught:
            ask()
        assert caught.value.status == status
        assert reason in caught.value.reason
    assert len(kept(loaded)) == before


def test_what_is_no_model_is_not_explained_and_a_stream_kills_no_worker(client: Client) -> None:
    pid = client.describe(COLLECTOR)[0].workers[0].pid
    with pytest.raises(ServerRefused) as caught:
        client.explain(COLLECTOR, GOOD)
    assert caught.value.status == 501
    [answer] = list(client.stream_grpc(COLLECTOR, {"data": json.dumps({**GOOD, "check": True})}))
    assert answer.json() == {"checked": 1}
    assert client.describe(COLLECTOR)[0].workers[0].pid == pid


def test_curls_own_form_encoding_of_json_is_explained(sender: Sender) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for given in (GOOD, {**GOOD, "request": "a=b&c"}):
        answer = sender.send(data=json.dumps(given), headers=form)
        assert answer.status_code == 415
        assert "Content-Type: application/json" in answer.json()["reason"]


def test_a_full_spool_is_a_503_until_there_is_room(loaded: torchserve.Home, sender: Sender) -> None:
    settled(loaded, set())
    filler = folder(loaded) / "requests-1-1-1.seg"
    folder(loaded).mkdir(parents=True, exist_ok=True)
    filler.write_bytes(b"x" * 16 * 2**20)
    time.sleep(1.5)  # it looks once a second
    try:
        answer = sender.send(json=GOOD)
        assert (answer.status_code, answer.json()["code"]) == (503, 503)
        assert "the spool is full" in answer.json()["reason"]
        assert sender.send(json={**GOOD, "check": True}).status_code == 200
    finally:
        filler.unlink()
    until = time.monotonic() + 20
    while sender.send(json=GOOD).status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.2)


class Ledger:
    """What many clients sent, and what was answered: written down by themselves, apart from the spool."""

    def __init__(self, home: torchserve.Home, clients: int) -> None:
        self.accepted: list[str] = []
        self.failed: list[tuple[int, str]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(home, number)) for number in range(clients)]

    def __enter__(self) -> Ledger:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=90)
            assert not thread.is_alive(), "a label was never answered"

    def wait(self, more: int) -> None:
        """Until so many more are accepted."""
        enough, until = len(self.accepted) + more, time.monotonic() + 90
        while len(self.accepted) < enough:
            assert time.monotonic() < until, f"{len(self.accepted)} accepted; failed: {self.failed[-3:]}"
            time.sleep(0.05)

    def _run(self, home: torchserve.Home, number: int) -> None:
        """A new uid at each try: whatever was answered 200 must be there once."""
        with home.client(timeout=60) as client:
            sent = 0
            while not self._over.is_set():
                sent += 1
                uids = [uuid.uuid4().hex for _ in range(1 + sent % 3)]
                labels = [{**GOOD, "instance": sent, "source": f"client-{number}", "uid": uid} for uid in uids]
                bad = sent % 10 == 0
                document: Any = {"labels": [*labels, {"request": ""}] if bad else labels}
                try:
                    if number % 2:
                        answer = client.predict_grpc(COLLECTOR, {"data": json.dumps(document)}).json()
                    else:
                        answer = client.predict(COLLECTOR, document).json()
                    assert answer == {"accepted": len(uids), "uids": uids}
                    self.accepted += uids
                except ServerRefused as refused:
                    if not bad or refused.status != 400:
                        self.failed.append((refused.status, refused.reason))
                        time.sleep(0.1)


def assert_exactly_once(home: torchserve.Home, ledger: Ledger) -> None:
    counts = Counter(label["uid"] for label in settled(home, set(ledger.accepted)))
    twice = [uid for uid, count in counts.items() if count > 1]
    assert not twice
    assert not [uid for uid in ledger.accepted if not counts[uid]]


def test_every_label_that_was_answered_is_kept_once_though_the_worker_is_killed(loaded: torchserve.Home) -> None:
    with loaded.client() as client, Ledger(loaded, 8) as ledger:
        ledger.wait(200)
        for _ in range(2):
            [pid] = loading.ready_pids(client.describe(COLLECTOR)[0])
            os.kill(pid, signal.SIGKILL)
            ledger.wait(300)
            assert loading.ready_pids(client.describe(COLLECTOR)[0]) != (pid,)
    assert set(ledger.failed) <= DIED
    assert_exactly_once(loaded, ledger)


def test_an_upgrade_amid_traffic_refuses_and_loses_no_label(
    loaded: torchserve.Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with loaded.client() as client, Ledger(loaded, 8) as ledger:
        ledger.wait(100)
        before = loading.default_version(client, COLLECTOR)
        with monkeypatch.context() as patch:
            patch.setitem(packing.CONFIG, "responseTimeout", 61)
            assert collector.main(of(loaded, FeedbackCollectorSettings, json=True)) == 0
        said = json.loads(capsys.readouterr().out)
        ledger.wait(100)
        assert said["built"]
        assert said["attention"] == []
        assert list(loading.versions(client, COLLECTOR)) == [said["version"]]
        assert said["version"] != before
    assert ledger.failed == []
    assert_exactly_once(loaded, ledger)
    with journal.open(loaded.store) as book:
        assert book.live(COLLECTOR) == {said["version"]}
    assert reconcile.main(of(loaded, ReconcileSettings)) == 0
    assert capsys.readouterr().out == "the server is what the journal says\n"


def test_it_can_be_rolled_back_like_any_model(
    loaded: torchserve.Home, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    with journal.open(loaded.store) as book:
        now, earlier = book.released(COLLECTOR), book.previous(COLLECTOR)
    assert now is not None
    assert earlier is not None
    assert rollback.main(of(loaded, RollbackSettings, model=COLLECTOR)) == 0
    assert loading.default_version(client, COLLECTOR) == earlier
    assert collector.main(of(loaded, FeedbackCollectorSettings)) == 0
    capsys.readouterr()


def test_after_a_stop_and_a_plain_start_labels_are_taken_again_beside_the_models(
    loaded: torchserve.Home, digits: Built
) -> None:
    serving.refresh(loaded.config_path, loaded.store)
    with journal.open(loaded.store) as book:
        release = book.releases()[COLLECTOR]
    loaded.server.stop()
    loaded.expected = {"digits": Expected("1.0"), COLLECTOR: Expected(release.version)}
    loaded.bring_up()
    with loaded.client() as client:
        assert client.models().keys() == {"digits", COLLECTOR}
        assert client.predict("digits", digits.golden[0].body).status == 200
        assert client.predict(COLLECTOR, {**GOOD, "uid": "after"}).json()["uids"] == ["after"]
    assert [one for one in settled(loaded, {"after"}) if one["uid"] == "after"]


def test_labels_of_a_server_that_is_stopped_at_once_are_in_the_spool(loaded: torchserve.Home) -> None:
    with loaded.client() as client:
        uids = [client.predict(COLLECTOR, GOOD).json()["uids"][0] for _ in range(5)]
    loaded.server.stop()
    assert Counter(label["uid"] for label in kept(loaded) if label["uid"] in uids) == dict.fromkeys(uids, 1)


def test_without_a_spool_labels_are_refused_and_the_command_says_so(
    loaded: torchserve.Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARWRIGHT_SPOOL", "")
    loaded.server.stop()
    loaded.bring_up()
    with loaded.client() as client:
        assert client.predict(COLLECTOR, {**GOOD, "check": True}).json() == {"checked": 1}
        with pytest.raises(ServerRefused) as caught:
            client.predict(COLLECTOR, GOOD)
        assert caught.value.status == 503
        assert "MARWRIGHT_SPOOL" in caught.value.reason
    assert collector.main(of(loaded, FeedbackCollectorSettings)) == 0
    assert "attention: the server was started without MARWRIGHT_SPOOL" in capsys.readouterr().out


def test_with_no_server_it_is_released_for_the_next_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torchserve.write_config(tmp_path / "config.properties", {})
    settings = FeedbackCollectorSettings(store=tmp_path / "store", config=tmp_path / "config.properties")
    assert collector.main(settings) == 0
    assert "1.0 will answer at the next start" in capsys.readouterr().out
    assert "load_models=feedback-1.0.mar" in (tmp_path / "store" / "serving.properties").read_text()
    assert collector.main(settings) == 0
    with journal.open(settings.store) as book:
        assert [entry.event for entry in book.entries()] == ["archived", "released"]


def test_a_server_that_we_start_or_that_activate_prepares_knows_the_same_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**how: Path) -> str:
        return Server(tmp_path / "serving.properties", home=tmp_path, **how)._environment()["MARWRIGHT_SPOOL"]

    monkeypatch.delenv("MARWRIGHT_SPOOL", raising=False)
    usual = str(tmp_path / "feedback" / "spool")
    assert said() == usual
    assert said(spool=tmp_path / "elsewhere") == str(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert f"export MARWRIGHT_SPOOL={usual}" in activate.exports(ActivateSettings()).splitlines()
    monkeypatch.setenv("MARWRIGHT_SPOOL", "/of/the/environment")
    assert said() == "/of/the/environment"
    assert said(spool=Places().spool) == usual
    monkeypatch.setenv("MARWRIGHT_SPOOL", "")
    assert said() == ""
    assert "MARWRIGHT_CAPTURE" not in Server(tmp_path / "s", home=tmp_path)._environment()


def test_the_line_that_the_command_prints_sends_a_label_also_to_a_plain_torchserve() -> None:
    with checkout.fresh("labels") as project:
        project.make("serve", "EPOCHS=2")
        said = project.shell("marwright feedback collector").stdout
        [line] = [line.strip() for line in said.splitlines() if line.strip().startswith("curl ")]
        kept = project.root / "feedback" / "spool"
        assert json.loads(project.shell(f"{line} --silent --show-error").stdout)["accepted"] == 1
        assert "digits" in project.shell("marwright status").stdout
        project.shell("marwright stop && torchserve --start")
        project.make("serve", "EPOCHS=2")  # waits for it, and proves both models
        uid = line.replace('"label": "cat"', '"label": "cat", "uid": "plain"')
        assert json.loads(project.shell(f"{uid} --silent --show-error").stdout) == {"accepted": 1, "uids": ["plain"]}
        project.shell("marwright stop")
        found = [
            label
            for path in spool.finished(kept, inbox.KIND)
            for frame in list(spool.frames(path))[1:]
            for label in frame.header["labels"]
        ]
        assert [label["request"] for label in found] == ["ID", "ID"]
        assert found[1]["uid"] == "plain"
