"""What the machine tells a worker, read once.

The archive's `model-config.yaml` may say `handler: {threads: 2, metrics: off, wire: off, capture: 0.1}`; the variables
`MARWRIGHT_THREADS`, `MARWRIGHT_METRICS` and so on beat it. Nothing said means one thread, whatever OMP_NUM_THREADS or
the number of cores would have meant, metrics, the lean wire codec, and no capture. Where the spool is, and how large it
may grow, is the machine's alone to say: no path of a machine is in an archive, and without a spool nothing is ever
captured.

    settings = WorkerSettings.read(os.environ, context.model_yaml_config)
    settings.apply()
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from handlers.errors import LoadError


@dataclass(frozen=True)
class WorkerSettings:
    """Run-time settings of one worker process."""

    threads: int = 1
    """Threads that one forward pass may use; 1 to 1024."""
    metrics: bool = True
    """Whether this worker counts what it does."""
    wire: bool = True
    """Whether the lean codec of `handlers.wire` may take the place of TorchServe's own."""
    capture: float = 0.0
    """Share of the predict requests that are written to the spool; 0 to 1."""
    capture_bodies: bool = True
    """Whether their bodies are written; else their sha256 alone."""
    capture_redact: str = ""
    """`module:function` that is given each body, and its content type, before it is written; see `handlers.capture`."""
    capture_seed: int = 0
    """The same request id and the same seed are the same decision, in every worker."""
    spool: Path | None = None
    """Absolute; without it nothing is captured."""
    spool_mb: int = 1024
    """Megabytes (2²⁰ bytes) of the spool, beyond which nothing is added to it."""
    spool_hours: float = 168.0
    """Age at which a captured request that nobody took is removed; labels are never."""

    @property
    def captures(self) -> bool:
        """Whether this worker captures anything."""
        return self.spool is not None and self.capture > 0

    @classmethod
    def read(cls, environ: Mapping[str, str], model_config: Mapping[str, Any] | None) -> WorkerSettings:
        """`LoadError` names the variable or key with an unusable value, and any key that is not known."""
        section = (model_config or {}).get("handler") or {}
        if not isinstance(section, Mapping):
            raise LoadError(f"model-config.yaml: handler is {section!r}; expected a table such as {{threads: 1}}")
        unknown = sorted(str(key) for key in section if key not in _READERS)
        if unknown:
            known = ", ".join(_READERS)
            raise LoadError(f"model-config.yaml: handler has unknown keys {', '.join(unknown)}; known: {known}")
        given: dict[str, Any] = {}
        for key, reader in (_READERS | _OF_THE_MACHINE).items():
            variable = f"MARWRIGHT_{key.upper()}"
            if environ.get(variable):
                given[key] = reader(environ[variable], variable)
            elif section.get(key) is not None:
                given[key] = reader(section[key], f"model-config.yaml: handler.{key}")
        return cls(**given)

    def apply(self) -> None:
        """Set torch's thread pools. ONNX Runtime is given `threads` when a session is made."""
        torch.set_num_threads(self.threads)
        # Once in a process, and before any work. Too late is harmless: no net here runs operators side by side.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(self.threads)


def _whole(low: int, high: int) -> Callable[[object, str], int]:
    def read(value: object, name: str) -> int:
        try:
            number = int(str(value))
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise LoadError(f"{name} is {value!r}; allowed: a whole number from {low} to {high}")
        return number

    return read


def _number(low: float, high: float) -> Callable[[object, str], float]:
    def read(value: object, name: str) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise LoadError(f"{name} is {value!r}; allowed: a number from {low:g} to {high:g}")
        return number

    return read


def _switch(value: object, name: str) -> bool:
    """YAML reads a bare on or off as true or false."""
    word = str(value).lower()
    if word not in ("on", "off", "true", "false"):
        raise LoadError(f"{name} is {value!r}; allowed: on, off, true and false")
    return word in ("on", "true")


def _function(value: object, name: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise LoadError(f"{name} is {value!r}; allowed: module:function")
    return value


def _folder(value: object, name: str) -> Path:
    """A worker's working directory is its own unpacked archive, which goes with it."""
    folder = Path(str(value))
    if not folder.is_absolute():
        raise LoadError(f"{name} is {value!r}; allowed: an absolute path")
    return folder


_READERS: dict[str, Callable[[object, str], Any]] = {
    "threads": _whole(1, 1024),
    "metrics": _switch,
    "wire": _switch,
    "capture": _number(0.0, 1.0),
    "capture_bodies": _switch,
    "capture_redact": _function,
}
_OF_THE_MACHINE: dict[str, Callable[[object, str], Any]] = {
    "capture_seed": _whole(0, 2**63 - 1),
    "spool": _folder,
    "spool_mb": _whole(1, 2**30),
    "spool_hours": _number(0.0, 1e6),
}
"""By variable alone."""
