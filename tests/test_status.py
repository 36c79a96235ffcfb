"""`status` on a real server: workers that cannot start, and answers that differ from the journal."""

from __future__ import annotations

import json
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from marwright import files
from marwright.packing import container, records
from marwright.release import journal
from marwright.release.server import Expected
from marwright.settings import StatusSettings
from scripts import status
from tests import archives, torchserve
from tests.archives import Built

pytestmark = pytest.mark.server


def test_status_has_the_causes_of_what_is_wrong(
    digits: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    good = archives.build(digits.run, store).record
    other = archives.build(digits.run, store, threads=2).record
    broken = _broken(good, store)
    with journal.open(store) as book:
        book.release("digits", other.version, proven=False, why="test")
        book.release("broken", broken.version, proven=False, why="test")
    with torchserve.home(tmp_path, {"digits": Expected("1.0")}, archives=[good.file, broken.file], store=store) as home:
        home.server.start()
        home.server.wait_ready(home.expected)
        settings = StatusSettings(store=store, config=home.config_path)
        until = time.monotonic() + 60
        while not home.server.last_words("broken", "1.0"):
            assert time.monotonic() < until
            time.sleep(0.2)
        assert status.main(settings) == 0
        said = capsys.readouterr().out
        with journal.open(store) as book:
            book.release("lost", "1.0", proven=False, why="test")
        (store / broken.file).rename(store / "elsewhere")
        assert status.main(settings) == 0
        told = capsys.readouterr().out
        assert "attention: lost 1.0 is released and its record is missing" in told
        assert "attention: broken-1.0.mar is released and missing" in told
        assert "attention: digits 1.0 answers, the journal says 1.1" in said
        assert "attention: digits 1.1 is released, the server has not loaded it" in said
        assert "broken 1.0 has 0 of 1 workers ready: " in said
        assert "was changed after the archive was built" in said
        assert status.main(replace(settings, json=True)) == 0
        rows = {(row["model"], row["version"]): row for row in json.loads(capsys.readouterr().out)["versions"]}
        assert rows["digits", "1.0"]["serving"] == "answers, 1 ready"
        assert rows["digits", "1.1"]["released"] == "unproven"


def test_status_without_a_server_or_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.properties"
    torchserve.write_config(config, {})
    assert status.main(StatusSettings(store=tmp_path / "store", config=config)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "nothing built yet: make archive",
        "TorchServe: not running (make serve starts it)",
    ]


def _broken(good: records.ArchiveRecord, store: Path) -> records.ArchiveRecord:
    """A model whose spec was changed after it was packed."""
    with zipfile.ZipFile(store / good.file) as opened:
        body: dict[str, container.Content] = {name: opened.read(name) for name in opened.namelist()}
    body["spec.json"] = bytes(body["spec.json"]).replace(b'"top_k": 5', b'"top_k": 4')  # type: ignore[arg-type]
    body["MAR-INF/MANIFEST.json"] = bytes(body["MAR-INF/MANIFEST.json"]).replace(b'"digits"', b'"broken"')  # type: ignore[arg-type]
    container.write(store / "broken-1.0.mar", body)
    record = replace(good, model="broken", file="broken-1.0.mar", sha256=files.sha256(store / "broken-1.0.mar"))
    files.write_json(store / "broken-1.0.json", asdict(record))
    return record
