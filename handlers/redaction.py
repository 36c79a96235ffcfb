"""A function of somebody else's that sees a captured body before any disk does.

    redaction = Redaction("faces:blurred")
    redaction.load()
    kept = redaction(body, "image/jpeg")        # bytes, or None: nothing of the body is to be kept

It is `function(body, content_type)`; its module must be on the server's PYTHONPATH. Where it cannot be had, raises, or
gives something else, that is `Unredacted`: such a request is not captured at all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable


class Unredacted(Exception):
    """Nobody can say that this body may be kept."""


class Redaction:
    """The hook named `module:function`; "" keeps every body as it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._function: Callable[[bytes, str], object] | None = None

    def __bool__(self) -> bool:
        return bool(self.name)

    def load(self) -> None:
        """Import it; whatever that raises."""
        if self.name:
            module, _, function = self.name.partition(":")
            self._function = getattr(importlib.import_module(module), function)

    def __call__(self, body: bytes, content_type: str) -> bytes | None:
        """`Unredacted` where the hook fails."""
        if self._function is None:
            raise Unredacted(f"{self.name} could not be imported")
        try:
            kept = self._function(body, content_type)
        except Exception as error:
            raise Unredacted(f"{self.name} raised {type(error).__name__}") from error
        if kept is not None and not isinstance(kept, bytes | bytearray):
            raise Unredacted(f"{self.name} gave {type(kept).__name__}; expected bytes or None")
        return None if kept is None else bytes(kept)
