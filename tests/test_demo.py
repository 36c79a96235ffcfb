"""The demonstration: the whole loop, on a server of its own, as `make demo-loop` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from marwright.errors import SettingsError
from scripts import demo

ROOT = Path(__file__).parent.parent


def test_a_folder_that_holds_something_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(SettingsError, match="holds something else"), demo.places(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").exists()
    for _ in range(2):
        with demo.places(tmp_path / "demo") as where:
            where.runs.mkdir()


@pytest.mark.server
def test_production_teaches_the_next_version_without_a_failed_request(tmp_path: Path) -> None:
    words = ["--folder", str(tmp_path / "demo"), "--out", str(tmp_path / "story.html"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts", "demo", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["failed"] == 0
    assert found["requests"] > 800
    assert found["ordinary"] > 0.9
    assert found["drifted"] < 0.8
    assert found["last"] > 0.9
    said = done.stderr
    assert "alarm: live accuracy is below 0.9" in said
    assert "looks in a row found drift" in said
    assert "new holdout: accuracy" in said
    assert "version 1.1: settled" in said
    assert "TorchServe has ended." in said
    page = (tmp_path / "story.html").read_text(encoding="utf-8")
    assert "the first answer by 1.1" in page
    assert page.count("<img") >= 9
