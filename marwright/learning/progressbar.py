"""How far a training is: a bar on a terminal, a line for each epoch in a log.

with progressbar.shown("digits", 10, enabled=True) as advance:
    advance(curves)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Row = dict[str, float]
"""One epoch of a training."""


@contextlib.contextmanager
def shown(name: str, epochs: int, *, enabled: bool) -> Iterator[Callable[[list[Row]], None]]:
    """What is called after each epoch with all rows so far."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[scores]}"),
    )  # fmt: skip
    console = Console()
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task(f"training {name}", total=epochs, scores="")

        def advance(curves: list[Row]) -> None:
            last = curves[-1] if curves else {}
            shown = {name: value for name, value in last.items() if name not in ("epoch", "lr", "seconds")}
            scores = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
            bar.update(task, completed=len(curves), scores=scores)
            if enabled and last and not bar.console.is_terminal:  # a log gets a line for each epoch, not a moving bar
                bar.console.print(f"epoch {len(curves)} of {epochs}  {scores}", soft_wrap=True)

        yield advance
