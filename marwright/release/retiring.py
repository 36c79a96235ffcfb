"""Taking a version out of the server without losing a request that it still owes an answer.

TorchServe kills workers at once when a version is unregistered: what waits for them is never answered, what is in them
gets a 500. So first it is drained: nobody has called its pinned URL for a while, nothing waits in its queue, and then
each of its workers has answered one more request. The queue's length alone does not show the batch inside a worker;
a worker that answers has no other batch.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

from marwright.errors import MarwrightError, NotReady, ServerRefused
from marwright.release import loading
from marwright.release.answers import ModelStatus
from marwright.release.client import Client
from marwright.release.journal import Journal
from marwright.release.shadow import Sample

_REQUESTS = "ts_inference_requests_total"


def retire(
    client: Client, book: Journal, model: str, version: str, sample: Sample, *, why: str, idle: float, seconds: float
) -> str:
    """Drain and unregister it, journalled; "" when it is gone, else why it was kept after `seconds`."""
    book.add(model, version, "retiring", why=why)
    try:
        drain(client, model, version, sample, idle=idle, seconds=seconds)
    except NotReady as error:
        book.add(model, version, "kept", why=error.message)
        return error.message
    loading.remove(client, model, version)
    book.add(model, version, "retired", why=why)
    return ""


def force_out(client: Client, model: str, version: str, sample: Sample, *, idle: float, seconds: float) -> str:
    """Drain it for as long as that helps, then unregister it in any case; what was left undrained, in words.

    For a version that failed: its worker may never answer again.
    """
    left = ""
    try:
        drain(client, model, version, sample, idle=idle, seconds=seconds)
    except MarwrightError as error:
        left = error.message
    loading.remove(client, model, version)
    return left


def drain(client: Client, model: str, version: str, sample: Sample, *, idle: float, seconds: float) -> None:
    """Return when no request can still be owed an answer by that version; NotReady says what it waits for.

    `idle` is for how many seconds nobody may have called its pinned URL; 0 asks only for what it owes now.
    """
    until = time.monotonic() + seconds
    seen, since = pinned_requests(client, model, version), time.monotonic()
    while True:
        status = loading.loaded(client, model, version)
        if status is None:
            return
        count = pinned_requests(client, model, version)
        if count != seen:
            seen, since = count, time.monotonic()
        waits = f"{status.pending} requests wait in its queue" if status.pending else ""
        if idle and time.monotonic() - since < idle:
            waits = "its pinned URL is still called"
        if not waits:
            waits, asked = _each_worker_answers(client, status, sample)
            if not waits and (not idle or pinned_requests(client, model, version) <= seen + asked):
                return
            seen, since = pinned_requests(client, model, version), time.monotonic()
            waits = waits or "its pinned URL is still called"
        if time.monotonic() > until:
            raise NotReady(f"{model} {version} is not drained after {seconds:g} s: {waits}")
        time.sleep(min(0.1, max(idle / 4, 0.02)))


def pinned_requests(client: Client, model: str, version: str) -> float:
    """How many requests, over REST and gRPC, have named this version; 0 where the server does not count (metrics off).

    TorchServe counts requests that name no version under "default".
    """
    total = 0.0
    for line in client.metrics([_REQUESTS]).splitlines():
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        if line.startswith(_REQUESTS) and (labels.get("model_name"), labels.get("model_version")) == (model, version):
            total += float(line.rsplit(" ", 1)[1])
    return total


def _each_worker_answers(client: Client, status: ModelStatus, sample: Sample) -> tuple[str, int]:
    """What it waits for ("" when each READY worker has answered), and how many requests that took."""
    wanted = set(loading.ready_pids(status))
    asked = 0
    if not wanted:
        return "", 0

    def probe(_: int) -> int:
        body, kind = sample.body, sample.content_type
        try:
            return client.predict(status.name, body, version=status.version, content_type=kind, capture=False).worker
        except ServerRefused:
            return 0

    with ThreadPoolExecutor(len(wanted)) as pool:
        for _ in range(20):  # who takes the next batch is the server's choice
            seen = set(pool.map(probe, range(len(wanted))))
            asked += len(wanted)
            wanted -= seen
            if not wanted:
                return "", asked
    return f"no answer from worker {', '.join(map(str, sorted(wanted)))}", asked
