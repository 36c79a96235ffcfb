"""Find how a model is served best on this machine: a TorchServe of its own, real load, a bounded time.

Neither the store nor the running server is touched, and the recipe only by `--write` (its [serving]). To try another
format, the run's net is exported to it: the artifact stays in the run's folder. `--html` writes the page it names.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from marwright import cli, files, toml
from marwright.errors import ArchiveError, MarwrightError, NotReady, SettingsError
from marwright.learning import recipe
from marwright.learning.recipe import Recipe
from marwright.packing import records, variants
from marwright.packing.records import ArchiveRecord
from marwright.release import scratch, tunepage, tuning
from marwright.release.contenders import Found, Setting, Space, Target
from marwright.release.server import Server
from marwright.release.trying import Source, Trying
from marwright.runs import Run
from marwright.settings import TuneSettings

SETTINGS = TuneSettings
LEAST_MINUTES = 0.2
WORKER_BYTES = 512 * 2**20
"""What a worker with a small net takes, about: torch and ONNX Runtime are most of it."""


@dataclass(frozen=True)
class Subject:
    """What is tuned: the newest archive, its recipe and its run where they are there."""

    record: ArchiveRecord
    file: Path
    recipe: Recipe | None
    run: Run | None

    @property
    def today(self) -> Setting:
        """As the recipe says, else as the archive does. Without the run there is the archive's own format alone."""
        if self.recipe is None:
            return Setting(self.record.format, **variants.serving(self.file))
        serving = self.recipe.serving
        setting = Setting(serving.format, serving.workers, serving.batch_size, serving.max_batch_delay, serving.threads)
        return setting if self.run is not None else replace(setting, format=self.record.format)


def main(settings: TuneSettings) -> int:
    began = time.monotonic()
    target = Target.parse(settings.target)
    _allowed(settings)
    subject = _subject(settings)
    _alone(settings)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine = f"{cores} cores, {platform.machine()}"
    _say(
        settings,
        f"{settings.model} on {machine}: {target}, {settings.minutes:g} minutes, {settings.connections} clients",
    )
    busy = os.getloadavg()[0]
    if busy > 0.5 * cores:
        _say(settings, f"the machine is busy already (load {busy:.1f}): what else it does is measured, too")
    with scratch.server(settings.config) as server:
        sources = _sources(subject, server.home / "built")
        threads = not os.environ.get("MARWRIGHT_THREADS")  # it beats what the archive says
        room = psutil.virtual_memory().available // WORKER_BYTES
        space = Space.of(subject.today, cores=cores, formats=tuple(sources), threads=threads, workers=room)
        server.bring_up({}, progress=lambda line: _say(settings, line))
        with Trying(server, sources, target=target, connections=settings.connections) as bench:
            left = settings.minutes * 60 - (time.monotonic() - began)
            found = tuning.search(bench, subject.today, space, target, left, tell=lambda line: _say(settings, line))
            busiest = bench.busiest
    if settings.html:
        files.write_text(settings.html, tunepage.html(found, model=settings.model, machine=machine))
    _refuse_unreachable(found)
    wrote = _written(settings, found) if settings.write and found.better else None
    _show(settings, subject, found, busiest, wrote)
    return 0


def _allowed(settings: TuneSettings) -> None:
    if not LEAST_MINUTES <= settings.minutes <= 24 * 60:
        raise SettingsError(f"--minutes is {settings.minutes:g}; allowed: {LEAST_MINUTES} to 1440", hint="--minutes 5")
    if not 1 <= settings.connections <= 1000:
        raise SettingsError(f"--connections is {settings.connections}; allowed: 1 to 1000", hint="--connections 128")


def _subject(settings: TuneSettings) -> Subject:
    path = settings.recipes / f"{settings.model}.toml"
    chosen = recipe.load(path) if path.is_file() else None
    built = records.records(settings.store, settings.model)
    built = [each for each in built if (settings.store / each.file).is_file()]
    if chosen is None and not built:
        there = ", ".join(recipe.names(settings.recipes)) or "none"
        raise SettingsError(f"no model {settings.model!r}; there are recipes for: {there}", hint="--model NAME")
    if not built:
        raise ArchiveError(
            f"no archive of {settings.model} in {settings.store} to try", hint=f"make archive RECIPE={settings.model}"
        )
    if settings.write and chosen is None:
        raise SettingsError(f"there is no {path} to write to", hint="leave --write out")
    run = Run(settings.runs / built[-1].run)
    known = chosen is not None and run.finished
    return Subject(built[-1], settings.store / built[-1].file, chosen, run if known else None)


def _alone(settings: TuneSettings) -> None:
    """A server in use would be slowed by the load, and the measurement by its users."""
    if not settings.beside and Server(settings.serving, home=settings.home).find() is not None:
        raise NotReady("TorchServe is running here, and tuning needs the whole machine", hint="make stop; or --beside")


def _sources(subject: Subject, folder: Path) -> Mapping[str, Callable[[], Source]]:
    """An archive for each format. From the run, as the next `marwright archive` would build it; the newest archive
    as it is where the run or the recipe has gone."""
    chosen, run = subject.recipe, subject.run
    if chosen is None or run is None:
        return {subject.record.format: lambda: Source(subject.record, subject.file)}
    from marwright.packing import archive, exporting

    def build(format: str) -> Source:
        serving = chosen.serving.model_copy(update={"format": format})
        asked = chosen.model_copy(update={"serving": serving})
        record, _ = archive.write(run, exporting.export(run, format), asked, folder / format)
        return Source(record, folder / format / record.file)

    return {format: lambda format=format: build(format) for format in exporting.EXPORTERS}  # type: ignore[misc]


def _refuse_unreachable(found: Found) -> None:
    if found.reached:
        return
    raise MarwrightError(
        f"nothing that was tried keeps {found.target}: {tunepage.shortfall(found)}"
        f" ({len(found.trials)} settings tried)",
        hint="a target that is further away, more --minutes, or a smaller net",
    )


def _written(settings: TuneSettings, found: Found) -> Path:
    path = (settings.recipes / f"{settings.model}.toml").resolve()
    text = path.read_bytes().decode("utf-8")  # line ends as they are
    files.write_text(path, toml.with_keys(text, "serving", tunepage.section(found.winner), without=tunepage.OVERRULED))
    return path


def _show(settings: TuneSettings, subject: Subject, found: Found, busiest: float, wrote: Path | None) -> None:
    if settings.json:
        print(json.dumps(tunepage.document(found) | {"sender": round(busiest, 2), "wrote": str(wrote or "")}))
        return
    print()
    cli.print_table(("setting", "within the target", "lone client, p50", ""), tunepage.tried(found))
    for curve in [found.winner, *([found.of_today] if found.winner is not found.of_today else [])]:
        print(f"\n{curve.setting}{' (today)' if curve is found.of_today else ''}")
        rows = [
            (f"{rate:.0f}", *(f"{each:.2f}" for each in middle), str(failed))
            for rate, *middle, failed in tunepage.points(found, curve)
        ]
        cli.print_table(tunepage.head(found), rows)
    print(f"\n{tunepage.verdict(found)}.")
    print(f"{len(found.trials)} settings in {found.seconds:.0f} s.", end=" ")
    print(
        "Not tried for lack of time: " + "; ".join(map(str, found.untried)) if found.untried else "None was left out."
    )
    if subject.run is None:
        print(f"Only {subject.record.format}: the run {subject.record.run} or its recipe is not here to export from.")
    if busiest > 0.8:
        print(f"The sender needed {busiest:.0%} of a core: clients on other machines would leave the server more.")
    if not found.better:
        return
    keys = tunepage.section(found.winner)
    print(f"\n{'wrote to ' + str(wrote) if wrote else 'for the recipe (--write puts it there)'}:\n\n[serving]")
    for key, value in keys.items():
        print(f"{key} = {json.dumps(value)}")
    if wrote:
        print(f"\nmake archive RECIPE={settings.model}   # then make rollout")


def _say(settings: TuneSettings, line: str) -> None:
    print(line, file=sys.stderr if settings.json else sys.stdout, flush=True)
