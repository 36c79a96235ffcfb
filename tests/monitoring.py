"""The whole of monitoring, live: a served model under traffic, the exporter, and a Prometheus that scrapes both.

    with monitoring.watched(digits, folder) as scene:
        scene.prometheus.query("marwright_server_up")

Everything is the project's own (`deploy/prometheus.yml`, its rules, `config.properties`) but for the ports and the
pace: a scrape a second, alerts after a second, and for what lies half an hour or six hours back, five seconds.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from marwright.errors import ServerError
from marwright.feedback import signals
from marwright.feedback.drift import Compared, Look
from marwright.feedback.store import Label, Store
from marwright.packing.golden import Golden
from marwright.release import exporter, journal, loading, phases
from marwright.release.client import Client
from marwright.release.dashboard import FILE
from marwright.release.exporter import Collector
from marwright.release.server import Expected
from scripts.exporter import All
from tests import archives, prometheus, torchserve
from tests.archives import Built
from tests.feedback import spools
from tests.feedback.spools import Asked
from tests.prometheus import Running, Sample

DEPLOY = torchserve.PROJECT / "deploy"
PACE = {
    "scrape_interval: 15s": "scrape_interval: 1s",
    "scrape_timeout: 10s": "scrape_timeout: 1s",
    "evaluation_interval: 15s": "evaluation_interval: 1s",
}
SHORT = [(r"\bfor: \w+", "for: 1s"), (r"offset \w+", "offset 5s")]
VARIABLES = {"$model": ".*", "$version": ".*", "$__rate_interval": "1m"}
COMPARED = re.compile(r" (==|!=|>=|<=|>|<) ")


@dataclass(frozen=True)
class Query:
    """Something that Prometheus is asked: `where` it stands, as it stands there, and as it can be evaluated."""

    where: str
    written: str
    asked: str


@dataclass(frozen=True)
class Scene:
    """What runs."""

    home: torchserve.Home
    prometheus: Running
    client: Client
    exporter: contextlib.ExitStack
    """Closing it ends the exporter."""


@contextlib.contextmanager
def watched(digits: Built, folder: Path) -> Iterator[Scene]:
    """digits 1.0 answers, 1.1 is loaded beside it in the middle of a rollout; both get good and bad requests.

    1.1 explains and 1.0 does not. Requests are captured; the feedback store has what an earlier day left.
    """
    store = folder / "store"
    shutil.copytree(digits.store, store)
    second = archives.build(digits.run, store, explain=True).record
    first = digits.record.version
    with journal.open(store) as book:
        book.release("digits", first, proven=False, why="first")
        # As a rollout that is under way leaves it.
        begun = {"id": 1, "kind": "rollout", "phase": phases.PHASES["rollout"][0], "step": "begin", "champion": first}
        book.add("digits", second.version, "rollout", **begun)
    _teach(folder / "feedback", folder / "earlier")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("MARWRIGHT_SPOOL", str(folder / "feedback" / "spool"))
        patch.setenv("MARWRIGHT_CAPTURE", "1")
        home = stack.enter_context(
            torchserve.home(
                folder,
                {"digits": Expected(first)},
                archives=[digits.record.file],
                store=store,
                settings={"metric_time_interval": "2"},
            )
        )
        home.bring_up()
        client = stack.enter_context(home.client())
        loading.bring_in(client, second, server=home.server, call_seconds=60, ready_seconds=60)
        stack.enter_context(_traffic(client, digits.golden))
        ended = stack.enter_context(contextlib.ExitStack())
        feedback = ended.enter_context(signals.watching(folder / "feedback", every=1.0))
        url = ended.enter_context(exporter.running(All(Collector(store, home.server), feedback), port=0))
        config = configure(folder / "monitoring", home.config.metrics_url, url)
        yield Scene(home, stack.enter_context(prometheus.running(config, data=folder / "data")), client, ended)


def _teach(folder: Path, spool: Path) -> None:
    """Requests to digits 1.0 with labels, most of them right, a look that found drift, and a turn of the loop."""
    asked = [Asked(f"r{number}", time=time.time() - 100 + number) for number in range(60)]
    spools.requests(spool, asked)
    said = [
        Label(each.id, 0, each.answer() if number % 6 else spools.DIGITS.classes[0], "test", time.time(), f"u{number}")
        for number, each in enumerate(asked)
    ]
    with Store.open(folder) as store:
        store.ingest(spool)
        store.add_labels([*said, Label("nobody asked", 0, "3", "test", time.time(), "u")])
        test = Compared("brightness", "KS", 0.5, 0.001, 0.008, True)
        store.note("drift", "digits", Look("1.0", 60, 1000, 1.0, 2.0, 0.05, (test,)).to_dict())
        store.note("turn", "digits", {"phase": "not yet", "steps": []})


def configure(folder: Path, metrics_url: str, exporter_url: str) -> Path:
    """The project's configuration of Prometheus at other addresses, and faster."""
    shutil.copytree(DEPLOY / "rules", folder / "rules")
    text = (DEPLOY / "prometheus.yml").read_text(encoding="utf-8")
    for usual, other in {
        **PACE,
        "127.0.0.1:8082": metrics_url.removeprefix("http://"),
        "127.0.0.1:8083": exporter_url.removeprefix("http://").removesuffix("/metrics"),
    }.items():
        assert text.count(usual) == 1, usual
        text = text.replace(usual, other)
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    for path in (folder / "rules").glob("*.yml"):
        path.write_text(_shortened(path.read_text(encoding="utf-8")), encoding="utf-8")
    return folder / "prometheus.yml"


def queries() -> list[Query]:
    """Everything that the dashboard and the rules ask. An alert is asked with `bool`: it says 0 then, not nothing."""
    found = []
    for panel in json.loads((torchserve.PROJECT / FILE).read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            asked = target["expr"]
            for name, value in VARIABLES.items():
                asked = asked.replace(name, value)
            found.append(Query(panel["title"], target["expr"], asked))
    for rule in rules():
        asked = _shortened(rule["expr"])
        if "alert" in rule:
            asked = COMPARED.sub(r" \1 bool ", asked)
        found.append(Query(rule.get("record") or rule["alert"], rule["expr"], asked))
    return found


def rules() -> list[dict[str, Any]]:
    """Every rule, recording or alert, as it is written."""
    return [
        rule
        for path in sorted((DEPLOY / "rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def results(server: Running, *, seconds: float) -> dict[Query, list[Sample]]:
    """What each query gives, as soon as all give something; after `seconds`, as it is then."""
    until = time.monotonic() + seconds
    while True:
        found = {query: server.query(query.asked) for query in queries()}
        if all(found.values()) or time.monotonic() > until:
            return found
        time.sleep(1.0)


def _shortened(text: str) -> str:
    for pattern, other in SHORT:
        text = re.sub(pattern, other, text)
    return text


@contextlib.contextmanager
def _traffic(client: Client, examples: tuple[Golden, ...]) -> Iterator[None]:
    """Both versions are asked, some for explanations, some with what is no image, until the end."""
    over = threading.Event()

    def one(number: int) -> None:
        version = "1.1" if number % 2 == 0 else None
        body = examples[number % len(examples)].body
        if number % 7 == 0:
            client.predict("digits", b"no image", version=version)
        elif number % 7 == 1:
            client.explain("digits", body, version=version, headers={"X-Explain-Method": "saliency"})
        else:
            client.predict("digits", body, version=version)

    def ask() -> None:
        number = 0
        while not over.wait(0.05):
            with contextlib.suppress(ServerError):  # refused, or its worker was killed: as the test wants it
                one(number)
            number += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
