"""A fresh checkout as a user has it, in a folder of its own, on ports of its own, without a second installation.

    with checkout.fresh() as project:
        project.make("serve")
        project.shell("make archive && torchserve --start")        # after `source .venv/bin/activate`

The virtual environment in it is a real one; only the heavy packages are borrowed from the environment that runs the
tests, by a .pth file. `java` and compilers are not on its PATH.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
HIDDEN = ("java", "javac", "gcc", "g++", "cc", "c++", "clang")
SECONDS = 300


@dataclass(frozen=True)
class Project:
    """A checkout in `root`; its server's sockets and pid file are in `temp`."""

    root: Path
    temp: Path
    path: str
    """PATH without java and compilers."""

    def make(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`make …`, as typed."""
        return self.shell("make " + " ".join(words), activated=False, check=check)

    def shell(self, line: str, *, activated: bool = True, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One line in a shell, after `source .venv/bin/activate` unless told otherwise; stdout has both outputs."""
        kept = ("HOME", "LANG", "LC_ALL", "USER")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {"PATH": self.path, "TMPDIR": str(self.temp), "TEMP": str(self.temp), "COLUMNS": "120"}
        # What mypy found of the same files before it need not find once more.
        environment |= {"MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}
        log = self.root / "shell.log"
        with log.open("w+", encoding="utf-8") as output:
            # A file and not a pipe: a server that is started here keeps the caller's stdout open.
            done = subprocess.run(
                ["bash", "-c", f"{'source .venv/bin/activate && ' if activated else ''}{line}"],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )
            output.seek(0)
            text = output.read()
        if check:
            assert done.returncode == 0, f"{line}: exit {done.returncode}\n{text}"
        return subprocess.CompletedProcess(line, done.returncode, text, "")

    @property
    def store(self) -> Path:
        return self.root / "model_store"


@contextlib.contextmanager
def fresh(name: str = "checkout") -> Iterator[Project]:
    """The tracked files of this checkout, a venv, free ports; whatever server runs at the end is stopped."""
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        root, temp, tools = Path(folder) / name, Path(folder) / "t", Path(folder) / "bin"
        temp.mkdir()
        _copy(root)
        _ports(root / "config.properties")
        _environment(root / ".venv")
        project = Project(root, temp, _path_without(HIDDEN, tools))
        try:
            yield project
        finally:
            project.shell("marwright stop", check=False)


def _copy(root: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)


def _ports(config: Path) -> None:
    """Free ports in place of the usual ones."""
    text = config.read_text(encoding="utf-8")
    with contextlib.ExitStack() as stack:
        for usual in ("8080", "8081", "8082", "7070", "7071"):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            text, count = re.subn(rf"(?<=[:=]){usual}\b", str(listener.getsockname()[1]), text)
            assert count == 1, f"port {usual} is named {count} times in config.properties"
    config.write_text(text, encoding="utf-8")


def _environment(folder: Path) -> None:
    """A venv that sees the packages of the running one, with their commands, and this checkout's own code first."""
    venv.create(folder, with_pip=False, symlinks=True)
    ours, theirs = folder / "bin", Path(sys.executable).parent
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    for command in sorted(theirs.iterdir()):
        target = ours / command.name
        if target.exists() or not command.is_file():
            continue
        with command.open("rb") as stream:
            first, rest = stream.readline(), stream.read()
        if first.startswith(b"#!") and b"python" in first:
            # Not `#!…/python`: the path may hold spaces. To a shell the second line is exec, to Python a string.
            python = str(ours / "python").encode()
            target.write_bytes(b"#!/bin/sh\n'''exec' \"" + python + b'" "$0" "$@"\n\' \'\'\'\n' + rest)
            target.chmod(0o755)
        elif not command.name.startswith("python"):
            target.symlink_to(command.resolve())


def _path_without(commands: tuple[str, ...], tools: Path) -> str:
    """PATH, with folders that hold one of `commands` replaced by folders of links to everything else in them."""
    kept = []
    for number, folder in enumerate(os.environ["PATH"].split(os.pathsep)):
        here = Path(folder)
        if not here.is_dir():
            continue
        if not any((here / command).exists() for command in commands):
            kept.append(folder)
            continue
        replacement = tools / str(number)
        replacement.mkdir(parents=True)
        for entry in here.iterdir():
            if entry.name not in commands and not re.search(r"(gcc|g\+\+|clang|java)[-0-9.]*$", entry.name):
                (replacement / entry.name).symlink_to(entry)
        kept.append(str(replacement))
    return os.pathsep.join(kept)
