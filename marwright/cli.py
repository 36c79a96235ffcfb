"""From words to a call, and from an error to an exit code.

0  done
1  expected failure: a MarwrightError, told with its hint
2  usage
3  rolled back
130  Ctrl-C
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from marwright.errors import MarwrightError, RolledBack, SettingsError


def run(main: Callable[[Any], int], settings: type[Any], argv: Sequence[str], *, prog: str) -> int:
    """Parse `argv` into a `settings` value and call `main` with it; expected errors become exit codes."""
    wants_json = "--json" in argv
    try:
        value = tyro.cli(settings, args=list(argv), prog=prog, description=settings.__doc__)
    except SystemExit as stop:  # tyro has printed help (0) or what was wrong (2)
        return int(stop.code or 0)
    try:
        return main(value)
    except MarwrightError as error:
        tell(error, as_json=wants_json)
        return _exit_code(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on standard output, wider than the terminal rather than cut."""
    Console(width=1000).print(table(titles, rows))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Aligned columns, for rich."""
    made = Table(box=None, pad_edge=False)
    for title in titles:
        made.add_column(title, no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))  # a label may hold what rich would take for markup
    return made


def _exit_code(error: MarwrightError) -> int:
    match error:
        case SettingsError():
            return 2
        case RolledBack():
            return 3
        case _:
            return 1


def tell(error: MarwrightError, *, as_json: bool = False) -> None:
    """The error on standard error: what happened, and what to type next; or one JSON document on standard output."""
    if as_json:
        kind = type(error).__name__
        print(json.dumps({"error": kind, "message": error.message, "hint": error.hint}, ensure_ascii=False))
    else:
        print(f"error: {error}", file=sys.stderr)
