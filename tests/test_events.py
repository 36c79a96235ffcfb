"""The main job as a user does it, in a fresh checkout, against the real TorchServe: every row of the event table.

The tests run in order on one checkout, because each row of the table begins where another ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import checkout
from tests.checkout import Project

pytestmark = pytest.mark.server

QUICK = "EPOCHS=2"
"""Two epochs are enough for an archive; the seed makes it another one."""
LENIENT = """
[shadow]
min_agreement = 0.0
[gate]
margin = 0.99
max_class_drop = 1.0
max_ece_rise = 1.0
[watch]
seconds = 1.0
"""
"""Nets of two epochs differ by more than any sensible policy allows."""


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    with checkout.fresh("a check out") as project:
        yield project


def journal(project: Project) -> list[tuple[str, str, dict[str, object]]]:
    """(version, event, detail), oldest first, read without the code under test."""
    with sqlite3.connect(project.store / "journal.db") as database:
        rows = database.execute("select version, event, detail from entries order by number").fetchall()
    return [(version, event, json.loads(detail)) for version, event, detail in rows]


def answering(project: Project) -> str:
    """The version that answers a plain prediction."""
    return str(json.loads(project.shell("marwright predict golden.png --json").stdout.splitlines()[-1])["version"])


def jvm(project: Project) -> psutil.Process:
    return psutil.Process(int((project.temp / ".model_server.pid").read_text()))


def built(project: Project) -> list[str]:
    return sorted(path.name for path in project.store.glob("*.mar"))


def test_first_archive_is_released_unproven(project: Project) -> None:
    said = project.make("archive", QUICK).stdout
    assert "built model_store/digits-1.0.mar" in said
    assert " kB of it for explanations" in said
    assert "1.0 will answer at the next start" in said
    assert [(version, event) for version, event, _ in journal(project)] == [("1.0", "archived"), ("1.0", "released")]
    assert journal(project)[-1][2]["proven"] is False
    assert "load_models=digits-1.0.mar\n" in (project.store / "serving.properties").read_text()
    run = next(path for path in (project.root / "runs").glob("digits-*"))
    (project.root / "golden.png").write_bytes(sorted((run / "golden").glob("*.png"))[0].read_bytes())


def test_same_run_again_is_no_new_version(project: Project) -> None:
    before = (project.store / "digits-1.0.mar").stat().st_mtime_ns
    assert "unchanged: digits-1.0.mar" in project.make("archive", QUICK).stdout
    assert built(project) == ["digits-1.0.mar"]
    assert (project.store / "digits-1.0.mar").stat().st_mtime_ns == before


def test_second_archive_with_the_server_stopped_will_answer(project: Project) -> None:
    said = project.make("archive", QUICK, "SEED=1").stdout
    assert "1.1 will answer at the next start (was 1.0)" in said
    assert "load_models=digits-1.1.mar\n" in (project.store / "serving.properties").read_text()


def test_archive_and_plain_torchserve_answer_the_released_version(project: Project) -> None:
    project.shell(f"make archive {QUICK} SEED=1 && torchserve --start")
    deadline = time.monotonic() + 60
    while True:
        done = project.shell("marwright predict golden.png --json", check=False)
        if done.returncode == 0:
            break
        assert time.monotonic() < deadline, done.stdout
        time.sleep(0.5)
    assert answering(project) == "1.1"
    assert "digits-1.1.mar" in project.make("status").stdout or "1.1" in project.make("status").stdout


def test_an_archive_with_the_server_running_is_only_built(project: Project) -> None:
    said = project.make("archive", QUICK, "SEED=2").stdout
    assert "built model_store/digits-1.2.mar" in said
    assert "1.1 still answers: `make rollout`, or `make release VERSION=1.2` without proof" in said
    assert answering(project) == "1.1"


def test_serve_while_running_checks_and_retrains_nothing(project: Project) -> None:
    runs = sorted((project.root / "runs").glob("digits-*"))
    times = [(run / "weights.pt").stat().st_mtime_ns for run in runs]
    pid = jvm(project).pid
    said = project.make("serve", QUICK, "SEED=1").stdout
    assert "1.1" in said
    assert jvm(project).pid == pid
    assert sorted((project.root / "runs").glob("digits-*")) == runs
    assert [(run / "weights.pt").stat().st_mtime_ns for run in runs] == times


def test_predict_over_grpc_answers_the_same(project: Project) -> None:
    rest = json.loads(project.shell("marwright predict golden.png --json").stdout.splitlines()[-1])
    grpc = json.loads(project.shell("marwright predict golden.png --grpc --json").stdout.splitlines()[-1])
    assert grpc == rest
    assert "over gRPC" in project.make("predict", "IMAGE=golden.png", "GRPC=1").stdout


def test_curl_with_the_printed_token_is_answered(project: Project) -> None:
    config = (project.root / "config.properties").read_text()
    url = next(line.split("=", 1)[1] for line in config.splitlines() if line.startswith("inference_address"))
    said = project.shell(
        f'curl -sS -m 20 -H "Authorization: Bearer $(marwright token)" -T golden.png {url}/predictions/digits'
    )
    assert len(json.loads(said.stdout)) == 5


def test_stop_returns_when_the_server_has_ended(project: Project) -> None:
    process = jvm(project)
    workers = process.children(recursive=True)
    assert workers
    project.make("stop")
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in [process, *workers])
    assert not (project.root / "key_file.json").exists()
    assert "not running" in project.make("stop").stdout


def test_plain_start_later_answers_what_the_journal_says(project: Project) -> None:
    """1.2 is newer and in the store; 1.1 is released; snapshots of the last run lie in logs/config."""
    assert built(project) == ["digits-1.0.mar", "digits-1.1.mar", "digits-1.2.mar"]
    project.shell("torchserve --start")
    project.make("serve", QUICK, "SEED=1")
    assert answering(project) == "1.1"


def test_release_without_proof_switches_the_running_server_and_stays_in_the_journal(project: Project) -> None:
    said = project.make("release", "VERSION=1.2").stdout
    assert "1.2 answers now (was 1.1)" in said
    assert answering(project) == "1.2"
    version, event, detail = journal(project)[-1]
    assert (version, event, detail["proven"]) == ("1.2", "released", False)


def test_serve_after_a_crash_cleans_up_and_answers_the_released_version(project: Project) -> None:
    process = jvm(project)
    workers = process.children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs([process, *workers], timeout=20)
    leaked = list((project.temp / "models").iterdir())
    assert leaked
    keys = (project.root / "key_file.json").read_text()
    assert int((project.temp / ".model_server.pid").read_text()) == process.pid
    said = project.make("serve", QUICK, "SEED=2").stdout
    record = json.loads((project.store / "digits-1.2.json").read_text())
    assert record["bundle"] in said
    assert answering(project) == "1.2"
    assert not any(folder.exists() for folder in leaked)
    assert (project.root / "key_file.json").read_text() != keys
    assert jvm(project).pid != process.pid


def test_serve_refuses_a_released_archive_that_was_changed(project: Project) -> None:
    project.make("stop")
    path = project.store / "digits-1.2.mar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = project.make("serve", QUICK, "SEED=2", check=False)
    assert done.returncode != 0
    assert "is not the file that was built" in done.stdout
    path.write_bytes(whole)


def test_serve_names_who_holds_a_port(project: Project) -> None:
    config = (project.root / "config.properties").read_text()
    port = next(line.rsplit(":", 1)[1] for line in config.splitlines() if line.startswith("management_address"))
    with socket.create_server(("127.0.0.1", int(port))):
        done = project.make("serve", QUICK, "SEED=2", check=False)
    assert done.returncode != 0
    assert f"management_address {port} is held by process {os.getpid()}" in done.stdout


def test_a_start_that_fails_ends_in_seconds_with_the_workers_own_words(project: Project) -> None:
    began = time.monotonic()
    line = "MARWRIGHT_THREADS=many marwright serve --epochs 2 --seed 2"
    done = project.shell(line, check=False)
    assert done.returncode == 1
    assert "a worker of digits 1.2 cannot start" in done.stdout
    assert "MARWRIGHT_THREADS" in done.stdout
    assert "model_log.log" in done.stdout
    assert time.monotonic() - began < 120, "TorchServe itself tries for 300 s"
    assert "not running" in project.make("stop").stdout, "nothing half-started is left"


def test_stop_works_with_a_broken_configuration(project: Project) -> None:
    config = project.root / "config.properties"
    text = config.read_text()
    config.write_text("inference_address=nonsense\n")
    assert "not running" in project.make("stop").stdout
    config.write_text(text)


def test_rollout_proves_a_version_before_it_answers(project: Project) -> None:
    project.make("serve", QUICK, "SEED=2")
    (project.root / "lenient.toml").write_text(LENIENT, encoding="utf-8")
    said = project.make("rollout", "VERSION=1.1", "POLICY=lenient.toml").stdout
    assert "golden examples answered rightly over REST and gRPC" in said
    assert "digits 1.1 answers now (was 1.2)" in said
    assert answering(project) == "1.1"
    version, event, detail = [entry for entry in journal(project) if entry[1] != "rollout"][-1]
    assert (version, event, detail["proven"]) == ("1.1", "released", True)
    assert "load_models=digits-1.1.mar\n" in (project.store / "serving.properties").read_text()


def test_after_a_proven_rollout_an_archive_is_only_built_even_while_stopped(project: Project) -> None:
    project.make("stop")
    said = project.make("archive", QUICK, "SEED=3").stdout
    assert "1.1 still answers: `make rollout`, or `make release VERSION=1.3` without proof" in said
    assert "load_models=digits-1.1.mar\n" in (project.store / "serving.properties").read_text()


def test_a_stale_serving_file_is_made_again_by_any_command(project: Project) -> None:
    serving = project.store / "serving.properties"
    right = serving.read_text()
    serving.write_text("load_models=all\n")
    project.make("status")
    assert serving.read_text() == right


def test_clean_leaves_store_journal_and_runs(project: Project) -> None:
    def kept() -> set[Path]:
        return {path for name in ("model_store", "runs") for path in (project.root / name).rglob("*")}

    before = kept()
    project.make("clean")
    assert kept() == before
