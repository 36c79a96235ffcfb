"""What a real server's metrics page says of each version is what was sent to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import pytest

from marwright.errors import ServerRefused
from marwright.packing import container
from marwright.release.client import Client
from marwright.release.server import Expected
from tests import archives as built_archives
from tests import torchserve, zoo
from tests.archives import Built
from tests.handlers import archives

ODD = ("a,b", "c|d", "e:f", "g#h", "nüll", 'quo"te', "back\\slash", "new\nline", "(other)", "%41")
PNG = zoo.encoded(zoo.picture("L", (16, 16)))
JSON = {"Content-Type": "application/json"}


class Page:
    """The counters of one version, from one look at the page."""

    def __init__(self, client: Client, version: str) -> None:
        self.series: dict[tuple[str, str], float] = {}
        for line in client.metrics().splitlines():
            found = re.fullmatch(r"marwright_(\w+)\{(.*),\} (\S+)", line)
            if found is None:
                continue
            name, inside, value = found.groups()
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', inside))
            if (labels.pop("model_name"), labels.pop("model_version")) == ("digits", version):
                labels.pop("Hostname")
                self.series[name, " ".join(labels.values())] = float(value)

    def since(self, before: Page) -> dict[tuple[str, str], float]:
        """What grew, by how much."""
        grown = {key: value - before.series.get(key, 0) for key, value in self.series.items()}
        return {key: value for key, value in grown.items() if value}


def settled(client: Client, version: str, before: Page, requests: int) -> dict[tuple[str, str], float]:
    """What grew once as many requests are counted as were sent, and a moment longer for what should not come."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        grown = Page(client, version).since(before)
        if sum(by for (name, _), by in grown.items() if name == "requests_total") >= requests:
            break
        time.sleep(0.2)
    time.sleep(1.2)
    return Page(client, version).since(before)


def of(grown: Mapping[tuple[str, str], float], name: str) -> dict[str, float]:
    return {labels: by for (series, labels), by in grown.items() if series == name}


def status(ask: Callable[[], object]) -> int:
    try:
        ask()
    except ServerRefused as refused:
        return int(refused.status)
    return 200


@pytest.fixture(scope="module")
def home(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torchserve.Home]:
    """digits: 1.0 is the default, 1.1 has two workers, 1.2 has odd classes."""
    folder = tmp_path_factory.mktemp("served")
    store = folder / "store"
    store.mkdir()
    shutil.copy(digits.path, store)
    built_archives.build(digits.run, store, version="1.1", workers=2)
    oddly_named(digits.path, folder / "odd", store / "digits-1.2.mar")
    with torchserve.home(folder, {"digits": Expected("1.0")}, archives=["digits-1.0.mar"], store=store) as home:
        home.bring_up()
        with home.client(timeout=60) as client:
            client.register("digits-1.1.mar", initial_workers=2, synchronous=True, timeout=120)
        yield home


def oddly_named(path: Path, folder: Path, out: Path) -> None:
    """The same archive with other labels, and its version 1.2."""
    container.unpack(path, folder)
    for name, changes in {"spec.json": {"classes": ODD}, "MAR-INF/MANIFEST.json": {}}.items():
        document = json.loads((folder / name).read_text())
        document.update(changes)
        if "model" in document:
            document["model"]["modelVersion"] = "1.2"
        (folder / name).write_text(json.dumps(document))
    archives.seal(folder)
    container.write(out, {str(one.relative_to(folder)): one for one in folder.rglob("*") if one.is_file()})


@pytest.fixture
def client(home: torchserve.Home) -> Iterator[Client]:
    with home.client() as client:
        yield client


def test_a_version_counts_what_it_was_sent_whichever_way_it_came(client: Client) -> None:
    before, other = Page(client, "1.0"), Page(client, "1.1")
    answers = [client.predict("digits", PNG) for _ in range(3)]
    answers += [client.predict("digits", PNG, version="1.0") for _ in range(2)]
    v1 = {"instances": [{"b64": zoo.b64(PNG)}] * 4}
    v2 = {"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": [zoo.b64(PNG)]}]}
    client.predict_kserve_v1("digits", v1)
    client.predict_kserve_v2("digits", v2)
    client.predict_grpc("digits", {"data": PNG}, version="1.0")
    client.predict_grpc("digits", {"data": PNG, "meta": b"1"})
    refused = [
        status(lambda: client.predict("digits", b"not a picture")),
        status(lambda: client.predict("digits", b"not a picture", version="1.0")),
        status(lambda: client.predict("digits", b"{", headers=JSON)),
        status(lambda: client.predict("digits", {"instances": [{"b64": zoo.b64(PNG)}] * 257})),
        status(lambda: client.predict("digits", {"instances": []})),
    ]
    assert refused == [415, 415, 400, 413, 400]
    client.describe("digits", "1.0", customized=True)
    grown = settled(client, "1.0", before, 15)

    assert of(grown, "requests_total") == {
        "predict 200": 9, "predict 415": 2, "predict 400": 2, "predict 413": 1, "describe 200": 1
    }  # fmt: skip
    assert of(grown, "errors_total") == {"predict unsupported": 2, "predict malformed": 2, "predict too_large": 1}
    for name, count in {"decode": 14, "inference": 9, "handle": 14}.items():
        assert of(grown, f"{name}_seconds_count") == {"": count}
        buckets = of(grown, f"{name}_seconds_bucket")
        by_bound = [buckets[le] for le in sorted(buckets, key=float)]
        assert by_bound == sorted(by_bound)
        assert by_bound[-1] == buckets["+Inf"] == count
        assert 0 < of(grown, f"{name}_seconds_sum")[""] < 60
    assert of(grown, "batch_size_sum") == of(grown, "batch_size_count") == {"": 14}  # one after the other
    best = answers[0].json()
    (label, confidence), *_ = best.items()
    assert of(grown, "predictions_total") == {label: 12}
    assert of(grown, "confidence_count") == of(grown, "entropy_count") == of(grown, "brightness_count") == {"": 12}
    assert of(grown, "confidence_sum")[""] == pytest.approx(12 * confidence, rel=1e-4)
    assert "load_seconds_count" not in {name for name, _ in grown}
    assert Page(client, "1.1").since(other) == {}


def test_default_traffic_is_counted_for_the_version_that_answered(client: Client) -> None:
    before = {version: Page(client, version) for version in ("1.0", "1.1")}
    client.set_default("digits", "1.1")
    try:
        for _ in range(4):
            assert client.predict("digits", PNG).version == "1.1"
        client.predict("digits", PNG, version="1.0")
    finally:
        client.set_default("digits", "1.0")
    client.predict("digits", PNG)
    found = {version: settled(client, version, page, 2) for version, page in before.items()}
    assert of(found["1.1"], "requests_total") == {"predict 200": 4}
    assert of(found["1.0"], "requests_total") == {"predict 200": 2}


def test_workers_add_up_and_a_killed_one_takes_nothing_back(client: Client) -> None:
    start = Page(client, "1.1")
    assert start.series["load_seconds_count", ""] == 2
    assert start.series["load_seconds_sum", ""] > 0

    def ask(count: int) -> Counter[int]:
        with ThreadPoolExecutor(8) as pool:
            given = pool.map(lambda _: client.predict("digits", PNG, version="1.1"), range(count))
            return Counter(answer.worker for answer in given)

    workers: Counter[int] = Counter()
    while len(workers) < 2:
        workers += ask(50)
    sent = workers.total()
    grown = settled(client, "1.1", start, sent)
    assert of(grown, "requests_total") == {"predict 200": sent}
    assert of(grown, "confidence_count") == of(grown, "handle_seconds_count") == {"": sent}
    assert of(grown, "batch_size_sum") == {"": sent}

    os.kill(workers.most_common(1)[0][0], signal.SIGKILL)
    last, until = Page(client, "1.1"), time.monotonic() + 90
    while last.series["load_seconds_count", ""] < 3 and time.monotonic() < until:
        time.sleep(0.3)
        now = Page(client, "1.1")
        assert now.series.keys() >= last.series.keys()
        assert all(now.series[key] >= value for key, value in last.series.items())
        last = now
    assert last.series["load_seconds_count", ""] == last.series["warm_up_seconds_count", ""] == 3
    while client.describe("digits", "1.1")[0].ready_workers < 2 and time.monotonic() < until:
        time.sleep(0.3)
    more = ask(20).total()
    assert of(settled(client, "1.1", start, sent + more), "requests_total") == {"predict 200": sent + more}


def test_classes_with_any_name_reach_the_page_and_can_be_read_back(client: Client) -> None:
    client.register("digits-1.2.mar", initial_workers=1, synchronous=True, timeout=120)
    given = client.predict("digits", PNG, version="1.2", headers={"X-Top-K": "10"}).json()
    series = settled(client, "1.2", Page(client, "none"), 1)
    assert {unquote(name) for name in of(series, "predictions_total")} == {next(iter(given))}
    page = Page(client, "1.2").series
    assert {unquote(labels) for name, labels in page if name == "predictions_total"} == set(given) == set(ODD)
    client.unregister("digits", "1.2")
    assert Page(client, "1.2").series == page, "the page keeps what a version did after it is gone"


def test_nothing_of_it_is_an_error_in_the_servers_log(home: torchserve.Home) -> None:
    """The last test of this module: every line that the workers emitted was one that the server could read."""
    said = (home.folder / "logs" / "ts_log.log").read_text() + (home.folder / "logs" / "model_log.log").read_text()
    assert "[METRICS]" not in said
    assert "metrics of this worker are incomplete" not in said
    assert "does not declare" not in said
