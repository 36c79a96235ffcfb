"""Print a token that is valid now, renewed if need be."""

from __future__ import annotations

from marwright.settings import TokenSettings
from scripts import live

SETTINGS = TokenSettings


def main(settings: TokenSettings) -> int:
    print(live.tokens(settings).key(settings.kind))
    return 0
