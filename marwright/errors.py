"""Every error that Marwright raises on purpose.

An error says what happened (`message`), which thing it happened to, and what to type next (`hint`). Only
`marwright.cli` catches them and turns them into exit codes; everything else lets them pass.

    MarwrightError
    ├── SettingsError                an option or a key of a recipe: value, what is allowed
    ├── DataError                    path or name; hint: which data set works offline
    ├── RunError                     which file of which run is missing, or from another step
    ├── ExportError ── ParityError   max |Δ|, allowed, worst input
    ├── ArchiveError ── ArchiveExists · ArchiveInvalid(issues: all of them at once)
    ├── ServerError ── ServerUnreachable · ServerRefused(status, TorchServe's own words) · NotReady(last words)
    └── RolloutError ── IdentityMismatch(expected, serving) · Circumstance · RolledBack(reason)
"""

from __future__ import annotations

from collections.abc import Sequence


class MarwrightError(Exception):
    """What happened, and in `hint` what to type next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class SettingsError(MarwrightError):
    """An option, a recipe or a configuration file says something that is not allowed."""


class DataError(MarwrightError):
    """The examples cannot be had, or cannot be learned from."""


class RunError(MarwrightError):
    """A run folder lacks a file, or holds one from another step."""


class ExportError(MarwrightError):
    """A checkpoint cannot become an artifact of the wanted format."""


class ParityError(ExportError):
    """The artifact answers something else than the eager net."""

    def __init__(self, message: str, *, difference: float, allowed: float, worst: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.difference = difference
        self.allowed = allowed
        self.worst = worst


class ArchiveError(MarwrightError):
    """A `.mar` cannot be built or read."""


class ArchiveExists(ArchiveError):
    """That version is there already; archives are never overwritten."""


class ArchiveInvalid(ArchiveError):
    """An archive has faults: `issues` lists all of them."""

    def __init__(self, message: str, issues: Sequence[str], *, hint: str = "") -> None:
        super().__init__("\n".join([message, *(f"  - {issue}" for issue in issues)]), hint=hint)
        self.issues = tuple(issues)


class ServerError(MarwrightError):
    """TorchServe, or the way to it, failed."""


class ServerUnreachable(ServerError):
    """Nobody answers at the configured address, or not in time."""


class ServerRefused(ServerError):
    """TorchServe or a handler answered with a refusal: `status` (HTTP), `reason` (its own words)."""

    def __init__(self, message: str, *, status: int, reason: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.reason = reason


class NotReady(ServerError):
    """A server, a model or a worker did not become ready: `last_words` is what the worker itself said last."""

    def __init__(self, message: str, *, last_words: str = "", hint: str = "") -> None:
        super().__init__(f"{message}\n{last_words}".rstrip(), hint=hint)
        self.last_words = last_words


class RolloutError(MarwrightError):
    """The released version cannot be changed in the way that was asked."""


class IdentityMismatch(RolloutError):
    """What answers is not what was released."""

    def __init__(self, message: str, *, expected: str, serving: str, hint: str = "") -> None:
        super().__init__(f"{message}: expected {expected}, serving {serving}", hint=hint)
        self.expected = expected
        self.serving = serving


class Circumstance(RolloutError):
    """A rollout cannot go on for a reason that says nothing about the version: it may be tried again."""


class RolledBack(RolloutError):
    """A new version did not prove itself; the one before it answers, and was never left without workers."""

    def __init__(self, message: str, *, reason: str, hint: str = "") -> None:
        super().__init__(f"{message}: {reason}", hint=hint)
        self.reason = reason
