"""The process: every way in which a start or a stop can go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from marwright.errors import NotReady, ServerRefused, SettingsError
from marwright.release import processes
from marwright.release.server import Expected, Server
from tests import torchserve

pytestmark = pytest.mark.server


def test_stop_leaves_nothing_and_after_a_kill_the_next_start_cleans_up(tmp_path: Path) -> None:
    archive = torchserve.write_archive(tmp_path / "store", "echo", "1.0")
    with torchserve.home(tmp_path, {"echo": Expected("1.0")}, archives=[archive]) as home:
        running = home.bring_up()
        family = [running.process, *processes.children(running.process)]
        assert len(family) > 1
        with home.client() as client:
            assert client.predict("echo", b"x").version == "1.0"
        assert home.server.stop(timeout=20)
        assert all(processes.ended(process) for process in family)
        assert not home.key_file.exists()
        assert not home.server.pid_file.exists()
        assert not list(home.temp.glob(".ts.sock.*"))
        assert not list((home.temp / "models").iterdir())
        assert processes.busy(home.config.ports) == {}
        assert not home.server.stop()

        running = home.bring_up()
        workers = processes.children(running.process)
        old_key = home.key_file.read_text()
        os.kill(running.pid, signal.SIGKILL)
        assert processes.wait_ended([running.process], 10) == []
        assert home.server.find() is None
        done = home.server.clean_after_crash()
        assert "removed an old key_file.json" in done
        assert any("stale" in line for line in done)
        assert all(processes.ended(worker) for worker in workers)
        assert not list((home.temp / "models").iterdir())
        home.release()
        home.server.bring_up({})
        assert home.key_file.read_text() != old_key


def test_ctrl_c_while_starting_leaves_no_server(tmp_path: Path) -> None:
    handler = torchserve.ECHO.replace("self.model = ", "time.sleep(60)\n        self.model = ", 1)
    archive = torchserve.write_archive(tmp_path / "store", "slow", "1.0", handler=handler)
    program = (
        "import sys; from pathlib import Path; from marwright.release.server import *;"
        "serving, home, temp = map(Path, sys.argv[1:]);"
        "server = Server(serving, home=home, temp=temp);"
        "server.bring_up({'slow': Expected('1.0')}, progress=lambda state: print(state, flush=True))"
    )
    with torchserve.home(tmp_path, {}, archives=[archive]) as home:
        starting = subprocess.Popen(
            [sys.executable, "-c", program, str(home.server.serving), str(home.folder), str(home.temp)],
            cwd=torchserve.PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert starting.stdout is not None
        assert "TorchServe is starting" in starting.stdout.readline()
        running = home.server.find()
        assert running is not None
        starting.send_signal(signal.SIGINT)
        _, errors = starting.communicate(timeout=40)
        assert "KeyboardInterrupt" in errors
        assert processes.ended(running.process)
        assert home.server.find() is None


def test_without_tokens_and_model_api_calls_need_no_key_and_changes_are_refused(tmp_path: Path) -> None:
    settings = {"disable_token_authorization": "true", "enable_model_api": "false"}
    archive = torchserve.write_archive(tmp_path / "store", "echo", "1.0")
    with torchserve.home(tmp_path, {}, settings=settings) as home:
        home.bring_up()
        assert not home.key_file.exists()
        with home.client() as client:
            assert client.models() == client.models_grpc() == {}
            for register in (client.register, client.register_grpc):
                with pytest.raises(ServerRefused) as caught:
                    register(archive)
                assert caught.value.status == 405
                assert "enable_model_api=true" in caught.value.hint


def test_file_names_reach_java_as_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchserve.write_config(tmp_path / "config.properties", {})
    server = Server(tmp_path / "config.properties", home=tmp_path, temp=tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    monkeypatch.setattr("locale.getencoding", lambda: "ANSI_X3.4-1968")
    environment = server._environment()
    assert environment["LC_ALL"] == "C.UTF-8"
    assert "PYTHONPATH" not in environment
    assert Path(environment["JAVA_HOME"], "bin", "java").is_file()
    assert environment["TMPDIR"] == environment["TEMP"] == str(tmp_path)


def test_a_server_that_lost_its_pid_file_is_found_and_not_started_twice(echo_home: torchserve.Home) -> None:
    recorded = echo_home.server.pid_file.read_text()
    echo_home.server.pid_file.unlink()
    try:
        found = echo_home.server.find()
        assert found is not None
        assert found.pid == int(recorded)
        assert found.home == echo_home.folder
        assert echo_home.bring_up().pid == found.pid
    finally:
        echo_home.server.pid_file.write_text(recorded)


def test_plain_torchserve_finds_what_we_started_and_stops_it(tmp_path: Path) -> None:
    with torchserve.home(tmp_path, {}) as home:
        running = home.bring_up()
        stop = subprocess.run(
            [sys.executable, str(Path(sys.executable).parent / "torchserve"), "--stop"],
            cwd=home.folder,
            env=os.environ | {"TMPDIR": str(home.temp), "TEMP": str(home.temp)},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert "TorchServe has stopped." in stop.stdout
        assert processes.wait_ended([running.process], 20) == []
        assert home.server.find() is None


def test_a_temp_folder_that_another_torchserve_uses_is_refused(echo_home: torchserve.Home, tmp_path: Path) -> None:
    torchserve.write_config(tmp_path / "config.properties", {})
    other = Server(tmp_path / "config.properties", home=tmp_path, temp=echo_home.temp)
    assert other.find() is None
    assert not other.stop()
    with pytest.raises(NotReady, match="another TorchServe"):
        other.bring_up({})
    assert echo_home.server.find() is not None


def test_a_broken_handler_fails_in_seconds_with_the_workers_own_words(tmp_path: Path) -> None:
    archive = torchserve.write_archive(tmp_path / "store", "broken", "1.0", handler="import no_such_library\n")
    with torchserve.home(tmp_path, {"broken": Expected("1.0")}, archives=[archive]) as home:
        began = time.monotonic()
        with pytest.raises(NotReady) as caught:
            home.bring_up()
        assert time.monotonic() - began < 60
        assert caught.value.last_words == "ModuleNotFoundError: No module named 'no_such_library'"
        assert home.server.find() is None


def test_a_failing_initialize_is_told_in_seconds_with_its_cause(tmp_path: Path) -> None:
    statements = {
        "a_b-c": ("raise RuntimeError('the digests differ')", "RuntimeError: the digests differ"),
        "torn": ("raise ValueError('bundle is torn') from KeyError('x')", "ValueError: bundle is torn"),
        "silent": ("import os; os._exit(7)", "model_name: silent"),
    }
    expected = {model: Expected("1.0") for model in statements}
    archives = [
        torchserve.write_archive(
            tmp_path / "store",
            model,
            "1.0",
            handler=torchserve.ECHO.replace("self.model = ", f"{statement}\n        self.model = ", 1),
        )
        for model, (statement, _) in statements.items()
    ]
    with torchserve.home(tmp_path, expected, archives=archives) as home:
        began = time.monotonic()
        home.server.start()
        for model, (_, words) in statements.items():
            with pytest.raises(NotReady, match=f"worker of {model} 1.0 cannot start") as caught:
                home.server.wait_ready({model: expected[model]}, timeout=60)
            assert words in caught.value.last_words
        assert time.monotonic() - began < 60


def test_a_missing_archive_fails_in_seconds_with_the_servers_own_words(tmp_path: Path) -> None:
    with torchserve.home(tmp_path, {"gone": Expected("1.0")}, archives=["gone-1.0.mar"]) as home:
        began = time.monotonic()
        with pytest.raises(NotReady) as caught:
            home.bring_up()
        assert time.monotonic() - began < 60
        assert "gone-1.0.mar" in caught.value.last_words


def test_a_port_that_somebody_holds_is_named_with_its_holder(tmp_path: Path) -> None:
    with torchserve.home(tmp_path, {}) as home, socket.socket() as holder:
        port = home.config.ports["grpc_inference_port"]
        holder.bind(("127.0.0.1", port))
        holder.listen()
        with pytest.raises(NotReady) as caught:
            home.server.clean_after_crash(wait=0.5)
        assert f"grpc_inference_port {port} is held by process {os.getpid()}" in caught.value.last_words


def test_the_servers_own_words_name_a_port_that_was_taken_meanwhile(tmp_path: Path) -> None:
    with torchserve.home(tmp_path, {}) as home, socket.socket() as holder:
        holder.bind(("127.0.0.1", home.config.ports["management_address"]))
        holder.listen()
        home.server.start()
        with pytest.raises(NotReady, match="ended while it was starting") as caught:
            home.server.wait_ready({}, timeout=30)
        assert "bind" in caught.value.last_words


def test_the_lock_lets_one_start_at_a_time(tmp_path: Path) -> None:
    server = Server(tmp_path / "serving.properties", home=tmp_path)
    told: list[str] = []
    order: list[str] = []

    def second() -> None:
        with server.lock(tmp_path / ".start.lock", timeout=10, progress=told.append):
            order.append("second")

    with server.lock(tmp_path / ".start.lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert len(told) == 1


def test_a_lock_held_for_too_long_is_an_error(tmp_path: Path) -> None:
    server = Server(tmp_path / "serving.properties", home=tmp_path)
    with server.lock(tmp_path / ".start.lock"), pytest.raises(NotReady, match="another command"):  # noqa: SIM117
        with Server(tmp_path / "x", home=tmp_path).lock(tmp_path / ".start.lock", timeout=0.2):
            pass


def test_a_temp_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    torchserve.write_config(tmp_path / "config.properties", {})
    server = Server(tmp_path / "config.properties", home=tmp_path, temp=tmp_path / ("x" * 100))
    with pytest.raises(SettingsError, match="107 is the limit"):
        server.start()


def test_nothing_of_others_is_swept(tmp_path: Path) -> None:
    kept = tmp_path / "models" / ("0" * 32)
    kept.mkdir(parents=True)
    (kept / "notes.txt").write_text("not an archive")
    named = tmp_path / "models" / "mine" / "MAR-INF"
    named.mkdir(parents=True)
    (named / "MANIFEST.json").write_text(json.dumps({}))
    used = tmp_path / "models" / ("1" * 32)
    (used / "MAR-INF").mkdir(parents=True)
    (used / "MAR-INF" / "MANIFEST.json").write_text("{}")
    leaked = tmp_path / "models" / ("2" * 32)
    (leaked / "MAR-INF").mkdir(parents=True)
    (leaked / "MAR-INF" / "MANIFEST.json").write_text("{}")
    inside = psutil.Popen([sys.executable, "-c", "input()"], cwd=used, stdin=subprocess.PIPE)
    try:
        processes.sweep(tmp_path)
    finally:
        inside.communicate(b"\n", timeout=10)
    assert kept.is_dir()
    assert named.is_dir()
    assert used.is_dir()
    assert not leaked.exists()
