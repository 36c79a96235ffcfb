"""What the machine tells a worker, read once.

The archive's `model-config.yaml` may say `handler: {threads: 2, metrics: off}`; the variables `MARWRIGHT_THREADS` and
`MARWRIGHT_METRICS` beat it. Nothing said means one thread, whatever OMP_NUM_THREADS or the number of cores would have
meant, and metrics.

    settings = WorkerSettings.read(os.environ, context.model_yaml_config)
    settings.apply()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
        for key, reader in _READERS.items():
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


def _threads(value: object, name: str) -> int:
    try:
        threads = int(str(value))
    except ValueError:
        threads = 0
    if not 1 <= threads <= 1024 or isinstance(value, bool):
        raise LoadError(f"{name} is {value!r}; allowed: a whole number from 1 to 1024")
    return threads


def _switch(value: object, name: str) -> bool:
    """YAML reads a bare on or off as true or false."""
    word = str(value).lower()
    if word not in ("on", "off", "true", "false"):
        raise LoadError(f"{name} is {value!r}; allowed: on, off, true and false")
    return word in ("on", "true")


_READERS: dict[str, Callable[[object, str], Any]] = {"threads": _threads, "metrics": _switch}
