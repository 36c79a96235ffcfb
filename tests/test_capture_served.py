"""On the real server: what is in the spool is what was sent and what was answered, whichever way it came."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml

from handlers import spool
from handlers.capture import chosen
from marwright.errors import ServerRefused
from marwright.learning.tables import Serving
from marwright.packing import archive, container, golden, records
from marwright.release import proof, shadow
from marwright.release.answers import Answer
from marwright.release.client import Client
from marwright.release.server import Expected
from tests import archives as built_archives
from tests import torchserve, zoo
from tests.archives import Built
from tests.handlers import archives
from tests.handlers.test_capture import Captured, read

PNG = zoo.encoded(zoo.picture("L", (16, 16)))
SEED = 11


@contextlib.contextmanager
def serving(built: Built, folder: Path, *, capture: str | None, store: Path) -> Iterator[torchserve.Home]:
    """A server whose environment has a spool, and this share; None: the archive's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARWRIGHT_SPOOL", str(folder / "spool"))
        patch.setenv("MARWRIGHT_CAPTURE_SEED", str(SEED))
        patch.delenv("MARWRIGHT_CAPTURE", raising=False)
        if capture is not None:
            patch.setenv("MARWRIGHT_CAPTURE", capture)
        expected = {"digits": Expected(built.record.version, built.record.workers)}
        with torchserve.home(folder, expected, archives=[built.record.file], store=store) as home:
            home.bring_up()
            yield home


@pytest.fixture(scope="module")
def home(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torchserve.Home]:
    """digits 1.0 with two workers that capture everything, because its recipe says so."""
    folder = tmp_path_factory.mktemp("captured")
    built = built_archives.build(digits.run, folder / "store", version="1.0", workers=2, capture=1.0)
    with serving(built, folder, capture=None, store=folder / "store") as home:
        yield home


@pytest.fixture
def client(home: torchserve.Home) -> Iterator[Client]:
    with home.client(timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Ids that an earlier test has looked at."""
    return set()


def captured(home: torchserve.Home, seen: set[str], count: int) -> dict[str, Captured]:
    """By id, what is new in the finished segments, once there are as many (or a little later, for one too many)."""
    until = time.monotonic() + 60
    while True:
        found = {one.id: one for one in read(home.folder / "spool") if one.id not in seen}
        if len(found) >= count or time.monotonic() > until:
            break
        time.sleep(0.3)
    seen.update(found)
    return found


def best(answer: Answer) -> list[float]:
    """All ten probabilities, best first."""
    return list(answer.json().values())


def test_a_recipe_without_capture_makes_the_bytes_that_it_always_made() -> None:
    assert b"capture" not in archive.model_config(Serving())
    assert yaml.safe_load(archive.model_config(Serving(capture=0.25)))["handler"] == {"threads": 1, "capture": 0.25}


def test_the_id_that_a_caller_sees_is_the_one_that_was_captured(
    home: torchserve.Home, client: Client, seen: set[str]
) -> None:
    """REST: the answer's header x-request-id. gRPC: the field request_id of the answer to a call with `meta`."""
    every = {"X-Top-K": "10"}
    jpeg = zoo.encoded(zoo.picture(), "JPEG")
    answers = {
        "raw": (client.predict("digits", PNG, headers=every), PNG),
        "pinned": (client.predict("digits", jpeg, version="1.0", headers=every, content_type="image/jpeg"), jpeg),
        "multipart": (client.predict("digits", fields={"data": PNG, "top_k": "10"}), PNG),
        "grpc": (client.predict_grpc("digits", {"data": jpeg, "top_k": "10"}), jpeg),
        "npy": (client.predict("digits", zoo.npy(np.zeros((16, 16), np.uint8)), headers=every), None),
    }
    found = captured(home, seen, len(answers))
    assert {answer.request_id for answer, _ in answers.values()} == found.keys()
    for name, (answer, body) in answers.items():
        one = found[answer.request_id]
        assert uuid.UUID(answer.request_id)
        assert one.entry["http"] is (name != "grpc")
        if body is not None:
            assert one.body == body
        (row,) = one.outputs["probabilities"]
        assert sorted(row.tolist(), reverse=True) == best(answer)
        assert one.head["bundle"] == answer.bundle
        (array,) = one.arrays
        assert array.shape == (1, 16, 16)
    assert found[answers["pinned"][0].request_id].entry["type"] == "image/jpeg"


def test_an_id_that_a_caller_chose_is_not_taken_over(home: torchserve.Home, client: Client, seen: set[str]) -> None:
    own = "11111111-2222-3333-4444-555555555555"
    answers = [client.predict("digits", PNG, headers={"x-request-id": own}) for _ in range(2)]
    found = captured(home, seen, 2)
    assert found.keys() == {answer.request_id for answer in answers}
    assert own not in found


def test_kserve_and_json_bodies_are_captured_with_all_their_instances(
    home: torchserve.Home, client: Client, seen: set[str]
) -> None:
    v1 = {"instances": [{"b64": zoo.b64(PNG)}, {"b64": zoo.b64(zoo.PNG)}], "parameters": {"top_k": 10}}
    v2 = {"inputs": [{"name": "i", "shape": [2, 1, 16, 16], "datatype": "UINT8", "data": [*range(256)] * 2}]}
    stock = {"data": zoo.b64(PNG), "top_k": 10}
    given = [
        client.predict_kserve_v1("digits", v1),
        client.predict_kserve_v2("digits", v2),
        client.predict("digits", stock),
    ]
    found = captured(home, seen, 3)
    one, two, three = (found[answer.request_id] for answer in given)
    for each, document, rows in ((one, v1, 2), (two, v2, 2), (three, stock, 1)):
        assert each.body is not None
        assert json.loads(each.body) == document
        assert (each.entry["form"], each.entry["rows"], len(each.arrays)) == ("json", rows, rows)
    for row, said in zip(one.outputs["probabilities"], given[0].json()["predictions"], strict=True):
        assert sorted(row.tolist(), reverse=True) == list(said.values())
    assert all(array.ravel().tolist() == list(range(256)) for array in two.arrays)


def test_two_workers_and_full_batches_capture_everything_once(
    home: torchserve.Home, client: Client, seen: set[str]
) -> None:
    pictures = [zoo.encoded(zoo.picture("L", (16, 16)).rotate(angle)) for angle in range(200)]

    def ask(number: int) -> tuple[Answer, bytes]:
        body = pictures[number % 200]
        if number % 3:
            return client.predict("digits", body, headers={"X-Top-K": "10"}), body
        return client.predict_grpc("digits", {"data": body, "top_k": "10"}), body

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(600)))
    found = captured(home, seen, 600)
    assert found.keys() == {answer.request_id for answer, _ in answers}
    for answer, body in answers:
        one = found[answer.request_id]
        assert one.body == body
        assert sorted(one.outputs["probabilities"][0].tolist(), reverse=True) == best(answer)
    writers = Counter(path.name.split("-")[2] for path in spool.finished(home.folder / "spool"))
    assert set(writers) == {str(answer.worker) for answer, _ in answers}
    assert len(writers) == 2


def test_the_tools_own_requests_are_not_captured(
    home: torchserve.Home, client: Client, digits: Built, seen: set[str]
) -> None:
    record = records.record(home.store, "digits", "1.0")
    examples = golden.read(home.store / record.file)
    proof.prove(client, record, examples)
    shadow.side_by_side(client, "digits", ("1.0", "1.0"), shadow.from_golden(examples), max_missed=0)
    last = client.predict("digits", PNG)
    assert captured(home, seen, 1).keys() == {last.request_id}
    for how in ({"capture": False}, {"headers": {"x-capture": "off"}}):
        client.predict("digits", PNG, **how)  # type: ignore[arg-type]
    client.predict_grpc("digits", {"data": PNG}, capture=False)
    last = client.predict("digits", PNG)
    assert captured(home, seen, 1).keys() == {last.request_id}


def test_a_version_from_before_there_was_capture_can_still_be_proven(
    home: torchserve.Home, client: Client, tmp_path: Path
) -> None:
    record = records.record(home.store, "digits", "1.0")
    container.unpack(home.store / record.file, tmp_path / "old")
    for name, old, new in (
        ("handlers/payloads.py", '"explain", "capture"})', '"explain"})'),
        ("handlers/base.py", '            "capture": self.recorder.share,\n', ""),
        ("model-config.yaml", "capture: 1.0", "capture: 0.0"),
        ("MAR-INF/MANIFEST.json", '"modelVersion": "1.0"', '"modelVersion": "0.9"'),
    ):
        text = (tmp_path / "old" / name).read_text()
        assert text.count(old) == 1
        (tmp_path / "old" / name).write_text(text.replace(old, new))
    bundle = archives.seal(tmp_path / "old")
    files = [path for path in (tmp_path / "old").rglob("*") if path.is_file()]
    container.write(
        home.store / "digits-0.9.mar", {path.relative_to(tmp_path / "old").as_posix(): path for path in files}
    )
    client.register("digits-0.9.mar", initial_workers=2, synchronous=True, timeout=120)
    try:
        with pytest.raises(ServerRefused, match="one field"):
            client.predict_grpc("digits", {"data": PNG}, version="0.9", capture=False)
        examples = golden.read(home.store / record.file)
        assert proof.prove(client, replace(record, version="0.9", bundle=bundle), examples).examples == len(examples)
    finally:
        client.unregister("digits", "0.9")


def test_metrics_say_how_many(home: torchserve.Home, client: Client, seen: set[str]) -> None:
    def page() -> dict[str, float]:
        lines = (line for line in client.metrics().splitlines() if line.startswith("marwright_capture"))
        return {line.split("Hostname")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    until = time.monotonic() + 30
    while sum(value for name, value in page().items() if "captured" in name) < len(seen) and time.monotonic() < until:
        time.sleep(0.3)
    found = page()
    assert sum(value for name, value in found.items() if "captured_total" in name) == len(seen)
    dropped = {name: value for name, value in found.items() if "dropped" in name}
    assert len(dropped) == 6
    assert not any(dropped.values())
    assert client.describe("digits", "1.0", customized=True)[0].customized["capture"] == 1.0


def test_what_a_killed_worker_wrote_is_taken_over(home: torchserve.Home, client: Client, seen: set[str]) -> None:
    answers = [client.predict("digits", PNG) for _ in range(20)]
    victim = answers[-1].worker
    mine = {answer.request_id for answer in answers if answer.worker == victim}
    time.sleep(1.0)  # what waits is written ten times a second
    os.kill(victim, signal.SIGKILL)
    found = captured(home, seen, 20)
    assert found.keys() == {answer.request_id for answer in answers}
    assert mine <= found.keys()
    until = time.monotonic() + 90
    while client.describe("digits", "1.0")[0].ready_workers < 2 and time.monotonic() < until:
        time.sleep(0.3)
    with ThreadPoolExecutor(8) as pool:
        more = list(pool.map(lambda _: client.predict("digits", PNG), range(100)))
    assert captured(home, seen, 100).keys() == {answer.request_id for answer in more}


def test_of_a_share_the_chosen_are_captured_and_no_other(digits: Built, tmp_path: Path) -> None:
    with serving(digits, tmp_path, capture="0.3", store=digits.store) as home, home.client(timeout=60) as client:
        with ThreadPoolExecutor(8) as pool:
            ids = {answer.request_id for answer in pool.map(lambda _: client.predict("digits", PNG), range(200))}
        expected = {id for id in ids if chosen(id, 0.3, SEED)}
        assert captured(home, set(), len(expected)).keys() == expected
        home.server.stop(timeout=30)
        assert {one.id for one in read(home.folder / "spool")} == expected


def test_off_by_default_and_no_folder_is_made(digits: Built, tmp_path: Path) -> None:
    with serving(digits, tmp_path, capture=None, store=digits.store) as home, home.client(timeout=60) as client:
        session = requests.Session()
        session.trust_env = False
        token = json.loads(home.key_file.read_text())["inference"]["key"]
        url = f"{home.config.inference_url}/predictions/digits"
        plain: dict[str, Any] = {"data": PNG, "headers": {"Authorization": f"Bearer {token}"}, "timeout": 60}
        assert session.post(url, **plain).status_code == 200
        assert client.describe("digits", "1.0", customized=True)[0].customized["capture"] == 0.0
        time.sleep(0.5)
        assert not re.search("^marwright_capture", client.metrics(), re.MULTILINE)
    assert not (tmp_path / "spool").exists()
