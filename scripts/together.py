"""`marwright train --nproc 2`: the same command in several processes, by torchrun.

torchrun's agent runs in this process. It starts the others, and all of them again from the last whole epoch when one is
lost; Ctrl-C and SIGTERM stop them all. On one machine they meet in a folder and talk over loopback: no port is opened
to the network. On several, torchrun's own options say where they meet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from marwright import files
from marwright.errors import MarwrightError, RunError, SettingsError
from marwright.learning import distributed
from marwright.settings import TrainSettings

RESTARTS = 3
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PARENTS = ("nproc", "torchrun")
"""Options that are not handed on."""


def wanted(settings: TrainSettings) -> bool:
    """Whether this process is to start others; one that torchrun has started is not."""
    return (settings.nproc > 1 or bool(settings.torchrun)) and "TORCHELASTIC_RUN_ID" not in os.environ


def launch(settings: TrainSettings) -> int:
    """Start them and wait for all. What one of them refused is raised here; so is Ctrl-C."""
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if settings.nproc < 1:
        raise SettingsError(f"--nproc is {settings.nproc}", hint="one process or more")
    if torch.cuda.is_available() and settings.nproc > torch.cuda.device_count():
        raise SettingsError(
            f"--nproc is {settings.nproc}, and this machine has {torch.cuda.device_count()} CUDA devices",
            hint="one process for each device",
        )
    with tempfile.TemporaryDirectory(prefix="marwright-train-") as name, _handlers_kept(), _environment(settings, name):
        words = [*_options(settings, Path(name)), "--module", "scripts", "train", *_words(settings)]
        try:
            arguments = run.parse_args(words)  # type: ignore[no-untyped-call]
        except SystemExit:
            raise SettingsError(f"torchrun does not take {settings.torchrun!r}", hint="see `torchrun --help`") from None
        try:
            run.run(arguments)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            _raise_refused(Path(name))
            rank, failure = error.get_first_failure()
            how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            raise RunError(
                f"training by {settings.nproc} processes ended after {arguments.max_restarts} restarts: "
                f"process {rank} ended with {how}",
                hint="the same command goes on from the last whole epoch",
            ) from None
        except RendezvousError as error:
            raise RunError(
                f"the processes did not meet: {str(error) or type(error).__name__}",
                hint="all machines need the same --rdzv-endpoint, and --nnodes of them must be started",
            ) from None
        except (ValueError, AssertionError) as error:
            if not settings.torchrun:
                raise
            raise SettingsError(
                f"torchrun does not take {settings.torchrun!r}: {error}", hint="see `torchrun --help`"
            ) from None
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + int(stop.sigval)) from None
        _raise_refused(Path(name))
    return 0


@contextlib.contextmanager
def told_to_the_parent() -> Iterator[None]:
    """An expected failure is not tried again by torchrun: it is written down, and this process ends well. So do the
    others, who lose their connection to it."""
    where = os.environ.get(distributed.MEETING)
    try:
        yield
    except MarwrightError as error:
        if where is None:
            raise
        said = {"message": error.message, "hint": error.hint, "usage": isinstance(error, SettingsError)}
        files.write_json(Path(where) / f"refused-{os.environ['RANK']}.json", said)
    except Exception:
        if where is None or not _refused(Path(where)):
            raise


def _refused(folder: Path) -> list[Path]:
    return sorted(folder.glob("refused-*.json"))


def _raise_refused(folder: Path) -> None:
    """What a process has written down, if any has."""
    for path in _refused(folder):
        said = json.loads(path.read_text(encoding="utf-8"))
        kind = SettingsError if said["usage"] else RunError
        raise kind(said["message"], hint=said["hint"])


def _options(settings: TrainSettings, folder: Path) -> list[str]:
    """torchrun's. What the user says comes last, and wins."""
    ours = [f"--nproc-per-node={settings.nproc}", f"--max-restarts={RESTARTS}", "--monitor-interval=0.2"]
    ours += ["--rdzv-backend=c10d", f"--rdzv-id=marwright-{Path(settings.recipe).stem}"]
    if not settings.torchrun:
        ours += ["--rdzv-conf=store_type=file", f"--rdzv-endpoint={folder / 'meeting'}", "--local-addr=127.0.0.1"]
    return ours + shlex.split(settings.torchrun)


def _words(settings: TrainSettings) -> list[str]:
    """The command line that gives the same settings."""
    words: list[str] = []
    for one in dataclasses.fields(settings):
        value, name = getattr(settings, one.name), one.name.replace("_", "-")
        if value == one.default or one.name in PARENTS:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


@contextlib.contextmanager
def _environment(settings: TrainSettings, folder: str) -> Iterator[None]:
    """What the processes inherit, for as long as they run. One machine: loopback and a folder; no port."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // settings.nproc)
    changed = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONUNBUFFERED": "1",
        distributed.STARTED: folder,
    }
    if not settings.torchrun:
        changed |= {
            distributed.MEETING: folder,
            "GLOO_SOCKET_IFNAME": _loopback(),
            "NCCL_SOCKET_IFNAME": _loopback(),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _loopback() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """torchrun's agent sets signal handlers and leaves them."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
