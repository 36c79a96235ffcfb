"""The whole loop on a live server, in a few minutes, with digits: answers, drift, alarm, labels, a better version.

It has a folder, ports and a server of its own, and stops that server at the end: what runs here otherwise is not
touched. The model learns from half of scikit-learn's digits; callers send the others, which it never saw: first as they
are, then darker and noisy.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from marwright import cli, files
from marwright.errors import MarwrightError, RolledBack, SettingsError
from marwright.feedback import story
from marwright.feedback.story import Event, Hit
from marwright.learning import corruptions
from marwright.release import properties
from marwright.release.client import Client
from marwright.release.server import Server
from marwright.settings import (
    DemoSettings,
    FeedbackCollectorSettings,
    Places,
    RetrainSettings,
    ServeSettings,
    StopSettings,
)
from scripts import collector, retrain, serve, stop

SETTINGS = DemoSettings
MODEL = "digits"
MARK = ".demonstration"
"""In a folder that may be emptied."""
OWN, ORDINARY, DRIFTED = 900, 160, 450
"""Digits: learned before; asked as they are; asked darker and noisy. The rest is asked, darker and noisy too, and never
labelled."""
RATE = 20.0
"""Requests a second."""
LABELLED_AFTER = 2.0
"""Seconds until somebody says what a picture showed."""
LONGEST = 120.0
"""Seconds that the alarm is waited for."""
STEPS = {"trained": "trained", "new holdout": "judged", "built": "archived"}
"""Beginnings of what a turn says, and how that is marked on the time line."""
ALARMS = {
    "looks in a row": "alarm: drift",
    "live accuracy": "alarm: accuracy",
    "wrong answers": "alarm: errors",
}
"""What the trigger's sentences say, and how that is marked on the time line."""
POLICY = """# For a demonstration: few requests, and little patience.
[shadow]
requests = 60

[gate]
margin = 0.02
looks = 1

[watch]
seconds = 6.0

[settle]
warm_seconds = 60.0

[trigger]
min_labels = 100000       # not for their number: for drift, or for a low accuracy
floor = 200
min_accuracy = 0.9
drift_window = 150
"""
PORTS = ("inference_address", "management_address", "metrics_address", "grpc_inference_port", "grpc_management_port")

Pictures = list[tuple[bytes, str]]
"""PNG bytes, and what they show."""


@dataclass
class Traffic:
    """Callers of the default URL, who know the truth and label what they sent a little later. Threads of its own."""

    client: Client
    began: float
    hits: list[Hit] = field(default_factory=list)
    labels: int = 0
    trouble: list[str] = field(default_factory=list)
    _queue: deque[tuple[str, bytes, str, bool]] = field(default_factory=deque)
    _due: deque[tuple[float, dict[str, Any]]] = field(default_factory=deque)
    _again: tuple[str, Pictures] = ("", [])
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._label)]
        for thread in self._threads:
            thread.start()

    def send(self, phase: str, pictures: Pictures) -> None:
        """These next, once each; they are captured, and labelled afterwards."""
        self._queue.extend((phase, body, label, True) for body, label in pictures)

    def repeat(self, phase: str, pictures: Pictures) -> None:
        """These over and over when nothing else is to be sent; not captured, never labelled."""
        self._again = (phase, list(pictures))

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def unlabelled(self) -> int:
        return len(self._due)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=30)

    def _send(self) -> None:
        number, due = 0, time.monotonic()
        while not self._over.is_set():
            due += 1 / RATE
            self._over.wait(max(0.0, due - time.monotonic()))
            if self._queue:
                self._ask(*self._queue.popleft())
            elif self._again[1]:
                phase, pictures = self._again
                self._ask(phase, *pictures[number % len(pictures)], False)
                number += 1

    def _ask(self, phase: str, body: bytes, label: str, kept: bool) -> None:
        sent = time.monotonic()
        try:
            answer = self.client.predict(MODEL, body, headers={} if kept else {"X-Capture": "off"})
            best = next(iter(answer.json()))
        except (MarwrightError, ValueError, StopIteration) as error:
            self.hits.append(Hit(sent - self.began, time.monotonic() - sent, error=str(error), phase=phase))
            return
        took = time.monotonic() - sent
        self.hits.append(Hit(sent - self.began, took, answer.version, best == label, phase=phase))
        if kept:
            said = {"request": answer.request_id, "label": label, "source": "demo"}
            self._due.append((time.monotonic() + LABELLED_AFTER, said))

    def _label(self) -> None:
        """Like a person at a screen: some at a time, and again where the server does not take them."""
        while not self._over.wait(0.25):
            ready = [said for due, said in list(self._due) if due <= time.monotonic()]
            if not ready:
                continue
            try:
                self.client.predict("feedback", {"labels": ready})
            except MarwrightError as error:
                self.trouble.append(str(error))
                continue
            self.labels += len(ready)
            for _ in ready:
                self._due.popleft()


@dataclass
class Tale:
    """What is printed and what the page tells."""

    began: float
    events: list[Event] = field(default_factory=list)

    def tell(self, text: str, mark: str = "") -> None:
        at = time.monotonic() - self.began
        self.events.append(Event(at, text, mark))
        print(f"{at:6.1f} s  {text}", flush=True)


def main(settings: DemoSettings) -> int:
    with places(settings.folder) as where, contextlib.redirect_stdout(sys.stderr if settings.json else sys.stdout):
        found = _told(settings, where)
    if settings.json:
        print(json.dumps(found))
    return 0 if not found["failed"] and found["drifted"] < found["ordinary"] and found["drifted"] < found["last"] else 1


def _told(settings: DemoSettings, where: Places) -> dict[str, float]:
    own, ordinary, drifted, rest = _parts()
    _own_data(settings.folder, own)
    common = {name: getattr(where, name) for name in ("store", "config", "runs", "recipes", "feedback")}
    tale = Tale(time.monotonic())
    try:
        tale.tell(f"the model learns from {len(own)} digits, and TorchServe starts; every request will be captured")
        serve.main(ServeSettings(**common, recipe=MODEL))
        collector.main(FeedbackCollectorSettings(**common))
        with Server(where.serving, home=where.home).client() as client:
            traffic = Traffic(client, tale.began)
            traffic.start()
            try:
                _circle(
                    RetrainSettings(**common, recipe=MODEL, policy=settings.folder / "policy.toml"),
                    tale,
                    traffic,
                    ordinary,
                    drifted,
                    rest,
                )
            finally:
                traffic.stop()
    finally:
        stop.main(StopSettings(**common))
    return _shown(settings, tale, traffic, ordinary, drifted)


def _circle(
    settings: RetrainSettings, tale: Tale, traffic: Traffic, ordinary: Pictures, drifted: Pictures, rest: Pictures
) -> None:
    tale.tell(
        f"callers send {len(ordinary)} digits, {RATE:g} a second; each is labelled {LABELLED_AFTER:g} s later",
        "answers",
    )
    traffic.send("ordinary", ordinary)
    _until(lambda: not traffic.waiting, 60.0)
    tale.tell(f"live accuracy {_percent(traffic, 'ordinary')}")
    tale.tell("from here on pictures are darker and noisy", "drift begins")
    traffic.repeat("drifted", rest)
    traffic.send("drifted", drifted)
    alarmed: set[str] = set()
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        time.sleep(2.0)
        seen = retrain.considered(settings)
        for sentence in (*seen.reasons, *seen.waiting):
            mark = next((mark for begins, mark in ALARMS.items() if begins in sentence), "")
            if mark and mark not in alarmed:
                alarmed.add(mark)
                tale.tell(f"alarm: {sentence}", mark)
        tale.tell(
            f"accuracy of the last {story.WINDOW} answers {_percent(traffic, '', story.WINDOW)},"
            f" {traffic.labels} labels so far"
        )
        if seen.retrain and not traffic.waiting and not traffic.unlabelled:
            break
    else:
        tale.tell(f"no reason to learn was found in {LONGEST:g} s")
    tale.tell("retrain: a turn, and callers go on meanwhile", "retrain")
    traffic.repeat("meanwhile", rest)
    try:
        outcome = retrain.retrained(settings, say=lambda line: tale.tell(f"retrain: {line}", _mark(line)))
        tale.tell(f"version {outcome.version}: {outcome.phase}", f"{outcome.version} {outcome.phase}")
    except RolledBack as refused:
        tale.tell(refused.message, "refused")
    traffic.repeat("afterwards", rest)
    time.sleep(12.0)


def _shown(
    settings: DemoSettings, tale: Tale, traffic: Traffic, ordinary: Pictures, drifted: Pictures
) -> dict[str, float]:
    hits = sorted(traffic.hits, key=lambda hit: hit.at)
    begun = {hit.version: hit.at for hit in reversed(hits) if not hit.error}
    tale.events += [
        Event(at, f"the first answer by {version}", f"{version} answers") for version, at in sorted(begun.items())[1:]
    ]
    tale.events.sort(key=lambda event: event.at)
    phases = [("ordinary", "at first"), ("drifted", "drifted"), ("afterwards", "after the rollout")]
    first, low, last = (story.accuracy(hits, phase) or 0.0 for phase, _ in phases)
    failed = sum(bool(hit.error) for hit in hits)
    examples = [
        (body, "image/png", f"{name}: {label}")
        for name, pictures in (("at first", ordinary), ("drifted", drifted))
        for body, label in pictures[:4]
    ]
    text = story.page(
        hits,
        tale.events,
        title="Production teaches the next version",
        subtitle="digits on a live TorchServe: answers, drift, alarm, labels, retraining, gate, rollout",
        phases=phases,
        pictures=examples,
    )
    files.write_text(settings.out, text)
    rows = [(name, f"{value:.1%}") for (_, name), value in zip(phases, (first, low, last), strict=True)]
    cli.print_table(("live accuracy", ""), rows)
    print(f"{len(hits)} requests, {failed} failed; {traffic.labels} labels\n{settings.out}")
    return {"requests": len(hits), "failed": failed, "ordinary": first, "drifted": low, "last": last}


@contextlib.contextmanager
def places(folder: Path) -> Iterator[Places]:
    """A house of its own in `folder`, emptied first: configuration on free ports, a recipe, a policy, capture at 100 %.
    SettingsError where the folder holds what no demonstration has made.

    Servers that are started inside have a temp folder of their own, so that no other one is mistaken for them.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise SettingsError(f"{folder} holds something else", hint="name another --folder, or remove it yourself")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / MARK, "made by a demonstration, and emptied by the next\n")
    (folder / "recipes").mkdir()
    values = properties.read(Path("config.properties"))
    values |= dict(zip(PORTS, _free(len(PORTS)), strict=True))
    files.write_text(folder / "config.properties", "".join(f"{key}={value}\n" for key, value in values.items()))
    shutil.copytree("deploy", folder / "deploy")
    files.write_text(folder / "policy.toml", POLICY)
    recipe = Path("recipes/digits.toml").read_text(encoding="utf-8")
    own = f'source = "folder"\npath = {json.dumps(str((folder / "own").resolve()))}'
    lines = [own if line.startswith("source =") else line for line in recipe.splitlines()]
    files.write_text(folder / "recipes" / "digits.toml", "\n".join(lines) + "\n")
    temp = tempfile.mkdtemp(prefix="mw")
    ours = {
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temp),
        "MARWRIGHT_CAPTURE": "1",
        "MARWRIGHT_SPOOL": str((folder / "feedback" / "spool").resolve()),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ |= ours
    tempfile.tempdir = None  # it is remembered once it was asked for
    try:
        yield Places(
            store=folder / "model_store",
            config=folder / "config.properties",
            runs=folder / "runs",
            recipes=folder / "recipes",
            feedback=folder / "feedback",
        )
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        shutil.rmtree(temp, ignore_errors=True)


def _parts() -> tuple[Pictures, Pictures, Pictures, Pictures]:
    """The digits, shuffled once: learned, asked as they are, asked drifted and labelled, asked drifted."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    grey = np.rint(found.images[order] * 255 / 16).astype(np.uint8)[:, np.newaxis]
    labels = [str(label) for label in found.target[order]]
    ends = (OWN, OWN + ORDINARY, OWN + ORDINARY + DRIFTED)
    worse = drifted(grey)
    return (
        _pictures(grey[: ends[0]], labels[: ends[0]]),
        _pictures(grey[ends[0] : ends[1]], labels[ends[0] : ends[1]]),
        _pictures(worse[ends[1] : ends[2]], labels[ends[1] : ends[2]]),
        _pictures(worse[ends[2] :], labels[ends[2] :]),
    )


def drifted(grey: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
    """N×1×H×W, as on a bad evening: darker, and noisy."""
    return corruptions.corrupt(corruptions.corrupt(grey, "darkness", 3, seed=seed), "noise", 1, seed=seed)


def _pictures(grey: NDArray[np.uint8], labels: Sequence[str]) -> Pictures:
    made = []
    for pixels, label in zip(grey, labels, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels[0]).save(stream, format="PNG")
        made.append((stream.getvalue(), label))
    return made


def own_data(folder: Path) -> None:
    """The digits that the model learns from at first, as a folder of classes."""
    _own_data(folder, _parts()[0])


def _own_data(folder: Path, pictures: Pictures) -> None:
    for number, (body, label) in enumerate(pictures):
        path = folder / "own" / label / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


def _free(count: int) -> list[str]:
    """Values for `PORTS`: ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return [
        f"http://127.0.0.1:{port}" if "address" in name else str(port) for name, port in zip(PORTS, ports, strict=True)
    ]


def _until(done: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)


def _mark(line: str) -> str:
    return next((mark for begins, mark in STEPS.items() if line.startswith(begins)), "")


def _percent(traffic: Traffic, phase: str, last: int = 0) -> str:
    share = story.accuracy(traffic.hits[-last:], phase)
    return "–" if share is None else f"{share:.1%}"
